"""Measurements, each for one claim; README.md beside this file says what they are.

    python -m benchmarks [NAME…] [--rounds R] [--small] [--out FOLDER]

Without names all of them run. Results go to benchmarks/results/NAME_HARDWARE_DATE-TIME.md, with a
chart.
One that fails is told, and the others go on. --small is a trial of seconds to minutes whose figures
mean nothing, and which writes no file unless --out says where.
"""

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    builder,
    grown_workers,
    growth,
    images,
    inputs,
    loader,
    processes,
    recipes,
    resize,
    results,
    summary,
    task,
    train,
)
from benchmarks.table import Table, machine
from pipelines import command

SCRIPTS: dict[str, Callable[..., Table]] = {
    "resize": resize.run,
    "task": task.run,
    "builder": builder.run,
    "inputs": inputs.run,
    "loader": loader.run,
    "train": train.run,
    "recipes": recipes.run,
    "growth": growth.run,
}
SMALL: dict[str, dict[str, Any]] = {
    "builder": {"count": 12},
    "inputs": {"count": 12},
    "loader": {"samples": 64, "batch": 8},
    "train": {"steps": 2, "batch": 4, "classes": 5, "width": 0.1},
    "recipes": {"batch_size": 2, "classes": 3, "recipes": ("smoke",)},
    "growth": {
        "images": (100, 300),
        "shards": (2, 20),
        "classes": (2, 10),
        "middle": 300,
        "versions": (2, 6),
        "workers": grown_workers.Sizes(250, batch=4, steps=1, classes=5, width=0.1),
    },
}
_SMALL_IMAGES = 12


def main(argv: list[str] | None = None) -> int:
    return command.answered(lambda: _measured(_parsed(argv)))


def _measured(arguments: argparse.Namespace) -> int:
    if arguments.out is None and not arguments.small:
        results.refuse_uncommitted()
    raw = images.load(_SMALL_IMAGES) if arguments.small else images.load()
    print(f"images: {raw.origin}\n", flush=True)
    names, ended, failed = arguments.names or list(SCRIPTS), [], 0
    for name in names:
        chosen = SMALL.get(name, {}) if arguments.small else {}
        if arguments.rounds is not None:
            chosen = chosen | {"rounds": arguments.rounds}
        elif arguments.small:
            chosen = chosen | {"rounds": 1}
        before, began = machine(), time.monotonic()
        try:
            table = functools.partial(SCRIPTS[name], raw)(**chosen)
        except (processes.Failed, AssertionError) as error:  # the others are worth having
            print(f"error: {name} was not measured: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        print(f"## {name}\n\n{before}\n\n{table.markdown()}\n", flush=True)
        if arguments.out is not None or not arguments.small:
            again = shlex.join(["python", "-m", "benchmarks", *_words(name, arguments)])
            folder = arguments.out or results.FOLDER
            path, moved = results.write(name, table, before, again, folder)
            print(f"{path}\n", flush=True)
            ended += [f"{path.name}: {line}" for line in moved]
        print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes\n", flush=True)
    if arguments.out is not None or not arguments.small:
        _end(ended, names, arguments.out or results.FOLDER)
    return 1 if failed else 0


def _end(moved: list[str], names: list[str], folder: Path) -> None:
    lines = moved or ["nothing, or there was no result before"]
    aims = list(summary.told(folder, names))
    print("\n".join(["What moved:", *lines, "", "Aims:", *aims]))
    print("\nThe table of README.md: python -m benchmarks.summary --write", flush=True)


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--rounds", type=int, help="5 to 15 by default, 1 with --small")
    parser.add_argument("--small", action="store_true", help="a trial; its figures mean nothing")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the results")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in SCRIPTS:
            parser.error(f"no benchmark {name!r}; there are {', '.join(SCRIPTS)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} must be at least 1")
    return arguments


def _words(name: str, arguments: argparse.Namespace) -> list[str]:
    rounds = [] if arguments.rounds is None else ["--rounds", str(arguments.rounds)]
    return [name, *rounds, *(["--small"] if arguments.small else [])]


if __name__ == "__main__":
    command.begin()
    command.leave(main)
