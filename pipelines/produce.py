"""One shard, from its planned rows to its published tar and sidecar. A task's whole work; no ray.

Same plan and number, same bytes: so a retry, or two workers on the same shard, do no harm.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import features

from alexnet.errors import UserError
from pipelines import plan, shards, storage
from pipelines.transform import Pixels, Rejected, Stored, to_stored

_MAX_GAP = 16 << 10  # bytes between two pictures that are cheaper to read than to skip
_MAX_READ = 8 << 20  # bytes per request
_READS_AHEAD = 4


@dataclass(frozen=True)
class Job:
    """What every task of a build needs besides the number of its shard."""

    raw: str
    out: str
    plan_id: str
    resize: int
    crop: int
    quality: int
    versions: dict[str, str]  # codec_versions() of the driver


def produce(job: Job, number: int, name: str) -> dict[str, Any]:
    """Publish shard `number` and return its status, the JSON of its sidecar."""
    torch.set_num_threads(1)  # parallelism is by tasks; more threads would only fight
    if codec_versions() != job.versions:
        raise UserError(
            f"this worker has {codec_versions()}, the driver {job.versions}; install the same "
            "versions everywhere, or the shards would depend on who made them"
        )
    rows = plan.read_rows(job.out, number)
    samples: list[shards.Sample | None] = [None] * len(rows)
    rejected: list[dict[str, Any]] = []
    pixels = _PixelSums()
    for position, raw in _pictures(job.raw, rows):
        row = rows[position]
        made = to_stored(raw, job.resize, job.crop, job.quality)
        if isinstance(made, Rejected):
            storage.write_new(quarantine_uri(job.out, row["split"], row["key"]), raw)
            rejected.append(_lineage(row, raw) | {"reason": made.reason, "detail": made.detail})
        else:
            pixels.add(made.pixels)
            samples[position] = _sample(row, raw, made)
    good = [sample for sample in samples if sample is not None]
    assert len(good) + len(rejected) == len(rows), f"{name}: a picture has no fate"
    data, index = shards.pack(name, good)
    storage.write_new(storage.join(job.out, f"{name}.tar"), data)
    status = {
        "plan_id": job.plan_id,
        "shard": name,
        "split": rows[0]["split"],
        "samples": len(good),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "md5": hashlib.md5(data, usedforsecurity=False).hexdigest(),  # asked for by wids
        "pixels": pixels.to_json(),
        "fixes": dict(Counter(fix for sample in good for fix in sample.fixes)),
        "rejected": sorted(rejected, key=lambda entry: str(entry["key"])),
        "versions": job.versions,
    }
    storage.write_new(shards.sidecar_uri(job.out, name), shards.pack_sidecar(index, status))
    return status


def _lineage(row: dict[str, Any], raw: bytes) -> dict[str, Any]:
    return {
        "key": row["key"],
        "name": row["name"],
        "source": row["source"],
        "source_offset": row["offset"],
        "source_size": row["size"],
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


def quarantine_uri(out: str, split: str, key: str) -> str:
    return storage.join(out, "quarantine", split, f"{key}.bin")


def codec_versions() -> dict[str, str]:
    """Of everything that has a say in the bytes of a stored picture."""
    return {
        "libjpeg_turbo": str(features.version_feature("libjpeg_turbo")),
        "pillow": version("pillow"),
        "simplejpeg": version("simplejpeg"),
        "torch": torch.__version__.partition("+")[0],
    }


class _PixelSums:
    """Exact sums over RGB pixels, so that their total depends on no order of addition."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = np.zeros(3, np.int64)
        self.products = np.zeros((3, 3), np.int64)

    def add(self, pixels: Pixels) -> None:
        """uint8 (3, H, W). float64 holds every integer here (H·W·255² < 2⁵³) and has fast BLAS."""
        flat = pixels.reshape(3, -1).astype(np.float64)
        self.count += flat.shape[1]
        self.sums += flat.sum(axis=1).astype(np.int64)
        self.products += (flat @ flat.T).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "sums": self.sums.tolist(),
            "products": self.products.tolist(),
        }


def _pictures(raw: str, rows: list[dict[str, Any]]) -> Iterator[tuple[int, bytes]]:
    """(position in `rows`, raw bytes) in the source's order, with reads under way ahead."""
    runs = iter(_runs(rows))
    with ThreadPoolExecutor(_READS_AHEAD) as pool:
        pending = [(run, pool.submit(_read, raw, rows, run)) for run in islice(runs, _READS_AHEAD)]
        while pending:
            run, reading = pending.pop(0)
            data = reading.result()
            if (following := next(runs, None)) is not None:
                pending.append((following, pool.submit(_read, raw, rows, following)))
            start = rows[run[0]]["offset"]
            for position in run:
                row = rows[position]
                yield position, data[row["offset"] - start :][: row["size"]]


def _runs(rows: list[dict[str, Any]]) -> list[list[int]]:
    """Positions grouped by what one read fetches: neighbours in the same container."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["source"], rows[i]["offset"]))
    runs: list[list[int]] = []
    for position in order:
        row = rows[position]
        if runs:
            first, last = rows[runs[-1][0]], rows[runs[-1][-1]]
            gap = row["offset"] - (last["offset"] + last["size"])
            length = row["offset"] + row["size"] - first["offset"]
            if row["source"] == last["source"] and gap <= _MAX_GAP and length <= _MAX_READ:
                runs[-1].append(position)
                continue
        runs.append([position])
    return runs


def _read(raw: str, rows: list[dict[str, Any]], run: list[int]) -> bytes:
    first, last = rows[run[0]], rows[run[-1]]
    length = last["offset"] + last["size"] - first["offset"]
    uri = storage.join(raw, first["source"])
    data = storage.read(uri, first["offset"], length)
    if len(data) != length:
        raise UserError(f"{uri} has changed: bytes {first['offset']} and on are gone; build anew")
    return data
