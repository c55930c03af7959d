"""Real processes over gloo find the same counts, confusion and mistakes as one, and NumPy does."""

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
from training.loader import Loader
from training.mistakes import Examination, Mistake, by_class, confused_pairs, examine

IMAGES, CLASSES, SIDE, KEEP = 1003, 7, 227, 20
SPEC = InputSpec(SIDE, SIDE, (128,) * 3, (64,) * 3, ((4096, 0, 0), (0, 4096, 0), (0, 0, 4096)))
WEIGHT = torch.randn(48, CLASSES, generator=torch.Generator().manual_seed(1)).double()


def write_set(folder: Path, sizes: tuple[int, ...]) -> str:
    """Smooth pictures with random labels: quick to draw, where noise takes long."""
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


def look(uri: str, rank: int = 0, world_size: int = 1) -> Examination:
    with Loader(uri, load_manifest(uri), "val", threads=1, cache_gb=1) as loader:
        return examine(
            logits,
            loader,
            SPEC,
            num_classes=CLASSES,
            device=CPU,
            rank=rank,
            world_size=world_size,
            batch_size=64,
            keep=KEEP,
        )


def plain(found: Examination) -> dict[str, Any]:
    metrics = asdict(found.metrics)
    mistakes = [list(asdict(mistake).values()) for mistake in found.mistakes]
    return {"metrics": metrics, "confusion": found.confusion.tolist(), "mistakes": mistakes}


def on_rank(rank: int, world_size: int, uris: list[str]) -> list[dict[str, Any]]:
    return [plain(look(uri, rank, world_size)) for uri in uris]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_set(tmp_path_factory.mktemp("many"), (400, 3, 600))


@pytest.fixture(scope="module")
def alone(uri: str) -> Examination:
    return look(uri)


@pytest.fixture(scope="module")
def believed(uri: str) -> tuple[np.ndarray, np.ndarray]:
    """(labels, probabilities (1003, 7)) in NumPy."""
    with Loader(uri, load_manifest(uri), "val", threads=1, cache_gb=1) as loader:
        (batch,) = loader.batches([np.arange(IMAGES)])
    cuts = [(227 * i // 4, -(-227 * (i + 1) // 4)) for i in range(4)]  # of a 4×4 grid
    pixels = batch.images.numpy()
    cells = [pixels[:, :, a:b, c:d].mean(axis=(2, 3)) for a, b in cuts for c, d in cuts]
    means = (np.stack(cells, axis=2).reshape(IMAGES, 48) - 128) / 64
    powers = np.exp(means @ WEIGHT.numpy())
    return batch.labels.numpy(), powers / powers.sum(axis=1, keepdims=True)


def test_1003_pictures_give_the_same_integers_on_one_three_and_four_ranks(uri, alone, tmp_path):
    few = write_set(tmp_path / "few", (1, 1))  # fewer pictures than ranks
    answers = run_ranks([4, 3], on_rank, tmp_path, [uri, few])
    assert alone.metrics.images == IMAGES and 0 < alone.metrics.correct1 < IMAGES
    for number, expected in enumerate((plain(alone), plain(look(few)))):
        loss = expected["metrics"].pop("loss")
        for world_size, ranks in answers.items():
            for rank, answer in enumerate(ranks):
                found = answer[number]
                assert found["metrics"].pop("loss") == pytest.approx(loss, rel=1e-9)
                assert found == expected, f"rank {rank} of {world_size}"


def test_confusion_counts_every_picture_at_its_label_and_prediction(alone, believed):
    labels, rows = believed
    expected = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    np.add.at(expected, (labels, rows.argmax(1)), 1)
    assert alone.confusion.dtype == np.int64
    np.testing.assert_array_equal(alone.confusion, expected)
    assert alone.confusion.trace() == alone.metrics.correct1


def test_the_most_confident_mistakes_come_first_and_ties_by_sample_id(alone, believed):
    labels, rows = believed
    wrong = [i for i in range(IMAGES) if rows[i].argmax() != labels[i]]
    wrong.sort(key=lambda i: (-round(rows[i].max(), 6), i))
    assert [mistake.sample_id for mistake in alone.mistakes] == wrong[:KEEP]
    for mistake in alone.mistakes:
        row = rows[mistake.sample_id]
        assert (mistake.label, mistake.predicted) == (labels[mistake.sample_id], row.argmax())
        assert mistake.probability == pytest.approx(row.max(), abs=1e-6)


def test_equally_confident_mistakes_are_those_of_the_lowest_ids(uri):
    def sure(x: torch.Tensor) -> torch.Tensor:
        return torch.eye(CLASSES)[:1].expand(len(x), -1) * 40

    with Loader(uri, load_manifest(uri), "val", threads=1, cache_gb=1) as loader:
        found = examine(sure, loader, SPEC, num_classes=CLASSES, device=CPU, batch_size=100)
        (batch,) = loader.batches([np.arange(60)])
    first = [i for i, label in enumerate(batch.labels.tolist()) if label != 0][:24]
    expected = [Mistake(i, int(batch.labels[i]), 0, 1.0) for i in first]
    assert list(found.mistakes) == expected


def test_classes_and_pairs_are_read_off_the_confusion():
    confusion = np.array([[5, 2, 0], [0, 0, 0], [1, 2, 4]])
    zero, absent, two = by_class(confusion)
    assert (zero.images, zero.correct, zero.top1, zero.taken_for) == (7, 5, 5 / 7, 1)
    assert (absent.images, absent.top1, absent.taken_for) == (0, None, None)
    assert (two.images, two.correct, two.taken_for) == (7, 4, 1)
    assert zero.interval == pytest.approx((0.3589, 0.9178), abs=5e-5)  # by the closed formula
    assert confused_pairs(confusion) == [(0, 1, 2), (2, 1, 2), (2, 0, 1)]
    assert by_class(np.diag([3, 4]))[1].taken_for is None
