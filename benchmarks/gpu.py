"""Training steps on a GPU: throughput, use of the arithmetic, feeding, decoding, kernels.

    python -m benchmarks.gpu [PART…] [--rounds R] [--small] [--out FOLDER]

Needs neither Ray nor MLflow: `steps` and `kernels` run with torch and NumPy alone, `decoders` with
Pillow beside them, and `feed` says which of pyarrow, simplejpeg, safetensors and tyro it lacks.
Each part writes a result of its own as soon as it is measured. --small is a trial that runs on a
CPU too; its figures mean nothing, and it writes no file unless --out says where.
"""

import argparse
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch

from alexnet.errors import UserError
from benchmarks import gpu_feed, gpu_steps, results
from benchmarks.table import Table, machine
from pipelines import command

Part = Callable[[torch.device, int, bool], Table]

_SMALL_STEPS = gpu_steps.Scale(batches=(2, 4), compiled=(), steps=1, width=0.1, side=256)
_SMALL_FEED = gpu_feed.Scale(batch=4, steps=1, classes=5, width=0.1, decoded=4, calls=1)

PARTS: dict[str, Part] = {
    "steps": lambda device, rounds, small: gpu_steps.run(
        device, rounds, _SMALL_STEPS if small else gpu_steps.Scale()
    ),
    "feed": lambda device, rounds, small: gpu_feed.run(
        device, rounds, _SMALL_FEED if small else gpu_feed.Scale()
    ),
    "decoders": lambda device, rounds, small: gpu_feed.decoders(
        device, rounds, _SMALL_FEED if small else gpu_feed.Scale()
    ),
    "kernels": lambda device, rounds, small: gpu_steps.kernels(
        device, rounds, _SMALL_STEPS if small else gpu_steps.Scale()
    ),
}


def main(argv: list[str] | None = None) -> int:
    return command.answered(lambda: _measured(_parsed(argv)))


def _measured(arguments: argparse.Namespace) -> int:
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.small:
        raise UserError("torch finds no CUDA device; --small tries it on the CPU")
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else "no GPU"
    for part in arguments.parts or PARTS:
        before, began = machine(name), time.monotonic()
        table = PARTS[part](device, arguments.rounds, arguments.small)
        print(f"## gpu-{part}\n\n{before}\n\n{table.markdown()}\n", flush=True)
        if arguments.out is not None or not arguments.small:
            words = ["python", "-m", "benchmarks.gpu", part, "--rounds", str(arguments.rounds)]
            again = shlex.join([*words, *(["--small"] if arguments.small else [])])
            folder = arguments.out or results.FOLDER
            path, _ = results.write(f"gpu-{part}", table, before, again, folder)
            print(path, flush=True)
        print(f"gpu-{part}: {time.monotonic() - began:.0f} s\n", flush=True)
    return 0


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a trial; its figures mean nothing")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the results")
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} must be at least 1")
    return arguments


if __name__ == "__main__":
    command.begin()
    command.leave(main)
