"""Accuracy against NumPy on the tars' own pictures, and its intervals against SciPy."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from shard_sets import write_shard_set
from small_training import CPU
from torch.nn import functional as F

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import evaluate as evaluation
from training.config import TrainConfig
from training.evaluate import Metrics, Protocol, evaluate, wilson
from training.loader import Batch, Loader
from training.network import input_spec

SIDE = 231  # two pixels of margin on each side of the centre view
CLASSES = 9
# (top, left, mirrored) of the views, by hand
VIEWS: dict[Protocol, list[tuple[int, int, bool]]] = {
    "centre": [(2, 2, False)],
    "ten_crop": [
        (top, left, mirrored)
        for mirrored in (False, True)
        for top, left in [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
    ],
}


def linear_network(classes: int) -> torch.Tensor:
    """A weight (classes, 3·4·4) for logits of the mean colours of a 4×4 grid."""
    return torch.randn(classes, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def grid_logits(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, 4).flatten(1) @ weight.float().T


def measure(
    uri: str, split: str = "val", *, batch_size: int = 256, protocol: Protocol = "centre"
) -> Metrics:
    manifest = load_manifest(uri)
    weight = linear_network(manifest.num_classes)
    with Loader(uri, manifest, split, threads=2, cache_gb=1) as loader:
        return evaluate(
            lambda x: grid_logits(weight, x),
            loader,
            input_spec(manifest, TrainConfig()),
            device=CPU,
            batch_size=batch_size,
            protocol=protocol,
        )


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("evaluate")
    return write_shard_set(folder, train=(11, 2), val=(17, 5, 9), classes=CLASSES, side=SIDE)


def in_numpy(uri: str, split: str, protocol: Protocol) -> tuple[int, int, float]:
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
                views = [x[a : a + 227, b : b + 227, :] for a, b, _ in VIEWS[protocol]]
                flips = [flip for *_, flip in VIEWS[protocol]]
                views = [v[:, ::-1] if f else v for v, f in zip(views, flips, strict=True)]
                believed = np.mean([softmax(weight @ grid_means(v).ravel()) for v in views], axis=0)
                order = np.argsort(-believed)
                top1 += order[0] == label
                top5 += label in order[:5]
                loss -= np.log(believed[label])
    return int(top1), int(top5), float(loss)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def grid_means(x: np.ndarray) -> np.ndarray:
    """(227,227,3) → (3,4,4): cell i from floor(227·i/4) to ceil(227·(i+1)/4)."""
    cuts = [(227 * i // 4, -(-227 * (i + 1) // 4)) for i in range(4)]
    rows = [[x[a:b, c:d].mean(axis=(0, 1)) for c, d in cuts] for a, b in cuts]
    return np.array(rows).transpose(2, 0, 1)


@pytest.mark.parametrize("protocol", ["centre", "ten_crop"])
@pytest.mark.parametrize(("split", "batch_size"), [("val", 1), ("train", 70), ("val", 256)])
def test_counts_and_loss_equal_numpy_on_the_tars(uri, split, batch_size, protocol):
    images = {"train": 13, "val": 31}[split]
    top1, top5, loss = in_numpy(uri, split, protocol)
    assert 0 < top1 < top5 < images, "an oracle that cannot tell wrong counts"
    found = measure(uri, split, batch_size=batch_size, protocol=protocol)
    assert (found.images, found.correct1, found.correct5) == (images, top1, top5)
    assert (found.top1, found.top5) == (top1 / images, top5 / images)
    assert found.loss == pytest.approx(loss / images, rel=1e-5)


def test_the_two_protocols_can_be_told_apart(uri):
    assert abs(in_numpy(uri, "val", "centre")[2] - in_numpy(uri, "val", "ten_crop")[2]) > 1e-3


def test_batch_size_counts_views(uri):
    sizes: list[int] = []
    manifest = load_manifest(uri)

    def network(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return torch.zeros(len(x), CLASSES)

    with Loader(uri, manifest, "train", threads=1, cache_gb=1) as loader:
        spec = input_spec(manifest, TrainConfig())
        evaluate(network, loader, spec, device=CPU, batch_size=59, protocol="ten_crop")
    assert sizes == [50, 50, 30]


def test_with_fewer_than_five_classes_top5_counts_all(tmp_path):
    uri = write_shard_set(tmp_path / "few", train=(3,), val=(8,), classes=3)
    found = measure(uri)
    assert found.top5 == 1.0 and found.top1 < 1.0


class Drawn:
    """A loader's split of black pictures with the given labels, read from nowhere."""

    def __init__(self, labels: list[int]) -> None:
        self.num_samples, self._labels = len(labels), torch.tensor(labels)

    def batches(self, ids_of_batches, *, pin=False):
        for ids in ids_of_batches:
            images = torch.zeros(len(ids), 3, SIDE, SIDE, dtype=torch.uint8)
            yield Batch(images, self._labels[ids], torch.from_numpy(ids))


def of_constant(uri: str, labels: list[int], logits: list[float]) -> Metrics:
    spec = input_spec(load_manifest(uri), TrainConfig())
    answer = torch.tensor([logits])
    return evaluate(lambda x: answer.expand(len(x), -1), Drawn(labels), spec, device=CPU)


def test_ties_go_to_the_lower_label_and_nan_is_never_right(uri):
    dead = of_constant(uri, [0, 1, 4, 5, 6, 0], [3.0] * 7)
    assert (dead.correct1, dead.correct5) == (2, 4)
    assert dead.loss == pytest.approx(np.log(7))
    broken = of_constant(uri, [0, 1, 2], [float("nan")] * 3)
    assert (broken.correct1, broken.correct5) == (0, 0) and np.isnan(broken.loss)


@pytest.mark.parametrize(
    ("labels", "words"),
    [([], "no pictures"), ([2, -1], "without a label"), ([0, 3], "label 3 .* 3 classes")],
)
def test_a_split_whose_accuracy_means_nothing_is_refused_in_one_line(uri, labels, words):
    with pytest.raises(UserError, match=words) as refusal:
        of_constant(uri, labels, [0.0, 1.0, 2.0])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("other", [lambda ids: ids[1:], lambda ids: np.append(ids[1:], ids[1])])
def test_a_picture_lost_or_seen_twice_is_not_overlooked(uri, monkeypatch, other):
    monkeypatch.setattr(evaluation, "rank_part", lambda ids, rank, world_size: other(ids))
    with pytest.raises(AssertionError, match=r"evaluated (30|29) of 31 pictures once"):
        measure(uri)


@pytest.mark.parametrize("images", [1, 20, 3925, 50_000])
def test_intervals_equal_scipys(images):
    for correct in {0, 1, images // 2, images - 1, images}:
        expected = binomtest(correct, images).proportion_ci(0.95, method="wilson")
        assert wilson(correct, images) == pytest.approx(tuple(expected), abs=1e-12)


def test_intervals_are_the_published_ones():
    """Newcombe 1998, table I, method 3."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, images), expected in published.items():
        assert wilson(correct, images) == pytest.approx(expected, abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0), "no pictures, nothing known"


def test_intervals_of_metrics_are_those_of_their_counts(uri):
    found = measure(uri)
    assert found.top1_interval == wilson(found.correct1, 31)
    assert found.top5_interval == wilson(found.correct5, 31)
    assert found.top1_interval[0] < found.top1 < found.top1_interval[1]
