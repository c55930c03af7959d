"""A network for programs without this project: one file, kept if it computes the same.

    python -m training export MODEL [--format onnx|torch] [--out FILE]

MODEL is champion, candidate, a version's number, an MLflow model URI, or the folder or s3:// prefix
of a checkpoint or run. FILE takes uint8 (N, 3, 227, 227), RGB, any N, and gives logits float32
(N, classes); beside it, FILE.json names the classes and says how an image becomes such pixels. ONNX
needs `pip install 'alexnet-workflow[export]'`, torch (of torch.export) nothing more.

Exit codes: 0 done, 1 what was exported computes something else, 2 wrong usage or input.
"""

if __name__ == "__main__":
    from pipelines import command

    command.begin()

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from alexnet import NETWORK_SIDE
from alexnet.classifier import Classifier
from alexnet.errors import UserError
from pipelines import command
from training.network import load_model

# Largest difference of a logit, as a share of the largest logit where that is above 1.
TOLERANCE = 1e-4
BATCH_SIZES = (1, 2, 5)
ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
_FOR_ONNX = ("onnx", "onnxruntime", "onnxscript")

Run = Callable[[torch.Tensor], torch.Tensor]


class Differs(Exception):
    """What was exported is not the network; the text says by how much, in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(lambda: _answer(_parse(argv)), failed={Differs: "failed"})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser("python -m training export", description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--format", choices=list(ENDINGS), default="onnx", help="%(default)s")
    parser.add_argument(
        "--out", metavar="FILE", help="alexnet-3.onnx or .pt2 of version 3, by default"
    )
    return parser.parse_args(argv)


def _answer(args: argparse.Namespace) -> int:
    if args.format == "onnx":
        refuse_missing()
    model = load_model(args.model)
    path = Path(args.out or f"{model.file_name}{ENDINGS[args.format]}")
    beside = path.with_name(f"{path.name}.json")
    for file in (path, beside):
        if file.exists():
            raise UserError(f"{file} already exists; choose another --out, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; create it, or choose another --out")
    write(Classifier(model.network, model.input_spec).eval(), path, args.format)
    spec = model.input_spec
    description = {
        "model": model.name,
        "input": (
            f"RGB, the shorter side resized to {spec.resize} by antialiased Lanczos, of the middle "
            f"{spec.crop}×{spec.crop} the middle {NETWORK_SIDE}×{NETWORK_SIDE}, uint8 (N, 3, "
            f"{NETWORK_SIDE}, {NETWORK_SIDE}); mean and deviation are in the file"
        ),
        "input_spec": spec.to_json(),
        "class_names": list(model.class_names),
        "wnids": list(model.wnids),
    }
    beside.write_text(json.dumps(description, indent=1))
    command.say(f"{path}: logits as those of {model.name}; {beside.name} has its classes")
    return 0


def refuse_missing() -> None:
    """Raises UserError where the packages of ONNX are not installed."""
    if missing := [name for name in _FOR_ONNX if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"ONNX needs {', '.join(missing)}; pip install 'alexnet-workflow[export]', or pass "
            "--format torch"
        )


def write(classifier: Classifier, path: Path, kind: str) -> None:
    """classifier: on the CPU, in evaluation mode; kind: onnx or torch.

    `path` appears once its logits are those of the classifier at several batch sizes. Raises
    Differs where they are not, and whatever the exporters raise.
    """
    # Two images: with one, the exported batch dimension would be fixed at one.
    example = torch.zeros(2, 3, NETWORK_SIDE, NETWORK_SIDE, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch")}}
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder, _quiet():
        made = Path(folder) / path.name
        program = torch.export.export(classifier, (example,), dynamic_shapes=batch)
        if kind == "torch":
            torch.export.save(program, made)
            _compare(classifier, torch.export.load(made).module())
        else:
            _save_onnx(program, made)
            _compare(classifier, _onnx(made))
        made.rename(path)


def _save_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    torch.onnx.export(
        program,
        (),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,  # one file
        verbose=False,
    )


def _onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run


@torch.no_grad()
def _compare(classifier: Classifier, run: Run) -> None:
    generator = np.random.default_rng(0)
    for size in BATCH_SIZES:
        shape = (size, 3, NETWORK_SIDE, NETWORK_SIDE)
        images = torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8))
        expected, found = classifier(images), run(images)
        if found.shape != expected.shape:
            raise Differs(f"logits of {size} images are {found.shape}, not {expected.shape}")
        off = float((found - expected).abs().max())
        if not off <= TOLERANCE * max(1.0, float(expected.abs().max())):  # NaN is off as well
            raise Differs(f"logits of {size} images differ by {off:.2g} from the network's")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress and their warnings about their own parts, which nobody who
    exports a network can act on."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


if __name__ == "__main__":
    command.leave(main)
