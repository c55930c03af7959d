"""Small shard sets drawn in memory for the tests of training, without the builder or Ray."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from drawn import encoded
from PIL import Image

from pipelines import shards, storage
from pipelines.shards import load_manifest
from training.loader import Loader

SIZES = (5, 4, 6)  # of a train split


def write_shard_set(
    folder: Path,
    *,
    train: tuple[int, ...] = (10, 9, 9),
    val: tuple[int, ...] = (7, 6),
    classes: int = 4,
    side: int = 227,
    seed: int = 0,
) -> str:
    """A finished set with shards of the given sizes; returns its URI.

    Sample i has label i % classes, and its image is a noisy plane of that class's colour.
    """
    rng = np.random.default_rng(seed)
    infos, pixels = [], []
    for split, sizes in (("train", train), ("val", val)):
        tables, first = [], 0
        for number, size in enumerate(sizes):
            name = shards.shard_name(split, number)
            samples = [_sample(split, i, classes, side, rng) for i in range(first, first + size)]
            first += size
            packed = shards.pack(name, samples)
            data = packed.tar
            storage.write_new(f"{folder}/{name}.tar", data)
            tables.append(packed.index)
            infos.append((name, split, size, len(data), hashlib.sha256(data).hexdigest()))
            pixels += [np.asarray(Image.open(io.BytesIO(s.jpeg))) for s in samples]
        index = shards.parquet_bytes(pa.concat_tables(tables))
        storage.write_new(f"{folder}/index/{split}.parquet", index)
    document = _manifest(infos, np.stack(pixels), classes, side)
    storage.write_new(f"{folder}/manifest.json", shards.canonical_json(document, indent=1))
    return str(folder)


def _sample(
    split: str, number: int, classes: int, side: int, rng: np.random.Generator
) -> shards.Sample:
    label = number % classes
    hue = np.array([label * 255 // max(1, classes - 1), 255 * (label % 2), 128])
    image = np.clip(hue + rng.integers(-40, 40, (side, side, 3)), 0, 255).astype(np.uint8)
    key, jpeg = f"{split}_{number:04d}", encoded(Image.fromarray(image), quality=90)
    lineage = {"source": "drawn", "source_offset": 0, "source_size": 0, "source_sha256": ""}
    size = {"width": side, "height": side, "fixes": ()}
    return shards.Sample(key, label, f"n{label:08d}", jpeg, f"{key}.JPEG", **lineage, **size)


def _manifest(
    infos: list[tuple[str, str, int, int, str]], pixels: np.ndarray, classes: int, side: int
) -> dict[str, object]:
    flat = pixels.reshape(-1, 3).astype(np.float64)
    columns = ("name", "split", "samples", "bytes", "sha256")
    return {
        "format": shards.FORMAT,
        "format_version": shards.FORMAT_VERSION,
        "plan_id": hashlib.sha256(repr(infos).encode()).hexdigest(),
        "geometry": {"resize": side, "crop": side},
        "codec": {"quality": 90},
        "seed": 0,
        "classes": {
            "wnids": [f"n{label:08d}" for label in range(classes)],
            "names": [f"colour {label}" for label in range(classes)],
        },
        "pixels": {
            "count": len(flat),
            "mean": flat.mean(axis=0).tolist(),
            "covariance": np.cov(flat, rowvar=False, bias=True).tolist(),
        },
        "shards": [dict(zip(columns, info, strict=True)) for info in infos],
        "totals": {split: {} for _, split, *_ in infos},
        "source": {"layout": "drawn"},
    } | {"rejected": {}, "fixes": {}, "partial": False}


def open_loader(uri: str | Path, split: str = "train", **options: float) -> Loader:
    manifest = load_manifest(str(uri))
    return Loader(str(uri), manifest, split, **({"threads": 2, "cache_gb": 1} | options))


def decoded(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N,H,W,3) and labels (N,) straight from the tars' members, by Pillow."""
    pixels, labels = [], []
    for path in sorted(Path(folder).glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            contents = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        for name in (name for name in contents if name.endswith(".jpg")):
            pixels.append(np.asarray(Image.open(io.BytesIO(contents[name])).convert("RGB")))
            labels.append(int(contents[name.replace(".jpg", ".cls")]))
    return np.stack(pixels), np.array(labels)


def assert_equal_to_tars(folder: str | Path, loader: Loader, split: str, ids: list[int]) -> None:
    pixels, labels = decoded(folder, split)
    batch = loader.read(np.array(ids))
    assert (batch.images.shape, batch.images.dtype) == ((len(ids), 3, 227, 227), torch.uint8)
    assert batch.labels.tolist() == labels[ids].tolist()
    assert batch.sample_ids.tolist() == ids
    found = batch.images.permute(0, 2, 3, 1).numpy()
    # Two decoders of one libjpeg family: equal up to a rounding of the inverse DCT.
    assert np.abs(found.astype(int) - pixels[ids].astype(int)).max() <= 1
