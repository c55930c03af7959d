"""Accuracy and scores against NumPy on the tars' own images."""

import functools
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import write_shard_set
from small_training import CPU
from torch import nn

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import evaluate as evaluation
from training.accuracy import Metrics, Scored
from training.config import TrainConfig
from training.evaluate import Protocol, evaluate, score
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


class Rows(nn.Module):
    """Logits of a linear map of the mean colours of the 227 rows and columns."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        drawn = torch.randn(classes, 2 * 3 * 227, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(drawn / 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean(2).flatten(1), x.mean(3).flatten(1)], 1) @ self.weight.T


class Constant(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), -1)


def counted(uri: str, split: str = "val") -> Metrics:
    manifest = load_manifest(uri)
    with Loader(uri, manifest, split, threads=2) as loader, torch.inference_mode():
        network = Rows(manifest.num_classes)
        return evaluate(network, loader, input_spec(manifest, TrainConfig()), device=CPU)


def scored(uri: str, split: str = "val", network: nn.Module | None = None, **how) -> Scored:
    manifest = load_manifest(uri)
    network = network or Rows(manifest.num_classes)
    return score(network, input_spec(manifest, TrainConfig()), uri, manifest, split, **how)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("evaluate")
    return write_shard_set(folder, train=(11, 2), val=(9, 3, 7), classes=CLASSES, side=SIDE)


@functools.cache
def in_numpy(uri: str, split: str, protocol: Protocol) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, labels and the probabilities of all classes (N, classes), from the tars."""
    manifest = load_manifest(uri)
    mean, covariance = np.array(manifest.pixels.mean), np.array(manifest.pixels.covariance)
    weight = Rows(manifest.num_classes).weight.detach().double().numpy()
    keys, labels, rows = [], [], []
    for path in sorted(Path(uri).glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in [m for m in tar.getmembers() if m.name.endswith(".jpg")]:
                keys.append(member.name.removesuffix(".jpg"))
                labels.append(int(tar.extractfile(member.name.replace(".jpg", ".cls")).read()))
                image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                x = (np.asarray(image, dtype=np.float64) - mean) / np.sqrt(np.diag(covariance))
                seen = []
                for top, left, mirrored in VIEWS[protocol]:
                    v = x[top : top + 227, left : left + 227][:, :: -1 if mirrored else 1]
                    means = [v.mean(0).T.ravel(), v.mean(1).T.ravel()]
                    seen.append(softmax(weight @ np.concatenate(means)))
                rows.append(np.mean(seen, 0))
    return keys, np.array(labels), np.array(rows)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


@pytest.mark.parametrize("protocol", ["centre", "ten_crop"])
@pytest.mark.parametrize(("split", "batch_size"), [("train", 20), ("val", 256)])
def test_every_image_is_scored_as_numpy_does_from_the_tars(uri, split, batch_size, protocol):
    found = scored(uri, split, batch_size=batch_size, protocol=protocol)
    keys, labels, probabilities = in_numpy(uri, split, protocol)
    order = np.argsort(-probabilities, axis=1)
    places = [row.tolist().index(label) for row, label in zip(order, labels, strict=True)]
    assert len(set(places)) > 2, "an oracle that cannot tell wrong places"
    other: Protocol = "centre" if protocol == "ten_crop" else "ten_crop"
    assert np.abs(probabilities - in_numpy(uri, split, other)[2]).max() > 1e-3
    assert list(found.keys) == keys
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.place, places)
    np.testing.assert_array_equal(found.top, order[:, :5])
    own = probabilities[np.arange(len(labels)), labels]
    np.testing.assert_allclose(found.loss, -np.log(own), rtol=1e-4)
    np.testing.assert_allclose(found.probabilities, -np.sort(-probabilities)[:, :5], rtol=1e-4)
    assert found.metrics.correct5 == sum(place < 5 for place in places)
    assert found.metrics.loss == pytest.approx(-np.log(own).mean(), rel=1e-5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_loops_counts_are_those_of_the_scores(uri, split):
    counts, metrics = counted(uri, split), scored(uri, split).metrics
    assert counts.images == metrics.images == {"train": 13, "val": 19}[split]
    assert 0 < counts.correct1 == metrics.correct1 < counts.correct5 == metrics.correct5
    assert counts.loss == pytest.approx(metrics.loss, rel=1e-6)


def test_with_fewer_than_five_classes_top5_counts_all(tmp_path):
    uri = write_shard_set(tmp_path / "few", train=(3,), val=(8,), classes=3)
    assert counted(uri).top5 == scored(uri).metrics.top5 == 1.0
    assert scored(uri).top.shape == (8, 3)


class Drawn:
    """A loader's split of black images with the given labels, read from nowhere."""

    def __init__(self, labels: list[int]) -> None:
        self.num_samples, self._labels = len(labels), torch.tensor(labels)

    def batches(self, ids_of_batches, *, pin=False):
        for ids in ids_of_batches:
            images = torch.zeros(len(ids), 3, SIDE, SIDE, dtype=torch.uint8)
            yield Batch(images, self._labels[ids], torch.from_numpy(ids))


def of_constant(uri: str, labels: list[int], logits: list[float]) -> Metrics:
    spec = input_spec(load_manifest(uri), TrainConfig())
    return evaluate(Constant(logits), Drawn(labels), spec, device=CPU)


def test_ties_go_to_the_lower_label_and_nan_is_never_right(uri):
    dead = of_constant(uri, [0, 1, 4, 5, 6, 0], [3.0] * 7)
    assert (dead.correct1, dead.correct5) == (2, 4)
    assert dead.loss == pytest.approx(np.log(7))
    tied = scored(uri, network=Constant([1.0] * CLASSES))
    np.testing.assert_array_equal(tied.predicted, 0)
    np.testing.assert_array_equal(tied.place, tied.labels)
    nan = [float("nan")] * CLASSES
    for broken in (of_constant(uri, [0, 1], nan), scored(uri, network=Constant(nan)).metrics):
        assert (broken.correct1, broken.correct5) == (0, 0) and np.isnan(broken.loss)


@pytest.mark.parametrize(
    ("labels", "words"),
    [([], "no images"), ([2, -1], "without a label"), ([0, 3], "label 3 .* 3 classes")],
)
def test_a_split_whose_accuracy_means_nothing_is_refused_in_one_line(uri, labels, words):
    with pytest.raises(UserError, match=words) as refusal:
        of_constant(uri, labels, [0.0, 1.0, 2.0])
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_scored_is_refused(uri):
    with pytest.raises(UserError, match="built with --splits test"):
        scored(uri, "test")
    with pytest.raises(UserError, match=r"0 workers .* ask for 1 or more"):
        scored(uri, workers=0)
    with pytest.raises(UserError, match="beyond the network's 3 classes"):
        scored(uri, network=Constant([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("other", [lambda ids: ids[1:], lambda ids: np.append(ids[1:], ids[1])])
def test_an_image_lost_or_seen_twice_is_not_overlooked(uri, monkeypatch, other):
    monkeypatch.setattr(evaluation, "rank_part", lambda ids, rank, world_size: other(ids))
    with pytest.raises(AssertionError, match=r"evaluated (18|17) of 19 images once"):
        counted(uri)
    real = Loader.batches

    def batches(self, parts, **rest):
        return real(self, [other(part) if len(part) > 1 else part for part in parts], **rest)

    monkeypatch.setattr(Loader, "batches", batches)
    with pytest.raises(AssertionError, match="a batch of other images"):
        scored(uri)
