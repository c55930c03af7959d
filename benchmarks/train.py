"""Claim: Ray Train and our loop cost next to nothing beside a bare PyTorch loop's step.

Network, batch, precision and optimizer are the same, pictures are random and resident, nothing is
augmented but where said. Each run is a process of its own on all CPUs.
"""

import functools
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks import processes
from benchmarks.fit_loop import PLAIN, line_seconds
from benchmarks.pictures import Raw, stored, write_shards
from benchmarks.table import Bars, Table, spread
from benchmarks.turns import in_turns, ratios
from training.config import TrainConfig

COLUMNS = (
    "training step",
    "img/s",
    "ratio",
    "a log line, ms",
    "GFLOP per picture",
    "the rest of the process, s",
)
BARE = "bare PyTorch loop"
FIT = "training.loop.fit, no Ray"
AUGMENTED = "the same with the recipe's augmentation"
OURS = "training/run.py, through Ray Train and MLflow"
_RUN = "bench"
_LINE_EVERY = TrainConfig.log_steps


@dataclass(frozen=True)
class Steps:
    """seconds: of a step, the median; line: of what a log line takes between two steps; gflop: what
    the process says that a picture needs; others: seconds of the process that were no timed step.
    """

    seconds: float
    line: float
    gflop: str
    others: float


def run(
    raw: Raw,
    rounds: int = 5,
    steps: int = 6,
    batch: int = 64,
    classes: int = 1000,
    width: float = 1.0,
) -> Table:
    request = {
        "batch": batch,
        "steps": steps,
        "classes": classes,
        "width": width,
        "threads": len(processes.cpus()),
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        uri = write_shards(
            Path(folder) / "shards",
            stored(raw, 227),
            crop=227,
            train=(steps + 3) * batch,
            classes=classes,
            per_shard=500,
        )
        measured = in_turns(contenders(request | {"shards": uri}, Path(folder)), rounds)
    refuse_unequal(measured)
    rates = {
        name: [batch / (step.seconds + step.line / _LINE_EVERY) for step in got]
        for name, got in measured.items()
    }
    rows = tuple(_row(name, measured[name], rates) for name in measured)
    chart = Bars("training steps, img/s", rates)
    return Table(COLUMNS, rows, _setting(request, rounds), chart)


def contenders(request: dict[str, Any], folder: Path) -> dict[str, Callable[[int], Steps]]:
    return {
        BARE: functools.partial(_module, "bare_loop", request),
        FIT: functools.partial(_module, "fit_loop", request | {"augment": False}),
        AUGMENTED: functools.partial(_module, "fit_loop", request | {"augment": True}),
        OURS: functools.partial(_command, request, folder),
    }


def refuse_unequal(measured: dict[str, list[Steps]]) -> None:
    found = {name: {step.gflop for step in steps} for name, steps in measured.items()}
    assert len(set().union(*found.values())) == 1, f"the networks differ: {found}"


def _module(name: str, request: dict[str, Any], _: int) -> Steps:
    done = processes.ask_ours(name, request, on=processes.cpus())
    answer = done.answer()
    others = done.wall_seconds - answer["seconds"] * request["steps"]
    return Steps(answer["seconds"], answer.get("line", 0.0), f"{answer['gflop']:.2f}", others)


def _command(request: dict[str, Any], folder: Path, number: int) -> Steps:
    home = folder / f"home{number}"
    flags = {
        "--data": request["shards"],
        "--name": _RUN,
        "--synthetic": True,
        "--optim.batch-size": request["batch"],
        "--optim.epochs": 1,
        "--optim.warmup-epochs": 0,
        "--model.width": request["width"],
        "--augment.crop": PLAIN.crop,
        "--augment.flip": PLAIN.flip,
        "--augment.colour-sigma": PLAIN.colour_sigma,
        "--log-steps": 1,
        "--flat-loss-steps": 0,
        "--device": "cpu",
        "--cpus-per-worker": request["threads"],
    }
    words = [str(word) for flag in flags.items() for word in flag]
    settings = {"ALEXNET_HOME": str(home)}
    command = [sys.executable, "training/run.py", "deck", *words]
    done = processes.run(command, on=processes.cpus(), settings=settings)
    seconds, logged = _logged(home, request)
    told = re.search(r"([\d.]+) GFLOP per picture", done.stdout + done.stderr)
    assert told is not None, "the loop says what a picture needs"
    step = statistics.median(seconds[2:])
    others = done.wall_seconds - step * request["steps"]
    return Steps(step, line_seconds(logged, seconds), told[1], others)


def _logged(home: Path, request: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of each step, two that warm up and those that are timed, and when they were logged,
    by what MLflow has of them."""
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiments = [found.experiment_id for found in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{_RUN}'")
    history = client.get_metric_history(run.info.run_id, "images_per_second")
    steps = sorted(history, key=lambda metric: metric.step)[: request["steps"] + 2]
    assert len(steps) == request["steps"] + 2, f"{len(steps)} steps were logged"
    seconds = [request["batch"] / metric.value for metric in steps]
    return seconds, [metric.timestamp / 1000 for metric in steps]


def _row(name: str, steps: list[Steps], rates: dict[str, list[float]]) -> tuple[str, ...]:
    return (
        f"**`{name}`**" if name == OURS else name,
        spread(rates[name], 1),
        spread(ratios(rates[name], rates[BARE]), 3),
        "–" if name == BARE else spread([1000 * step.line for step in steps], 1),
        steps[0].gflop,
        spread([step.others for step in steps], 1),
    )


def _setting(request: dict[str, Any], rounds: int) -> str:
    return (
        f"Recipe deck, width {request['width']}, {request['classes']} classes, batch "
        f"{request['batch']}, bf16 autocast, channels-last, fused SGD with momentum; random "
        f"pictures in memory; {request['threads']} threads; median of {request['steps']} steps "
        f"after two that warm up, in a fresh process, with the share of a log line every "
        f"{_LINE_EVERY} steps; {rounds} rounds in alternating order, median [lowest..highest], "
        "ratios within a round. The rest: imports, start of Ray, store of "
        "MLflow, initialisation, warm-up, evaluation and checkpoint, where the contender has them."
    )
