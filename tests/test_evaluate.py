"""Accuracy against NumPy, and the same counts over any number of ranks."""

import io
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from shard_sets import write_shard_set
from small_training import CPU
from torch.nn import functional as F

from pipelines.shards import load_manifest
from training import evaluate as evaluation
from training.config import TrainConfig
from training.evaluate import Metrics, evaluate
from training.loader import Loader
from training.loop import input_spec

SIDE = 231  # two pixels of margin on each side of the centre view
CLASSES = 9


def linear_network(classes: int) -> torch.Tensor:
    """A weight (classes, 3·4·4) for logits of the mean colours of a 4×4 grid."""
    return torch.randn(classes, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def grid_logits(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, 4).flatten(1) @ weight.float().T


def measure(
    uri: str, split: str = "val", *, rank: int = 0, world_size: int = 1, batch_size: int = 256
) -> Metrics:
    manifest = load_manifest(uri)
    weight = linear_network(manifest.num_classes)
    with Loader(uri, manifest, split, threads=2, cache_gb=1) as loader:
        return evaluate(
            lambda x: grid_logits(weight, x),
            loader,
            input_spec(manifest, TrainConfig()),
            device=CPU,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
        )


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("evaluate")
    return write_shard_set(folder, train=(11, 2), val=(17, 5, 9), classes=CLASSES, side=SIDE)


def in_numpy(uri: str, split: str) -> tuple[int, int, float]:
    """(right in first place, right in first five, sum of cross-entropies), from the tars."""
    manifest = load_manifest(uri)
    mean, covariance = np.array(manifest.pixels.mean), np.array(manifest.pixels.covariance)
    weight = linear_network(manifest.num_classes).numpy()
    top1 = top5 = 0
    loss = 0.0
    for path in sorted(Path(uri).glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in [m for m in tar.getmembers() if m.name.endswith(".jpg")]:
                label = int(tar.extractfile(member.name.replace(".jpg", ".cls")).read())
                picture = Image.open(io.BytesIO(tar.extractfile(member).read()))
                x = (np.asarray(picture, dtype=np.float64) - mean) / np.sqrt(np.diag(covariance))
                logits = weight @ grid_means(x[2:229, 2:229]).ravel()
                order = np.argsort(-logits)
                top1 += order[0] == label
                top5 += label in order[:5]
                loss += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
    return int(top1), int(top5), float(loss)


def grid_means(x: np.ndarray) -> np.ndarray:
    """(227,227,3) → (3,4,4): cell i from floor(227·i/4) to ceil(227·(i+1)/4)."""
    cuts = [(227 * i // 4, -(-227 * (i + 1) // 4)) for i in range(4)]
    rows = [[x[a:b, c:d].mean(axis=(0, 1)) for c, d in cuts] for a, b in cuts]
    return np.array(rows).transpose(2, 0, 1)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_counts_and_loss_equal_numpy_on_the_tars(uri, split, batch_size):
    images = {"train": 13, "val": 31}[split]
    top1, top5, loss = in_numpy(uri, split)
    assert 0 < top1 < top5 < images, "an oracle that cannot tell wrong counts"
    found = measure(uri, split, batch_size=batch_size)
    assert (found.images, found.top1, found.top5) == (images, top1 / images, top5 / images)
    assert found.loss == pytest.approx(loss / images, rel=1e-5)


def test_with_fewer_than_five_classes_top5_counts_all(tmp_path):
    uri = write_shard_set(tmp_path / "few", train=(3,), val=(8,), classes=3)
    found = measure(uri)
    assert found.top5 == 1.0 and found.top1 < 1.0


def count_on_rank(rank: int, world_size: int, uris: list[str]) -> list[dict[str, float]]:
    return [asdict(measure(u, rank=rank, world_size=world_size, batch_size=4)) for u in uris]


def test_one_two_and_three_ranks_count_the_same(uri, tmp_path):
    two = write_shard_set(tmp_path / "two", train=(3,), val=(1, 1), classes=2)  # fewer than ranks
    answers = run_ranks([3, 2], count_on_rank, tmp_path, [uri, two])
    for number, place in enumerate((uri, two)):
        alone = asdict(measure(place))
        for world_size, ranks in answers.items():
            for rank, answer in enumerate(ranks):
                found = answer[number]
                for key in ("images", "top1", "top5"):
                    assert found[key] == alone[key], f"{key} of rank {rank} of {world_size}"
                assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_a_lost_picture_is_not_overlooked(uri, monkeypatch):
    monkeypatch.setattr(evaluation, "rank_part", lambda ids, rank, world_size: ids[1:])
    with pytest.raises(AssertionError, match="evaluated 30 of 31 pictures"):
        measure(uri)
