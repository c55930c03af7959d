"""`training.loop.fit` without Ray and MLflow, for the benchmark of training steps.

python -m benchmarks.fit_loop '{"shards": …, "batch": …, "steps": …, …}'
"""

import contextlib
import itertools
import json
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from alexnet.model import AlexNet
from pipelines.shards import load_manifest
from training.config import AugmentConfig, TrainConfig
from training.loop import Place, fit
from training.meter import training_flops
from training.recipes import RECIPES

PLAIN = AugmentConfig(crop="centre", flip=False, colour_sigma=0.0)
LR = 1e-3  # the recipe's own diverges on random images with random labels


class Enough(Exception):
    """Ends a training that has been watched long enough, before it evaluates or saves."""


def train(request: dict[str, Any]) -> dict[str, float]:
    """seconds: the mean of a step, after two that warm up; line: seconds between two steps, where
    a log line is made."""
    torch.set_num_threads(request["threads"])
    seconds: list[float] = []
    logged: list[float] = []

    def log(metrics: dict[str, float], step: int) -> None:
        logged.append(time.perf_counter())
        seconds.append(request["batch"] / metrics["step_images_per_second"])
        if step == request["steps"] + 2:
            raise Enough

    place = Place(torch.device("cpu"), threads=request["threads"])
    with contextlib.suppress(Enough):
        shards = request["shards"]
        fit(_config(request), shards, load_manifest(shards), place, log=log, report=never)
    with torch.device("meta"):
        shapes = AlexNet("ungrouped", num_classes=request["classes"], width=request["width"])
    return {
        "seconds": statistics.fmean(seconds[2:]),
        "line": line_seconds(logged, seconds),
        "gflop": training_flops(shapes) / 1e9,
    }


def line_seconds(logged: list[float], seconds: list[float]) -> float:
    """The median of what passed between two log lines beyond the step between them."""
    gaps = [after - before for before, after in itertools.pairwise(logged)]
    return statistics.median(gap - step for gap, step in zip(gaps, seconds[1:], strict=True))


def _config(request: dict[str, Any]) -> TrainConfig:
    baseline = RECIPES["baseline"]()
    return replace(
        baseline,
        synthetic=True,
        log_steps=1,
        flat_loss_steps=0,
        model=replace(baseline.model, width=request["width"]),
        optim=replace(baseline.optim, batch_size=request["batch"], lr=LR),
        augment=PLAIN,
    )


def never(*_: object) -> None:
    raise AssertionError("the benchmark ends before the first checkpoint")


if __name__ == "__main__":
    print(json.dumps(train(json.loads(sys.argv[1]))))
