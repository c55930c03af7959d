"""The exports against the network itself, by the programs that would use them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from registered import GOOD, MLFLOW_WARNINGS, Built, quiet_export
from torch import nn

from alexnet.classifier import Classifier
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec, centre_view
from training.registry import exports
from training.registry.versions import Registered, load

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

SPEC = InputSpec(
    resize=256,
    crop=227,
    mean=(120.0, 110.0, 100.0),
    std=(60.0, 55.0, 50.0),
    covariance=((3600.0, 0.0, 0.0), (0.0, 3025.0, 0.0), (0.0, 0.0, 2500.0)),
)


@pytest.fixture
def logged(
    registered_models: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Registered]:
    """The folder exports/ of GOOD's run, and GOOD."""
    client = registered_models.enter_copy(tmp_path / "home", monkeypatch)
    run_id = client.get_model_version("alexnet", GOOD).run_id
    folder = client.download_artifacts(run_id, "exports", str(tmp_path))
    return Path(folder), load(f"models:/alexnet/{GOOD}")


def pictures(count: int) -> np.ndarray:
    shape = (count, 3, 227, 227)
    return np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)


def eager(model: Registered, images: np.ndarray) -> np.ndarray:
    """Logits with NumPy's own normalisation before the network."""
    mean, std = (np.array(getattr(model.input_spec, n))[:, None, None] for n in ("mean", "std"))
    with torch.inference_mode():
        x = torch.tensor((images - mean) / std, dtype=torch.float32)
        return model.network(x).numpy()


def test_onnx_is_one_valid_file_and_agrees_at_any_batch_size(logged):
    folder, model = logged
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 227, 227])
    assert isinstance(given.shape[0], str) and (result.name, result.shape[1]) == ("logits", 4)
    for count in (1, 3, 7):
        (found,) = session.run(None, {"images": pictures(count)})
        expected = eager(model, pictures(count))
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


_PROGRAM = """
import sys
import numpy as np, torch
network = torch.export.load("model.pt2").module()
for count in (1, 3, 7):
    logits = network(torch.from_numpy(np.load(f"in{count}.npy")))
    np.save(f"out{count}.npy", logits.detach().numpy())
assert "alexnet" not in sys.modules
"""


def test_pt2_is_loaded_by_torch_alone_and_agrees_at_any_batch_size(logged):
    folder, model = logged
    for count in (1, 3, 7):
        np.save(folder / f"in{count}.npy", pictures(count))
    subprocess.run([sys.executable, "-W", "ignore", "-c", _PROGRAM], cwd=folder, check=True)
    for count in (1, 3, 7):
        found = np.load(folder / f"out{count}.npy")
        np.testing.assert_allclose(found, eager(model, pictures(count)), rtol=1e-4, atol=1e-4)


def test_class_names_and_geometry_lie_beside_the_exports(logged):
    folder, model = logged
    beside = json.loads((folder / "alexnet.json").read_text())
    assert beside == model.description
    assert beside["class_names"][2] == "colour 2" and beside["input_spec"]["crop"] == 227
    assert "antialiased Lanczos" in beside["preprocessing"]


def test_the_papers_network_exports_as_well(tmp_path, monkeypatch):
    quiet_export(monkeypatch)
    network = AlexNet("paper", num_classes=5, width=1 / 32, init="he")
    classifier = Classifier(network, SPEC).eval()
    assert exports.write(classifier, tmp_path) == {"pt2": "ok", "onnx": "ok"}
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2", "model.onnx"}


def test_classifier_normalises_as_the_centre_view_does():
    images = torch.from_numpy(pictures(2))
    assert torch.equal(Classifier(nn.Identity(), SPEC)(images), centre_view(images, SPEC))


# Faults


class Pooled(nn.Module):
    """A network that costs nothing: the mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class OtherWhenExported(Pooled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (0.01 if torch.compiler.is_exporting() else 0.0)


class ByItsValues(Pooled):
    """Takes a way that depends on the pixels, which no exported graph can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class NotANumber(Pooled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float("nan")


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (OtherWhenExported(), "failed: logits of 1 pictures differ by 0.01"),
        (ByItsValues(), "failed: "),
        (NotANumber(), "failed: logits of 1 pictures differ by nan"),
    ],
)
def test_export_that_fails_or_disagrees_is_told_and_leaves_no_file(
    tmp_path, monkeypatch, caplog, network, reason
):
    quiet_export(monkeypatch)
    told = exports.write(Classifier(network, SPEC).eval(), tmp_path)
    assert sorted(told) == ["onnx", "pt2"]
    for kind, outcome in told.items():
        assert outcome.startswith(reason) and len(outcome) < 400 and "\n" not in outcome
        assert f"the export model.{kind} failed and is left out" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_one_failing_export_leaves_the_other(tmp_path, monkeypatch):
    quiet_export(monkeypatch)

    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", missing)  # as where a part of it is not installed
    told = exports.write(Classifier(Pooled(), SPEC).eval(), tmp_path)
    assert told["pt2"] == "ok" and told["onnx"].startswith("failed: ModuleNotFoundError")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
