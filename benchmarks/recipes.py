"""Claim: what a training step costs, for each recipe, through the very code that trains."""

import contextlib
import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.fit_loop import Enough, never
from benchmarks.images import Raw, stored, write_shards
from benchmarks.table import Bars, Table, spread
from pipelines.shards import load_manifest
from training.config import TrainConfig
from training.loop import Place, fit
from training.meter import log_line
from training.network import build_model
from training.recipes import RECIPES

COLUMNS = (
    "recipe",
    "device",
    "batch",
    "precision",
    "parameters",
    "data",
    "img/s",
    "utilization",
    "MFU",
)


def run(
    raw: Raw,
    rounds: int = 5,
    batch_size: int = 64,
    classes: int = 1000,
    recipes: tuple[str, ...] = tuple(RECIPES),
    threads: int = os.cpu_count() or 1,
) -> Table:
    """`rounds` timed steps per recipe after two that warm up; batch_size counts on CPUs alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[tuple[str, ...]] = []
    rates: dict[str, list[float]] = {}
    try:
        for place in _places(threads):
            for name, synthetic in itertools.product(recipes, (False, True)):
                config = dataclasses.replace(RECIPES[name](), synthetic=synthetic)
                if place.device.type == "cpu":
                    optim = dataclasses.replace(config.optim, batch_size=batch_size)
                    config = dataclasses.replace(config, optim=optim)
                timed = _steps(raw, config, place, rounds, classes)
                row = _row(config, place, timed, classes)
                rows.append(row)
                recipe, device, *_, data, _, _, _ = row
                rates[f"{recipe}, {device}, {data}"] = _rates(timed)
    finally:
        torch.set_num_threads(before)
    setting = (
        f"{classes} classes; forward, backward and SGD step with decoding and augmentation of the "
        f"recipe; {threads} threads; {rounds} timed steps in one process, median "
        "[lowest..highest]. On CPUs the batch is not the recipe's. Resident data is --synthetic. "
        "Utilization is the lowest, MFU (on GPUs) the median against a matrix product."
    )
    return Table(COLUMNS, tuple(rows), setting, Bars("training steps by recipe, img/s", rates))


def _places(threads: int) -> Iterator[Place]:
    yield Place(torch.device("cpu"), threads=threads)
    if torch.cuda.is_available():
        yield Place(torch.device("cuda"), threads=threads)


def _steps(
    raw: Raw, config: TrainConfig, place: Place, steps: int, classes: int
) -> list[dict[str, float]]:
    """What the loop logs of each timed step."""
    # A new optimiser allocates its momentum in the first step, so that two of them warm up.
    seen: list[dict[str, float]] = []

    def log(metrics: dict[str, float], step: int) -> None:
        seen.append(metrics)
        print(log_line(metrics, step), file=sys.stderr, flush=True)
        if len(seen) == steps + 2:
            raise Enough

    config = dataclasses.replace(config, log_steps=1, flat_loss_steps=0)
    crop = 256 if config.augment.crop == "random" else 227
    with tempfile.TemporaryDirectory() as folder:
        uri = write_shards(
            Path(folder),
            stored(raw, crop),
            crop=crop,
            train=(steps + 3) * config.optim.batch_size,
            classes=classes,
            per_shard=500,
        )
        with contextlib.suppress(Enough):
            fit(config, uri, load_manifest(uri), place, log=log, report=never)
    return seen[2:]


def _row(
    config: TrainConfig, place: Place, timed: list[dict[str, float]], classes: int
) -> tuple[str, ...]:
    model = build_model(config, classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        config.recipe,
        _device(place),
        str(config.optim.batch_size),
        config.precision,
        f"{parameters:,}",
        "resident" if config.synthetic else "shards",
        spread(_rates(timed), 1),
        _share(timed, "utilization", min),
        _share(timed, "mfu", statistics.median),
    )


def _share(timed: list[dict[str, float]], name: str, of: Callable[[list[float]], float]) -> str:
    shares = [metrics[name] for metrics in timed if name in metrics]
    return f"{of(shares):.0%}" if shares else "–"


def _rates(timed: list[dict[str, float]]) -> list[float]:
    return [metrics["step_images_per_second"] for metrics in timed]


def _device(place: Place) -> str:
    if place.device.type == "cpu":
        return f"CPU, {place.threads} threads"
    return torch.cuda.get_device_name(place.device)
