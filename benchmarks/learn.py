"""Claim: the recipes learn real images. Whole runs of `training.loop.fit` on a shard set.

    python -m benchmarks.learn SHARDS [CASE…] [--shuffled SHARDS] [--threads N] [--out FOLDER]

No Ray, no MLflow; a GPU where there is one. A row is printed as soon as it is had. With --out,
FOLDER/learn.jsonl holds the whole curve of every finished run, which is then not run again; several
processes may fill it.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alexnet.errors import UserError
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
    "precision",
    "epochs",
    "val top-1 [95 %]",
    "val loss",
    "minutes",
    "core minutes",
)
SHUFFLED = "fast, a quarter of the width, labels shuffled"
_KEPT = ("epoch", "val_top1", "val_top5", "val_loss", "train_loss")


def _small(recipe: str, width: float = 1.0, seed: int = 0, **optim: Any) -> TrainConfig:
    """A recipe for about ten thousand images, where its own batch would leave few steps."""
    config = RECIPES[recipe]()
    return dataclasses.replace(
        config,
        seed=seed,
        model=dataclasses.replace(config.model, width=width),
        optim=dataclasses.replace(config.optim, **optim),
        augment=dataclasses.replace(config.augment, crop="resized"),
        compile=False,  # a set of ten thousand images is learned before a compiler is done
        checkpoint_minutes=None,
        cache="decoded",
    )


_baseline = partial(_small, "baseline", batch_size=64, lr=0.01)
_fast = partial(_small, "fast", batch_size=256)
CASES: dict[str, Callable[[], TrainConfig]] = {
    "baseline": partial(_baseline, epochs=28),
    **{
        f"baseline, a quarter of the width, seed {seed}": partial(_baseline, 0.25, seed, epochs=28)
        for seed in range(3)
    },
    "fast": partial(_fast, epochs=20),
    "fast, half the width": partial(_fast, 0.5, epochs=24),
    "fast, half the width, 48 epochs": partial(_fast, 0.5, epochs=48),
    **{
        f"fast, a quarter of the width, seed {seed}": partial(_fast, 0.25, seed, epochs=16)
        for seed in range(3)
    },
    SHUFFLED: partial(_fast, 0.25, epochs=8),
    "paper, half the width": partial(_small, "paper", 0.5, epochs=30),
    "baseline as it stands": RECIPES["baseline"],
    "paper as it stands": RECIPES["paper"],
}


def main(argv: list[str] | None = None) -> int:
    return command.answered(lambda: _measured(_parsed(argv)))


def _measured(arguments: argparse.Namespace) -> int:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    before = machine(torch.cuda.get_device_name() if cuda else "")
    torch.set_num_threads(1 if cuda else arguments.threads)
    place = Place(device, threads=arguments.threads)
    manifest = load_manifest(arguments.data)
    kept = arguments.out / "learn.jsonl" if arguments.out else None
    runs = {run["case"]: run for run in _read(kept)}
    print(f"{before}\n| {' | '.join(COLUMNS)} |", flush=True)
    for case in arguments.cases or CASES:
        data = arguments.data
        if case == SHUFFLED:
            if arguments.shuffled is None and not arguments.cases:
                continue
            data = _shuffled(arguments.shuffled, manifest)
        if case not in runs:
            runs[case] = _run(case, data, place, arguments.precision)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with kept.open("a") as file:
                    file.write(json.dumps(runs[case]) + "\n")
        print(f"| {' | '.join(_row(runs[case]))} |", flush=True)
    if kept is not None:
        words = ["python", "-m", "benchmarks.learn", "SHARDS", *arguments.cases]
        done = {run["case"]: run for run in _read(kept)}
        rows = tuple(_row(done[case]) for case in CASES if case in done)
        table = Table(COLUMNS, rows, _setting(manifest), _curves(done))
        print(results.write("learn", table, before, shlex.join(words), arguments.out)[0])
    return 0


def _read(kept: Path | None) -> list[dict[str, Any]]:
    if kept is None or not kept.exists():
        return []
    return [json.loads(line) for line in kept.read_text().splitlines()]


def _shuffled(data: str | None, manifest: Manifest) -> str:
    """Raises UserError for a control whose labels are not other labels of the same classes."""
    if data is None:
        raise UserError(f"{SHUFFLED!r} needs --shuffled, shards of benchmarks.shuffled's folder")
    control = load_manifest(data)
    if control.digest == manifest.digest or control.num_classes != manifest.num_classes:
        raise UserError(f"--shuffled {data} does not hold SHARDS' images under other labels")
    return data


def _run(case: str, data: str, place: Place, precision: str | None) -> dict[str, Any]:
    """One training: its settings and what each evaluation found, ready for JSON."""
    config, manifest = CASES[case](), load_manifest(data)
    config = dataclasses.replace(config, precision=precision or config.precision)
    began, cpu = time.monotonic(), time.process_time()
    curve: list[dict[str, float]] = []
    run = {
        "case": case,
        "recipe": config.recipe,
        "parameters": sum(
            p.numel() for p in build_model(config, manifest.num_classes).parameters()
        ),
        "batch": config.optim.batch_size,
        "lr": config.optim.lr,
        "precision": config.precision,
        "epochs": config.optim.epochs,
        "val_images": manifest.num_samples("val"),
        "stopped": "",
    }

    def log(metrics: dict[str, float], step: int) -> None:
        if "val_top1" in metrics:
            curve.append({key: metrics[key] for key in _KEPT if key in metrics})
            run.update(seconds=time.monotonic() - began, cpu_seconds=time.process_time() - cpu)
            done, left = metrics["epoch"], config.optim.epochs - metrics["epoch"]
            minutes = left * (time.monotonic() - began) / done / 60
            print(
                f"{case}: epoch {done:.0f} of {config.optim.epochs}, val top-1 "
                f"{metrics['val_top1']:.3f}, {minutes:.0f} min left",
                file=sys.stderr,
                flush=True,
            )

    try:
        fit(config, data, manifest, place, log=log, report=lambda *_: None)
    except TrainingStopped as error:
        run["stopped"] = str(error)
    return {**run, "curve": curve}


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    said = (run["case"], f"{run['parameters']:,}", f"{run['batch']}", f"{run['lr']:g}")
    said = (*said, run["precision"])
    if not run["curve"]:
        return (*said, f"{run['epochs']}", f"stopped: {run['stopped'][:100]}", "–", "–", "–")
    last = run["curve"][-1]
    low, high = wilson(round(last["val_top1"] * run["val_images"]), run["val_images"])
    return (
        *said,
        f"{last['epoch']:.0f}" + (f" of {run['epochs']}" if run["stopped"] else ""),
        f"{last['val_top1']:.3f} [{low:.3f}..{high:.3f}]",
        f"{last['val_loss']:.3f}",
        f"{run['seconds'] / 60:.1f}",
        f"{run['cpu_seconds'] / 60:.1f}",
    )


def _curves(runs: dict[str, dict[str, Any]]) -> Lines:
    """A panel for each recipe."""
    recipes = dict.fromkeys(runs[case]["recipe"] for case in CASES if case in runs)
    return Lines("val top-1 by epoch", [_panel(recipe, runs.values()) for recipe in recipes])


def _panel(recipe: str, runs: Iterable[dict[str, Any]]) -> Panel:
    lines = {
        run["case"]: [(point["epoch"], point["val_top1"]) for point in run["curve"]]
        for run in runs
        if run["recipe"] == recipe and run["curve"]
    }
    return Panel("epoch", "val top-1", lines, share=True)


def _setting(manifest: Manifest) -> str:
    return (
        f"{manifest.num_samples('train'):,} train and {manifest.num_samples('val'):,} val images "
        f"of {manifest.num_classes} classes, stored at {manifest.crop} px and quality "
        f"{manifest.quality}; trained from scratch, not compiled; val top-1 of the centre view, "
        "each image once, after the last epoch, with its 95 % Wilson interval. Minutes are wall "
        "time, with the evaluation after each epoch and beside whatever else ran; core minutes are "
        "the CPU time of the process."
    )


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser("python -m benchmarks.learn", description=__doc__)
    parser.add_argument("data", metavar="SHARDS")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(CASES))
    parser.add_argument(
        "--shuffled", metavar="SHARDS", help="the control's, of benchmarks.shuffled"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), help="the recipe's by default"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the result and its curves")
    arguments = parser.parse_args(argv)
    for case in arguments.cases:
        if case not in CASES:
            parser.error(f"no case {case!r}; there are {'; '.join(CASES)}")
    return arguments


if __name__ == "__main__":
    command.begin()
    command.leave(main)
