"""Scores of every picture against NumPy on the tars' own pictures, and Ray against one process."""

import dataclasses
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import write_shard_set
from small_training import CPU
from torch import nn

from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec
from pipelines.shards import load_manifest
from training.config import TrainConfig
from training.evaluate import evaluate
from training.loader import Loader
from training.mistakes import examine
from training.network import input_spec
from training.scoring import Scored, score, terminal_line

# Ray Data warns of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
CLASSES = 7


@dataclasses.dataclass(frozen=True)
class Model:
    network: nn.Module
    input_spec: InputSpec


class Corner(nn.Module):
    """Logits of a linear map of the 8×8 pixels in the upper left corner."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight))  # float64 (classes, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, :, :8, :8].flatten(1).double() @ self.weight.T).float()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scoring")
    return write_shard_set(folder, train=(3,), val=(9, 4, 1, 6), classes=CLASSES, side=229)


def spec_of(uri: str) -> InputSpec:
    return input_spec(load_manifest(uri), TrainConfig())


def corner(uri: str) -> Model:
    weight = np.random.default_rng(3).normal(0, 0.1, (CLASSES, 192))
    return Model(Corner(weight), spec_of(uri))


@pytest.fixture(scope="module")
def alexnet(uri: str) -> Model:
    torch.manual_seed(2)
    return Model(AlexNet(num_classes=CLASSES, width=1 / 16, init="he").eval(), spec_of(uri))


def in_numpy(uri: str, model: Model) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, labels and the probabilities of all classes (N, classes), from the tars of val."""
    weight = model.network.weight.detach().numpy()
    keys, labels, logits = [], [], []
    for path in sorted(Path(uri).glob("val-*.tar")):
        with tarfile.open(path) as tar:
            for member in [m for m in tar.getmembers() if m.name.endswith(".jpg")]:
                keys.append(member.name.removesuffix(".jpg"))
                labels.append(int(tar.extractfile(member.name.replace(".jpg", ".cls")).read()))
                picture = Image.open(io.BytesIO(tar.extractfile(member).read()))
                pixels = np.asarray(picture, dtype=np.float64)[1:9, 1:9]  # of the centre 227×227
                x = (pixels - model.input_spec.mean) / model.input_spec.std
                logits.append(weight @ x.transpose(2, 0, 1).ravel())
    powers = np.exp(np.array(logits))
    return keys, np.array(labels), powers / powers.sum(axis=1, keepdims=True)


def test_every_picture_is_scored_as_numpy_does_from_the_tars(uri):
    model, told = corner(uri), []
    found = score(
        model, uri, load_manifest(uri), tell=lambda done, total: told.append((done, total))
    )
    keys, labels, probabilities = in_numpy(uri, model)
    order = np.argsort(-probabilities, axis=1)
    places = [row.tolist().index(label) for row, label in zip(order, labels, strict=True)]
    assert len(set(places)) > 1, "an oracle that cannot tell wrong places"
    assert list(found.keys) == keys
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.predicted, order[:, 0])
    np.testing.assert_array_equal(found.place, places)
    np.testing.assert_array_equal(found.correct, order[:, 0] == labels)
    own = probabilities[np.arange(len(labels)), labels]
    np.testing.assert_allclose(found.loss, -np.log(own), rtol=1e-4)
    np.testing.assert_allclose(found.probability, probabilities.max(axis=1), rtol=1e-5)
    types = [getattr(found, name).dtype for name in ("labels", "predicted", "place", "loss")]
    assert types == [np.int32, np.int32, np.int32, np.float64]
    assert found.probability.dtype == np.float32
    assert told == [(9, 20), (13, 20), (14, 20), (20, 20)]


def test_metrics_and_confusion_are_those_of_the_evaluation(uri):
    model, manifest = corner(uri), load_manifest(uri)
    found = score(model, uri, manifest)
    with Loader(uri, manifest, "val", threads=1) as loader:
        arguments: Any = (model.network, loader, model.input_spec)
        expected = evaluate(*arguments, device=CPU)
        examined = examine(*arguments, num_classes=CLASSES, device=CPU)
    metrics = found.metrics
    assert (metrics.images, metrics.correct1, metrics.correct5) == (
        expected.images,
        expected.correct1,
        expected.correct5,
    )
    assert (metrics.top1, metrics.top5) == (expected.top1, expected.top5)
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-6)
    np.testing.assert_array_equal(found.confusion, examined.confusion)
    assert found.confusion.dtype == np.int64


