"""What this code does on a GPU: is a step right, what does it cost, is it fed.

    python -m benchmarks.gpu [PART…] [--rounds R] [--minutes M] [--small] [--out FOLDER]

Runs on a bare machine without network: Python 3.11 or 3.12, torch 2.11 or newer, NumPy, Pillow,
pyarrow, safetensors, and the wheels of simplejpeg, tyro (with docstring_parser and typeguard),
webdataset (with braceexpand) and botocore (with jmespath); no Ray, no MLflow. The parts that decide
come first. Each row is appended to a file as it is had and each part's result written at its end,
so a run that is cut keeps what it measured; after --minutes no further row is begun. --small is a
trial that runs on a CPU too; its figures mean nothing, and it writes no file unless --out says
where.
"""

import argparse
import dataclasses
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from alexnet.errors import UserError
from benchmarks import gpu_feed, gpu_steps, results
from benchmarks.gpu_steps import FULL, SMALL, Part, Scale
from benchmarks.table import machine
from pipelines import command

PARTS: dict[str, Callable[[torch.device, Scale, Path], Part]] = {
    "limits": gpu_steps.limits,
    "exact": gpu_steps.exact,
    "waits": gpu_feed.waits,
    "feed": gpu_feed.feed,
    "steps": gpu_steps.steps,
    "kernels": gpu_steps.kernels,
    "decoders": gpu_feed.decoders,
}


def main(argv: list[str] | None = None) -> int:
    return command.answered(lambda: _measured(_parsed(argv)))


def _measured(arguments: argparse.Namespace) -> int:
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.small:
        raise UserError("torch finds no CUDA device; --small tries it on the CPU")
    device = torch.device("cuda" if cuda else "cpu")
    scale = dataclasses.replace(SMALL if arguments.small else FULL, rounds=arguments.rounds)
    folder = arguments.out or (None if arguments.small else results.FOLDER)
    deadline = time.monotonic() + 60 * arguments.minutes
    for name in arguments.parts or PARTS:
        _part(name, device, scale, folder, deadline, arguments)
    return 0


def _part(
    name: str,
    device: torch.device,
    scale: Scale,
    folder: Path | None,
    deadline: float,
    arguments: argparse.Namespace,
) -> None:
    before = machine(torch.cuda.get_device_name() if device.type == "cuda" else "no GPU")
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        part = PARTS[name](device, scale, Path(scratch))
        print(f"## gpu-{name}\n\n{before}\n\n{part.setting}\n\n{_line(part.columns)}", flush=True)
        for row in part.rows:
            rows.append(row)
            print(_line(row), flush=True)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / f"gpu-{name}.rows").open("a") as file:
                    print(_line(row), file=file)
            if time.monotonic() > deadline:
                print(f"--minutes {arguments.minutes:g} are over: no further row", file=sys.stderr)
                break
    if folder is not None and rows:
        words = ["python", "-m", "benchmarks.gpu", name, "--rounds", str(scale.rounds)]
        again = shlex.join([*words, *(["--small"] if arguments.small else [])])
        path, _ = results.write(f"gpu-{name}", part.table(rows), before, again, folder)
        (folder / f"gpu-{name}.rows").unlink()
        print(path)
    print(f"gpu-{name}: {time.monotonic() - began:.0f} s\n", flush=True)


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9, help="begin no row after so many (9)")
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
