"""One shard, from its planned rows to its published tar and sidecar: a task's whole work, no ray.

Same plan and number, same bytes: so a retry, or two workers on the same shard, do no harm. torch is
imported where a task needs it: the driver knows `Job` and `Made` alone, and starts faster without.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import features

from alexnet.errors import UserError
from pipelines import plan_files, reads, shards, sidecars, storage
from pipelines.plan import Orientation

if TYPE_CHECKING:
    from pipelines.transform import Pixels, Stored


@dataclass(frozen=True)
class Job:
    """What every task of a build needs besides the shard that it makes."""

    raw: str
    out: str
    plan_id: str
    resize: int  # of the image as it lies in RAW
    crop: int
    quality: int
    exif_orientation: Orientation
    keep: bool  # a stored image that needs no change
    versions: dict[str, str]  # codec_versions() of the driver
    archives: dict[str, str]  # storage.version of each, before its members were looked for


@dataclass(frozen=True)
class Made:
    """How the making of a shard went; what it holds is in its sidecar."""

    samples: int
    rejected: list[dict[str, Any]]
    read_bytes: int
    stored_bytes: int
    wait_seconds: float  # for the raw images
    work_seconds: float  # in all, waiting included


def write_shard(job: Job, number: int, name: str, shard_id: str) -> Made:
    """Publish shard `number`, its index for DALI and its sidecar. Raises UserError when RAW or OUT
    cannot be used, or changed behind the plan's back."""
    import torch

    from pipelines.transform import Rejected, keep_stored, to_stored

    started = time.perf_counter()
    torch.set_num_threads(1)  # parallelism is by tasks; more threads would only fight
    _refuse_other_versions(job)
    rows = plan_files.read_rows(job.out, job.plan_id, number)
    samples: list[shards.Sample | None] = [None] * len(rows)
    rejected: list[dict[str, Any]] = []
    pixels = PixelSums()
    with reads.Reader(job.raw, rows) as reader:
        for position, raw in reader:
            row = rows[position]
            if job.keep:
                made = keep_stored(raw, job.crop)
            else:
                made = to_stored(raw, job.resize, job.crop, job.quality, job.exif_orientation)
            if isinstance(made, Rejected):
                _refuse_changed(job, rows)
                kept = shards.rejected_name(row["split"], row["key"])
                storage.write_new(storage.join(job.out, kept), raw, below=job.out)
                rejected.append(_lineage(row, raw) | vars(made))
            else:
                pixels.add(made.pixels)
                samples[position] = _sample(row, raw, made)
    _refuse_changed(job, rows)
    good = [sample for sample in samples if sample is not None]
    assert len(good) + len(rejected) == len(rows), f"{name}: an image is neither here nor there"
    rejected.sort(key=lambda entry: str(entry["key"]))
    packed = shards.pack(name, good)
    status = {  # no clock: two workers that make the same shard must write the same sidecar
        "shard_id": shard_id,
        "shard": name,
        "split": rows[0]["split"],
        "samples": len(good),
        "bytes": len(packed.tar),
        "sha256": hashlib.sha256(packed.tar).hexdigest(),
        "md5": hashlib.md5(packed.tar, usedforsecurity=False).hexdigest(),  # asked for by wids
        "dali_index_sha256": hashlib.sha256(packed.dali_index).hexdigest(),
        "pixels": pixels.to_json(),
        "fixes": dict(Counter(fix for sample in good for fix in sample.fixes)),
        "rejected": rejected,
        "versions": job.versions,
    }
    for suffix, data in ((".tar", packed.tar), (".idx", packed.dali_index)):
        storage.write_new(storage.join(job.out, name + suffix), data, below=job.out)
    sidecar = sidecars.pack(packed.index, status)  # last: where it is, the tar is whole
    storage.write_new(sidecars.place(job.out, name), sidecar, below=job.out)
    return Made(
        samples=len(good),
        rejected=rejected,
        read_bytes=reader.read_bytes,
        stored_bytes=len(packed.tar),
        wait_seconds=reader.wait_seconds,
        work_seconds=time.perf_counter() - started,
    )


def codec_versions() -> dict[str, str]:
    """Of everything that has a say in the bytes of a stored image."""
    return {
        "libjpeg_turbo": str(features.version_feature("libjpeg_turbo")),
        "pillow": version("pillow"),
        "simplejpeg": version("simplejpeg"),
        "torch": version("torch").partition("+")[0],
    }


def _refuse_other_versions(job: Job) -> None:
    if (found := codec_versions()) != job.versions:
        raise UserError(
            f"this worker has {found}, the driver {job.versions}; install the same versions "
            "everywhere, or the shards would depend on who made them"
        )


def _refuse_changed(job: Job, rows: list[dict[str, Any]]) -> None:
    """What was read so far is of the archives that the plan was made from, or nothing is written:
    in another archive of the same size other images lie at the same places."""
    for name in sorted({row["source"] for row in rows} & job.archives.keys()):
        uri = storage.join(job.raw, name)
        if storage.version(uri) != job.archives[name]:
            raise UserError(f"{uri} has changed since this build began; put it back or build anew")


def _lineage(row: dict[str, Any], raw: bytes) -> dict[str, Any]:
    return {
        "key": row["key"],
        "name": row["name"],
        "source": row["source"],
        "source_offset": row["offset"],
        "source_size": len(raw),
        "source_sha256": hashlib.sha256(raw).hexdigest(),
    }


def _sample(row: dict[str, Any], raw: bytes, made: Stored) -> shards.Sample:
    return shards.Sample(
        label=row["label"],
        wnid=row["wnid"],
        jpeg=made.jpeg,
        width=made.width,
        height=made.height,
        fixes=made.fixes,
        **_lineage(row, raw),
    )


class PixelSums:
    """Exact sums over RGB pixels, so that their total depends on no order of addition."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = np.zeros(3, np.int64)
        self.products = np.zeros((3, 3), np.int64)

    def add(self, pixels: Pixels) -> None:
        """uint8 (3, H, W). The sums of a row are exact, in any order of addition: below 2²⁴ in
        float32, which is twice as fast as one product in float64, and below 2⁵³ in float64."""
        import torch

        height, width = pixels.shape[1:]
        exact = torch.float32 if width * 255**2 < 1 << 24 else torch.float64
        planes = torch.from_numpy(pixels).contiguous()
        rows = planes.to(exact).transpose(0, 1)
        products = torch.bmm(rows, rows.transpose(1, 2))
        self.count += height * width
        self.sums += rows.sum(dim=2).long().sum(dim=0).numpy()
        self.products += products.long().sum(dim=0).numpy()

    def to_json(self) -> dict[str, Any]:
        sums, products = self.sums.tolist(), self.products.tolist()
        return {"count": self.count, "sums": sums, "products": products}
