"""Real processes over gloo count the same as one."""

import hashlib
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from small_training import CPU
from torch.nn import functional as F

from alexnet.preprocess import InputSpec
from pipelines import shards, storage
from pipelines.shards import load_manifest
from training.evaluate import evaluate
from training.loader import Loader

IMAGES, CLASSES, SIDE = 1003, 7, 227
SPEC = InputSpec(SIDE, SIDE, (128,) * 3, (64,) * 3, ((4096, 0, 0), (0, 4096, 0), (0, 0, 4096)))
WEIGHT = torch.randn(48, CLASSES, generator=torch.Generator().manual_seed(1)).double()


def write_set(folder: Path, sizes: tuple[int, ...]) -> str:
    """Smooth images with random labels: quick to draw, where noise takes long."""
    rng = np.random.default_rng(3)
    infos, tables, number = [], [], 0
    for shard, size in enumerate(sizes):
        name = shards.shard_name("val", shard)
        packed = shards.pack(name, [sample(number + i, rng) for i in range(size)])
        number += size
        storage.write_new(f"{folder}/{name}.tar", packed.tar)
        sha256 = hashlib.sha256(packed.tar).hexdigest()
        infos.append(("val", name, size, len(packed.tar), sha256))
        tables.append(packed.index)
    storage.write_new(f"{folder}/index/val.parquet", shards.parquet_bytes(pa.concat_tables(tables)))
    names = ("split", "name", "samples", "bytes", "sha256")
    document = {
        "format": shards.FORMAT,
        "format_version": shards.FORMAT_VERSION,
        "plan_id": "drawn",
        "geometry": {"resize": SIDE, "crop": SIDE},
        "codec": {"quality": 90},
        "seed": 0,
        "classes": {"wnids": list("abcdefg"), "names": list("ABCDEFG")},
        "pixels": {"count": 1, "mean": SPEC.mean, "covariance": SPEC.covariance},
        "shards": [dict(zip(names, info, strict=True)) for info in infos],
        "totals": {"val": {}},
        "source": {"layout": "drawn"},
        "rejected": {},
        "fixes": {},
        "partial": False,
    }
    storage.write_new(f"{folder}/manifest.json", shards.canonical_json(document))
    return str(folder)


def sample(number: int, rng: np.random.Generator) -> shards.Sample:
    buffer = io.BytesIO()
    grid = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    grid.resize((SIDE, SIDE)).save(buffer, "JPEG", quality=90)
    label = int(rng.integers(CLASSES))
    key = f"val_{number:04d}"
    origin = ("drawn", 0, 0, "", SIDE, SIDE, ())
    return shards.Sample(key, label, "abcdefg"[label], buffer.getvalue(), key, *origin)


def logits(x: torch.Tensor) -> torch.Tensor:
    """In double precision, so that batches of other sizes do not round otherwise."""
    return F.adaptive_avg_pool2d(x.double(), 4).flatten(1) @ WEIGHT


def counted(uri: str, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    with Loader(uri, load_manifest(uri), "val", threads=1) as loader:
        ranks = {"rank": rank, "world_size": world_size}
        return asdict(evaluate(logits, loader, SPEC, device=CPU, **ranks))


def on_rank(rank: int, world_size: int, uris: list[str]) -> list[dict[str, Any]]:
    return [counted(uri, rank, world_size) for uri in uris]


def test_1003_images_give_the_same_integers_on_one_three_and_four_ranks(tmp_path):
    many = write_set(tmp_path / "many", (400, 3, 600))
    few = write_set(tmp_path / "few", (1, 1))  # fewer images than ranks
    answers = run_ranks([4, 3], on_rank, tmp_path, [many, few])
    alone = [counted(many), counted(few)]
    assert alone[0]["images"] == IMAGES and 0 < alone[0]["correct1"] < IMAGES
    for number, expected in enumerate(alone):
        loss = expected.pop("loss")
        for world_size, ranks in answers.items():
            for rank, answer in enumerate(ranks):
                assert answer[number].pop("loss") == pytest.approx(loss, rel=1e-9)
                assert answer[number] == expected, f"rank {rank} of {world_size}"
