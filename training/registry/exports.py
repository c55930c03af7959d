"""A trained network for programs without this project: torch.export and ONNX, each checked."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from alexnet import NETWORK_SIDE
from alexnet.classifier import Classifier

# Largest difference of a logit, as a share of the largest logit where that is above 1.
TOLERANCE = 1e-4
BATCH_SIZES = (1, 2, 5)
_OK = "ok"

logger = logging.getLogger("training")


def write(classifier: Classifier, folder: Path) -> dict[str, str]:
    """Writes model.pt2 and model.onnx into `folder`; both take uint8 (N, 3, 227, 227), any N, and
    give logits float32 (N, classes). `classifier`: on the CPU, in evaluation mode.

    Format → "ok", or "failed: reason" for one that could not be made or that computes something
    else than the classifier itself: it is told as a warning, and its file is not there.
    """
    return {
        kind: _checked(kind, classifier, folder / f"model.{kind}", export, load)
        for kind, export, load in (("pt2", _to_pt2, _from_pt2), ("onnx", _to_onnx, _from_onnx))
    }


Run = Callable[[torch.Tensor], torch.Tensor]


def _checked(
    kind: str,
    classifier: Classifier,
    path: Path,
    export: Callable[[Classifier, Path], None],
    load: Callable[[Path], Run],
) -> str:
    try:
        with _quiet():
            export(classifier, path)
            reason = _difference(classifier, load(path))
    # The exporters raise whatever their many parts raise. A network that is trained is worth more
    # than its exports, so none of it may end the registration; the reason is told and kept.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if reason is None:
        return _OK
    path.unlink(missing_ok=True)
    logger.warning(f"the export {path.name} failed and is left out: {reason}")
    return f"failed: {reason}"


def _to_pt2(classifier: Classifier, path: Path) -> None:
    torch.export.save(_program(classifier), path)


def _from_pt2(path: Path) -> Run:
    return torch.export.load(path).module()


def _to_onnx(classifier: Classifier, path: Path) -> None:
    torch.onnx.export(
        _program(classifier),
        (),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,  # one file
        verbose=False,
    )


def _from_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run


def _program(classifier: Classifier) -> torch.export.ExportedProgram:
    # Two pictures: with one, the exported batch dimension would be fixed at one.
    example = torch.zeros(2, 3, NETWORK_SIDE, NETWORK_SIDE, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(classifier, (example,), dynamic_shapes=batch)


def _difference(classifier: Classifier, run: Run) -> str | None:
    """None where `run` gives the classifier's logits at every batch size; else what it does."""
    generator = np.random.default_rng(0)
    for size in BATCH_SIZES:
        shape = (size, 3, NETWORK_SIDE, NETWORK_SIDE)
        images = torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))
        with torch.inference_mode():
            expected = classifier(images)
        with torch.no_grad():
            found = run(images)
        if found.shape != expected.shape:
            return (
                f"logits of {size} pictures are {tuple(found.shape)}, not {tuple(expected.shape)}"
            )
        off = float((found - expected).abs().max())
        if not off <= TOLERANCE * max(1.0, float(expected.abs().max())):  # NaN is off as well
            return f"logits of {size} pictures differ by {off:.2g} from the trained network's"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress and their warnings about their own parts, which nobody who
    trains a network can act on."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
