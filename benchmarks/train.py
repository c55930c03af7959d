"""Claim: what Ray Train and our loop cost beside the steps of a bare PyTorch loop.

Network, batch, precision and optimizer are the same, images are random and resident, nothing is
augmented: that is in recipes.py. Each run is a process of its own on all CPUs.
"""

import functools
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from benchmarks import processes, submitted
from benchmarks.fit_loop import LR, PLAIN, line_seconds
from benchmarks.images import Raw, stored, write_shards
from benchmarks.table import Bars, Table, spread
from benchmarks.turns import in_turns, ratios
from training.config import TrainConfig
from training.driver import worker_settings
from training.metrics import points
from training.tracking import EXPERIMENT

COLUMNS = (
    "training step",
    "img/s",
    "ratio",
    "a log line, ms",
    "GFLOP per image",
    "the rest of the process, s",
)
BARE = "bare PyTorch loop"
TUNED = "the same with the memory settings of run.py's workers"
FIT = "training.loop.fit, no Ray"
OURS = "training/run.py, through Ray Train and MLflow"
_RUN = "bench"
_JOBS = 3  # submitted, for the time until their first step
_LINE_EVERY = TrainConfig.log_steps


@dataclass(frozen=True)
class Steps:
    """seconds: of a step, the mean; line: of what a log line takes between two steps; gflop: what
    the process says that an image needs; others: seconds of the process that were no timed step.
    """

    seconds: float
    line: float
    gflop: str
    others: float
    phases: dict[str, float] = field(default_factory=dict)  # seconds, of the command alone


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
            train=2 * (steps + 2) * batch,
            classes=classes,
            per_shard=500,
        )
        asked = request | {"shards": uri}
        measured = in_turns(contenders(asked, Path(folder)), rounds)
        waits = [_first_step(asked, Path(folder) / f"job{n}") for n in range(min(rounds, _JOBS))]
    refuse_unequal(measured)
    rates = {
        name: [batch / (step.seconds + step.line / _LINE_EVERY) for step in got]
        for name, got in measured.items()
    }
    rows = tuple(_row(name, measured[name], rates) for name in measured)
    chart = Bars("training steps, img/s", rates)
    setting = (
        f"{_setting(request, rounds)} {_start(measured[OURS])} From `ray job submit` to the end "
        f"of the first step, on a Ray that is there, s: {spread(waits, 1)} ({len(waits)} jobs)."
    )
    return Table(COLUMNS, rows, setting, chart)


def contenders(request: dict[str, Any], folder: Path) -> dict[str, Callable[[int], Steps]]:
    memory = worker_settings(use_gpu=False)
    return {
        BARE: functools.partial(_module, "bare_loop", request, {}),
        TUNED: functools.partial(_module, "bare_loop", request, memory),
        FIT: functools.partial(_module, "fit_loop", request, memory),
        OURS: functools.partial(_command, request, folder),
    }


def refuse_unequal(measured: dict[str, list[Steps]]) -> None:
    found = {name: {step.gflop for step in steps} for name, steps in measured.items()}
    assert len(set().union(*found.values())) == 1, f"the networks differ: {found}"


def _module(name: str, request: dict[str, Any], memory: dict[str, str], _: int) -> Steps:
    command = [sys.executable, "-m", f"benchmarks.{name}", json.dumps(request)]
    done = processes.run(command, on=processes.cpus(), settings=memory)
    answer = done.answer()
    others = done.wall_seconds - answer["seconds"] * request["steps"]
    return Steps(answer["seconds"], answer.get("line", 0.0), f"{answer['gflop']:.2f}", others)


def _command(request: dict[str, Any], folder: Path, number: int) -> Steps:
    """Two log lines: the steps before the first warm up, those before the second are timed, beside
    what MLflow still does for the first."""
    home, steps = folder / f"home{number}", request["steps"] + 2
    flags = _flags(request, steps)
    words = [str(word) for flag in flags.items() for word in flag]
    settings = {"ALEXNET_HOME": str(home)}
    command = [sys.executable, "training/run.py", "baseline", *words]
    began = time.time()
    done = processes.run(command, on=processes.cpus(), settings=settings)
    seconds, logged, phases = _logged(home, request, began, time.time())
    told = re.search(r"([\d.]+) GFLOP per image", done.stdout + done.stderr)
    assert told is not None, "the loop says what an image needs"
    line = line_seconds(logged, [steps * each for each in seconds])
    return Steps(seconds[1], line, told[1], done.wall_seconds - steps * seconds[1], phases)


