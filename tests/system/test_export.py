"""The exports against the network itself, by the programs that would use them."""

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from registered import GOOD, Built
from torch import nn

from alexnet.classifier import Classifier
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec
from training import export
from training.network import LoadedModel, load_model

SPEC = InputSpec(
    resize=256,
    crop=227,
    mean=(120.0, 110.0, 100.0),
    std=(60.0, 55.0, 50.0),
    covariance=((3600.0, 0.0, 0.0), (0.0, 3025.0, 0.0), (0.0, 0.0, 2500.0)),
)


@pytest.fixture(scope="module")
def exported(
    registered_models: Built, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, LoadedModel]]:
    """A folder with both files of GOOD, as the command writes them, and GOOD."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        registered_models.enter_copy(folder / "home", patch)
        quiet_trace(patch)
        for kind, name in (("onnx", "alexnet.onnx"), ("torch", "alexnet.pt2")):
            assert export.main([GOOD, "--format", kind, "--out", str(folder / name)]) == 0
        yield folder, load_model(GOOD)


def quiet_trace(patch: pytest.MonkeyPatch) -> None:
    """torch.export traces at length for whoever listens, and pytest does: 20 s of it."""
    patch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


def images_of(count: int) -> np.ndarray:
    shape = (count, 3, 227, 227)
    return np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)


def eager(model: LoadedModel, images: np.ndarray) -> np.ndarray:
    """Logits with NumPy's own normalisation before the network."""
    mean, std = (np.array(getattr(model.input_spec, n))[:, None, None] for n in ("mean", "std"))
    with torch.inference_mode():
        x = torch.tensor((images - mean) / std, dtype=torch.float32)
        return model.network(x).numpy()


def test_onnx_is_one_valid_file_and_agrees_at_any_batch_size(exported):
    folder, model = exported
    onnx.checker.check_model(str(folder / "alexnet.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(
        folder / "alexnet.onnx", providers=["CPUExecutionProvider"]
    )
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 227, 227])
    assert isinstance(given.shape[0], str) and (result.name, result.shape[1]) == ("logits", 4)
    for count in (1, 3, 7):
        (found,) = session.run(None, {"images": images_of(count)})
        expected = eager(model, images_of(count))
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


_PROGRAM = """
import sys
import numpy as np, torch
network = torch.export.load("alexnet.pt2").module()
for count in (1, 3, 7):
    logits = network(torch.from_numpy(np.load(f"in{count}.npy")))
    np.save(f"out{count}.npy", logits.detach().numpy())
assert "alexnet" not in sys.modules
"""


def test_pt2_is_loaded_by_torch_alone_and_agrees_at_any_batch_size(exported):
    folder, model = exported
    for count in (1, 3, 7):
        np.save(folder / f"in{count}.npy", images_of(count))
    subprocess.run([sys.executable, "-W", "ignore", "-c", _PROGRAM], cwd=folder, check=True)
    for count in (1, 3, 7):
        found = np.load(folder / f"out{count}.npy")
        np.testing.assert_allclose(found, eager(model, images_of(count)), rtol=1e-4, atol=1e-4)


def test_class_names_and_geometry_lie_beside_the_exports(exported):
    folder, model = exported
    for name in ("alexnet.onnx", "alexnet.pt2"):
        beside = json.loads((folder / f"{name}.json").read_text())
        assert beside["class_names"] == list(model.class_names)
        assert beside["wnids"] == list(model.wnids)
        assert InputSpec.from_json(beside["input_spec"]) == model.input_spec


def test_the_papers_network_exports_as_well(tmp_path, monkeypatch):
    quiet_trace(monkeypatch)
    network = AlexNet("paper", num_classes=5, width=1 / 32, init="he")
    export.write(Classifier(network, SPEC).eval(), tmp_path / "paper", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["paper"]


# Faults


class Pooled(nn.Module):
    """A network that costs nothing: the mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class OtherWhenExported(Pooled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (0.01 if torch.compiler.is_exporting() else 0.0)


class NotANumber(Pooled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float("nan")


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("network", "told"), [(OtherWhenExported(), "by 0.01 from"), (NotANumber(), "by nan from")]
)
def test_export_that_computes_something_else_is_refused_and_leaves_no_file(
    tmp_path, monkeypatch, network, told, kind
):
    quiet_trace(monkeypatch)
    with pytest.raises(export.Differs, match=f"logits of 1 images differ {told} the network"):
        export.write(Classifier(network, SPEC).eval(), tmp_path / "file", kind)
    assert list(tmp_path.iterdir()) == []


def test_without_a_package_of_onnx_nothing_begins(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export.main(["1"]) == 2
    asked = "ONNX needs onnx, onnxruntime, onnxscript; pip install 'alexnet-workflow[export]'"
    assert (err := capsys.readouterr().err).count("\n") == 1 and asked in err


def test_a_file_is_named_after_its_model_and_no_other_is_replaced(
    exported, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{exported[0]}/home/mlflow.db")
    there = tmp_path / f"alexnet-{GOOD}.pt2"
    there.write_text("mine")
    for out, told in (
        ([], f"alexnet-{GOOD}.pt2 already exists; choose another --out"),
        (["--out", str(tmp_path / "none" / "x.pt2")], "is not a folder"),
    ):
        assert export.main([GOOD, "--format", "torch", *out]) == 2
        assert (err := capsys.readouterr().err).count("\n") == 1 and told in err
    assert there.read_text() == "mine"
