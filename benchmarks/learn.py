"""Claim: the recipes learn real images. Whole runs of `training.loop.fit` on a shard set.

    python -m benchmarks.learn SHARDS [CASE…] [--minutes M] [--out FOLDER]

No Ray, no MLflow; a GPU where there is one. After --minutes no further run is begun. A row is
printed as soon as it is had.
"""

import argparse
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.table import Lines, Panel, Table, machine
from pipelines import command
from pipelines.shards import Manifest, load_manifest
from training.accuracy import wilson
from training.config import TrainConfig
from training.loop import Place, TrainingStopped, fit
from training.network import build_model
from training.recipes import RECIPES

COLUMNS = (
    "run",
    "parameters",
    "batch",
    "lr",
    "epochs",
    "val top-1 [95 %]",
    "val loss",
    "seconds",
    "img/s, all in",
)


def _small(
    recipe: str, width: float = 1.0, seed: int = 0, crop: Any = "auto", **optim: Any
) -> TrainConfig:
    config = RECIPES[recipe]()
    return dataclasses.replace(
        config,
        seed=seed,
        model=dataclasses.replace(config.model, width=width),
        optim=dataclasses.replace(config.optim, **optim),
        augment=dataclasses.replace(config.augment, crop=crop),
        compile=False,  # a set of ten thousand images is learned before a compiler is done
        checkpoint_minutes=None,
    )


# Of about ten thousand images, where a recipe's batch would leave few steps.
CASES: dict[str, Callable[[], TrainConfig]] = {
    "baseline": partial(_small, "baseline"),
    "baseline, batch 64": partial(
        _small, "baseline", crop="resized", batch_size=64, lr=0.01, epochs=40
    ),
    "paper": partial(_small, "paper"),
    "fast": partial(_small, "fast", crop="resized", batch_size=256),
    "fast, half the width": partial(_small, "fast", 0.5, crop="resized", batch_size=256),
    **{
        f"fast, a quarter of the width, seed {seed}": partial(
            _small, "fast", 0.25, seed, "resized", batch_size=256
        )
        for seed in range(3)
    },
    **{
        f"baseline, a quarter of the width, seed {seed}": partial(
            _small, "baseline", 0.25, seed, "resized", batch_size=64, lr=0.01, epochs=40
        )
        for seed in range(3)
    },
}


def main(argv: list[str] | None = None) -> int:
    return command.answered(lambda: _measured(_parsed(argv)))


def _measured(arguments: argparse.Namespace) -> int:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    before = machine(torch.cuda.get_device_name() if cuda else "")
    manifest = load_manifest(arguments.data)
    rows: list[tuple[str, ...]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    deadline = time.monotonic() + 60 * arguments.minutes
    print(f"{before}\n| {' | '.join(COLUMNS)} |", flush=True)
    for case in arguments.cases or CASES:
        if time.monotonic() > deadline:
            print(f"--minutes {arguments.minutes:g} are over: no further run", file=sys.stderr)
            break
        curves[case] = []
        rows.append(_row(case, CASES[case](), arguments.data, manifest, device, curves[case]))
        print(f"| {' | '.join(rows[-1])} |", flush=True)
    if arguments.out is not None and rows:
        words = ["python", "-m", "benchmarks.learn", "SHARDS", *arguments.cases]
        panel = Panel("epoch", "val error", curves)
        table = Table(
            COLUMNS, tuple(rows), _setting(manifest), Lines("val error by epoch", [panel])
        )
        print(results.write("learn", table, before, shlex.join(words), arguments.out)[0])
    return 0


def _row(
    case: str,
    config: TrainConfig,
    data: str,
    manifest: Manifest,
    device: torch.device,
    curve: list[tuple[float, float]],
) -> tuple[str, ...]:
    began, threads = time.monotonic(), max(1, (os.cpu_count() or 1) - 2)
    last: dict[str, float] = {}

    def log(metrics: dict[str, float], step: int) -> None:
        if "val_top1" in metrics:
            last.update(metrics)
            curve.append((metrics["epoch"], 1 - metrics["val_top1"]))

    torch.set_num_threads(1 if device.type == "cuda" else os.cpu_count() or 1)
    parameters = sum(p.numel() for p in build_model(config, manifest.num_classes).parameters())
    optim = config.optim
    said = (case, f"{parameters:,}", str(optim.batch_size), f"{optim.lr:g}")
    try:
        fit(config, data, manifest, Place(device, threads=threads), log=log, report=lambda *_: None)
    except TrainingStopped as error:
        return (*said, f"{optim.epochs}", f"stopped: {str(error)[:100]}", "–", "–", "–")
    seconds, images = time.monotonic() - began, int(last["val_images"])
    low, high = wilson(round(last["val_top1"] * images), images)
    return (
        *said,
        f"{last['epoch']:.0f} of {optim.epochs}",
        f"{last['val_top1']:.3f} [{low:.3f}..{high:.3f}]",
        f"{last['val_loss']:.3f}",
        f"{seconds:.0f}",
        f"{last['epoch'] * manifest.num_samples('train') / seconds:,.0f}",
    )


def _setting(manifest: Manifest) -> str:
    return (
        f"{manifest.num_samples('train'):,} train and {manifest.num_samples('val'):,} val images "
        f"of {manifest.num_classes} classes, stored at {manifest.crop} px and quality "
        f"{manifest.quality}; trained from scratch, not compiled; val top-1 of the centre view, "
        "each image once, at the end, with its 95 % Wilson interval. All in: with the evaluation "
        "after each epoch."
    )


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser("python -m benchmarks.learn", description=__doc__)
    parser.add_argument("data", metavar="SHARDS")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so many")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the result and its curves")
    arguments = parser.parse_args(argv)
    for case in arguments.cases:
        if case not in CASES:
            parser.error(f"no case {case!r}; there are {'; '.join(CASES)}")
    return arguments


if __name__ == "__main__":
    command.begin()
    command.leave(main)