def _first_step(request: dict[str, Any], home: Path) -> float:
    """Seconds from `ray job submit` on."""
    flags = _flags(request, steps=1)
    words = [str(word) for flag in flags.items() for word in flag]
    began = submitted.run(["baseline", *words], home)
    return _history(home)[2][0].timestamp / 1000 - began


def _flags(request: dict[str, Any], steps: int) -> dict[str, Any]:
    return {
        "--data": request["shards"],
        "--name": _RUN,
        "--synthetic": True,
        "--optim.batch-size": request["batch"],
        "--optim.lr": LR,
        "--optim.epochs": 1,
        "--optim.warmup-epochs": 0,
        "--model.width": request["width"],
        "--augment.crop": PLAIN.crop,
        "--augment.flip": PLAIN.flip,
        "--augment.colour-sigma": PLAIN.colour_sigma,
        "--log-steps": steps,
        "--flat-loss-steps": 0,
        "--device": "cpu",
        "--cpus-per-worker": request["threads"],
    }


def _logged(
    home: Path, request: dict[str, Any], began: float, ended: float
) -> tuple[list[float], list[float], dict[str, float]]:
    """Seconds of a step before each of two log lines; when these were made; and seconds from one
    event to the next in the life of the command: by what MLflow has of it."""
    client, run, lines = _history(home)
    assert len(lines) == 2, f"{len(lines)} lines were logged"
    (workers,) = points(client, run.info.run_id, "workers")
    experiment = client.get_experiment(run.info.experiment_id)
    events = {
        "start of the process": began,
        "imports and MLflow's new store": experiment.creation_time / 1000,
        "Ray's start": run.info.start_time / 1000,
        "the worker's start with its imports": workers.timestamp / 1000,
        "network and the first half of the steps": lines[0].timestamp / 1000,
        "the second half": lines[1].timestamp / 1000,
        "evaluation, checkpoint and end": ended,
    }
    gaps = itertools.pairwise(events.values())
    phases = dict(zip(list(events)[1:], (after - before for before, after in gaps), strict=True))
    seconds = [request["batch"] / metric.value for metric in lines]
    return seconds, [metric.timestamp / 1000 for metric in lines], phases


def _history(home: Path) -> tuple[MlflowClient, Run, list[Metric]]:
    """The run in the store of `home`, and the rate of its steps at each log line."""
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{_RUN}'")
    history = points(client, run.info.run_id, "step_images_per_second")
    return client, run, sorted(history, key=lambda metric: metric.step)


def _row(name: str, steps: list[Steps], rates: dict[str, list[float]]) -> tuple[str, ...]:
    return (
        f"**`{name}`**" if name == OURS else name,
        spread(rates[name], 1),
        spread(ratios(rates[name], rates[BARE]), 3),
        "–" if name in (BARE, TUNED) else spread([1000 * step.line for step in steps], 1),
        steps[0].gflop,
        spread([step.others for step in steps], 1),
    )


def _start(commands: list[Steps]) -> str:
    """Where the seconds of the command go."""
    spreads = {name: spread([c.phases[name] for c in commands], 1) for name in commands[0].phases}
    told = ", ".join(f"{name} {seconds}" for name, seconds in spreads.items())
    return f"Life of `{OURS.partition(',')[0]}`, s: {told}."


def _setting(request: dict[str, Any], rounds: int) -> str:
    return (
        f"Recipe baseline, width {request['width']}, {request['classes']} classes, batch "
        f"{request['batch']}, bf16 autocast, channels-last, fused SGD with momentum; random "
        f"images in memory; {request['threads']} threads; mean of {request['steps']} steps "
        f"after two that warm up, with Ray of {request['steps'] + 2} after as many, in a fresh "
        "process, all but the first row with those memory settings, with the share of a log line "
        f"every {_LINE_EVERY} steps; {rounds} rounds in alternating order, median "
        "[lowest..highest], ratios within a round. The rest: imports, start of Ray, store of "
        "MLflow, initialisation, warm-up, evaluation and checkpoint, where the contender has them."
    )
