"""What the benchmarks read: real photos where there are some, drawn ones otherwise; and shards."""

import hashlib
import io
import itertools
import os
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines import demo_raw, shards, storage
from pipelines.sources.ilsvrc import TRAIN_TAR
from pipelines.transform import Stored, to_stored

QUALITY = 90
RESIZE = 256
_WNIDS = ("n00000001", "n00000002")


@dataclass(frozen=True)
class Raw:
    jpegs: tuple[bytes, ...]  # plain JPEGs of full size
    origin: str  # what they are, in words for the table


def load(limit: int = 200) -> Raw:
    """photos-200.tar of $ALEXNET_TEST_DATA, or as many drawn images."""
    folder = os.environ.get("ALEXNET_TEST_DATA")
    photos = Path(folder or "/nonexistent") / "photos-200.tar"
    if photos.exists():
        jpegs, kind = members(photos.read_bytes()), "photos from ImageNet's train split"
    else:
        kind = "DRAWN images (no $ALEXNET_TEST_DATA/photos-200.tar), unlike photos in detail"
        jpegs = drawn(limit)
    jpegs = [jpeg for jpeg in jpegs if _plain(jpeg)][:limit]
    sizes = [Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs]
    mean_kb = np.mean([len(jpeg) for jpeg in jpegs]) / 1000
    megapixels = np.mean([width * height for width, height in sizes]) / 1e6
    return Raw(
        tuple(jpegs), f"{len(jpegs)} {kind}, mean {mean_kb:.0f} kB and {megapixels:.2f} Mpixel"
    )


def stored(raw: Raw, crop: int) -> list[bytes]:
    """JPEGs as the builder stores them: shorter side 256, centre crop, quality 90."""
    results = [to_stored(jpeg, RESIZE, crop, QUALITY) for jpeg in raw.jpegs]
    return [result.jpeg for result in results if isinstance(result, Stored)]


def class_folders(folder: Path, raw: Raw, count: int) -> Path:
    """`count` files that repeat raw.jpegs, as train/WNID/KEY.JPEG of two classes, in `folder`."""
    for number in range(count):
        wnid = _WNIDS[number % len(_WNIDS)]
        path = folder / "train" / wnid / f"{wnid}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw.jpegs[number % len(raw.jpegs)])
    return folder


def train_archive(folder: Path, files: Path) -> Path:
    """ILSVRC2012_img_train.tar, in `folder`, of the files of `class_folders`."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / TRAIN_TAR, "w") as outer:
        for of_class in sorted(files.glob("train/*")):
            inner = folder / f"{of_class.name}.tar"
            with tarfile.open(inner, "w") as tar:
                for path in sorted(of_class.iterdir()):
                    tar.add(path, path.name)
            outer.add(inner, inner.name)
            inner.unlink()
    return folder


def write_shards(
    folder: Path, jpegs: Sequence[bytes], *, crop: int, train: int, classes: int, per_shard: int
) -> str:
    """A finished shard set of `train` samples that repeat `jpegs`, with one more shard as val.

    Labels run through the classes and are without meaning. Returns its URI.
    """
    infos = []
    for split, count in (("train", train), ("val", min(train, len(jpegs)))):
        tables = []
        for number, first in enumerate(range(0, count, per_shard)):
            name = shards.shard_name(split, number)
            ids = range(first, min(count, first + per_shard))
            packed = shards.pack(name, [_sample(split, i, jpegs, classes) for i in ids])
            data = packed.tar
            storage.write(storage.join(str(folder), f"{name}.tar"), data)
            storage.write(storage.join(str(folder), f"{name}.idx"), packed.dali_index)
            tables.append(packed.index)
            infos.append((name, split, len(ids), len(data), hashlib.sha256(data).hexdigest()))
        index = shards.parquet_bytes(pa.concat_tables(tables))
        storage.write(storage.join(str(folder), "index", f"{split}.parquet"), index)
    document = manifest_bytes(infos, crop, classes)
    storage.write(storage.join(str(folder), "manifest.json"), document)
    return str(folder)


def manifest_bytes(
    infos: Sequence[tuple[str, str, int, int, str]], crop: int, classes: int
) -> bytes:
    """manifest.json of shards with these (name, split, samples, bytes, sha256)."""
    columns = ("name", "split", "samples", "bytes", "sha256")
    wnids = [f"n{label:08d}" for label in range(classes)]
    covariance = [[4900.0, 4200.0, 3800.0], [4200.0, 4700.0, 4300.0], [3800.0, 4300.0, 5000.0]]
    document = {
        "format": shards.FORMAT,
        "format_version": shards.FORMAT_VERSION,
        "plan_id": hashlib.sha256(repr(infos).encode()).hexdigest(),
        "geometry": {"resize": RESIZE, "crop": crop},
        "codec": {"quality": QUALITY},
        "seed": 0,
        "classes": {"wnids": wnids, "names": wnids},
        # Near ImageNet's; the rate does not depend on them.
        "pixels": {"count": 1, "mean": [122.0, 116.0, 104.0], "covariance": covariance},
        "shards": [dict(zip(columns, info, strict=True)) for info in infos],
        "totals": {split: {} for _, split, *_ in infos},
        "source": {"layout": "drawn"},
        "rejected": {},
        "fixes": {},
        "partial": True,
    }
    return shards.canonical_json(document)


def members(archive: bytes) -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()]
        return [file.read() for file in files if file is not None]


def drawn(limit: int) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        drawing = demo_raw.Drawing(per_class=-(-limit // 10) + 2, val_per_class=1)
        demo_raw.draw(folder, drawing, seed=0)
        classes = members((Path(folder) / TRAIN_TAR).read_bytes())
    return list(itertools.chain.from_iterable(zip(*map(members, classes), strict=True)))


def _plain(jpeg: bytes) -> bool:
    """True for what the usual script can read, too."""
    result = to_stored(jpeg, RESIZE, 227, QUALITY)
    unhurt = {"grey", "exif_orientation_ignored"}
    return isinstance(result, Stored) and set(result.fixes) <= unhurt


def _sample(split: str, number: int, jpegs: Sequence[bytes], classes: int) -> shards.Sample:
    return shards.Sample(
        key=f"{split}_{number:06d}",
        label=number % classes,
        wnid=f"n{number % classes:08d}",
        jpeg=jpegs[number % len(jpegs)],
        name=f"{split}_{number:06d}.JPEG",
        source="benchmark",
        source_offset=0,
        source_size=0,
        source_sha256="",
        width=0,
        height=0,
        fixes=(),
    )