def integers(found: Scored) -> list[Any]:
    columns = (found.labels, found.predicted, found.place, found.confusion)
    return [found.keys, *(column.tolist() for column in columns)]


def test_ray_gives_the_same_integers_as_one_process(local_ray, uri, alexnet):
    alone = score(alexnet, uri, load_manifest(uri))
    told: list[int] = []
    on_ray = score(
        alexnet, uri, load_manifest(uri), workers=3, tell=lambda done, _: told.append(done)
    )
    assert integers(on_ray) == integers(alone)
    assert len(set(alone.place.tolist())) > 1, "a network that cannot tell wrong order"
    np.testing.assert_allclose(on_ray.loss, alone.loss, rtol=1e-5)
    np.testing.assert_allclose(on_ray.probability, alone.probability, rtol=1e-5)
    assert len(told) == 4 and told[-1] == 20
    assert next(alexnet.network.parameters()).device == CPU, "the caller's network was moved"


def test_a_changed_shard_is_one_line_from_this_process_and_from_ray(local_ray, tmp_path, alexnet):
    uri = write_shard_set(tmp_path, train=(1,), val=(2, 2), classes=CLASSES, side=229)
    model = Model(alexnet.network, spec_of(uri))
    path = tmp_path / "val-000001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for workers in (None, 1):
        with pytest.raises(UserError, match=r"val-000001.tar has sha256 .* verify") as refusal:
            score(model, uri, load_manifest(uri), workers=workers)
        assert "\n" not in str(refusal.value)


def constant(uri: str, logits: list[float]) -> Scored:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(logits))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(x), -1)

    return score(Model(Constant(), spec_of(uri)), uri, load_manifest(uri))


def test_ties_go_to_the_lower_label_and_nan_is_never_right(uri):
    tied = constant(uri, [1.0] * CLASSES)
    np.testing.assert_array_equal(tied.predicted, 0)
    np.testing.assert_array_equal(tied.place, np.arange(20) % CLASSES)
    broken = constant(uri, [float("nan")] * CLASSES)
    assert not broken.correct.any() and broken.metrics.correct5 == 0
    assert np.isnan(broken.metrics.loss)


def test_what_cannot_be_scored_is_refused(uri, tmp_path):
    with pytest.raises(UserError, match=r"split test of .* has no pictures"):
        score(corner(uri), uri, load_manifest(uri), "test")
    with pytest.raises(UserError, match=r"0 workers .* ask for 1 or more"):
        score(corner(uri), uri, load_manifest(uri), workers=0)
    with pytest.raises(UserError, match="beyond the network's 3 classes"):
        constant(uri, [0.0, 1.0, 2.0])


def test_a_picture_lost_is_not_overlooked(uri, monkeypatch):
    real = Loader.batches
    monkeypatch.setattr(
        Loader, "batches", lambda self, parts, **rest: real(self, [p[1:] for p in parts], **rest)
    )
    with pytest.raises(AssertionError, match="val-000000 is not whole"):
        score(corner(uri), uri, load_manifest(uri))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_renewed_line_with_rate_and_time_left_on_terminals_alone(monkeypatch):
    assert terminal_line("val", io.StringIO()) is None
    now = [100.0]
    monkeypatch.setattr("training.scoring.time.monotonic", lambda: now[0])
    stream = Terminal()
    tell = terminal_line("version 3", stream)
    assert tell is not None
    for at, done in ((102.0, 500), (102.1, 510), (104.0, 1000), (108.0, 2000)):
        now[0] = at
        tell(done, 2000)
    lines = [line.removeprefix("\x1b[K") for line in stream.getvalue().split("\r")[1:]]
    assert lines == [
        "version 3: 500 of 2,000 pictures, 250 a second, 6 s left",
        "version 3: 1,000 of 2,000 pictures, 250 a second, 4 s left",
        f"version 3: 2,000 of 2,000 pictures, 250 a second, 8 s{os.linesep}",
    ]
