"""What 1,000 built images and one epoch of ImageNet cost on named cloud machines.

    python -m benchmarks.cost [--results FOLDER] [--batch 256] [--price c7a.4xlarge=0.9 …]

The rates are those of the newest results, where there are any, and are told below the table with
what is concluded from them; machines, networks and the step's model are benchmarks.cost_estimate's.
Prices are the reader's: US dollars an hour.
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alexnet.errors import UserError
from benchmarks import cost_estimate, results
from benchmarks.aims import number
from benchmarks.cost_estimate import INSTANCES, building, training
from benchmarks.cost_model import DECODE_PER_CORE, FLOPS, TRAIN_IMAGES
from benchmarks.results import Result
from pipelines import command

_HEAD = ["job", "machine", "CPUs", "GPUs", "unit", "machine seconds", "bound by"]
_DATA_SHEET = {"nvidia-h100": 989e12, "nvidia-h200": 989e12, "nvidia-a100": 312e12}  # dense bf16


@dataclass(frozen=True)
class Rate:
    """value: images a second of one CPU, or the share of its data sheet that a GPU reaches."""

    value: float
    origin: str


def rates(found: Sequence[Result]) -> dict[str, Rate]:
    """By "build", "decode", "train" (on CPUs) and "gpu"; the constants of the model where nothing
    was measured, and no "train" then."""
    known = {
        "build": Rate(cost_estimate.BUILD_PER_CORE, "benchmarks/cost_estimate.py"),
        "decode": Rate(DECODE_PER_CORE, "benchmarks/cost_model.py"),
        "gpu": Rate(cost_estimate.GPU_SHARE, "assumed in benchmarks/cost_estimate.py"),
    }
    rows = {
        "build": ("builder", "pipelines build", "steady img/s"),
        "decode": ("loader", "training.loader", "img/s"),
        "train": ("train", "training/run.py, through Ray Train and MLflow", "img/s"),
    }
    for job, (theme, row, column) in rows.items():
        for result in found:
            cpus = re.search(r"(\d+)cpus$", result.hardware)
            if result.name == theme and row in result.rows and cpus:
                measured = number(result.cell(row, column)) / int(cpus[1])
                known[job] = Rate(measured, f"{result.path.name}, over its {cpus[1]} CPUs")
    for result in found:
        peak = next((v for k, v in _DATA_SHEET.items() if result.hardware.startswith(k)), None)
        row = "memory of the GPU: --synthetic, batch 256"
        if result.name == "gpu-feed" and peak and row in result.rows:
            share = number(result.cell(row, "img/s between log lines")) * FLOPS / peak
            known["gpu"] = Rate(share, result.path.name)
    return known


def document(known: Mapping[str, Rate], batch: int, prices: Mapping[str, float]) -> str:
    lines = [_HEAD + ["USD"] * bool(prices)]
    lines.append(["---"] * len(lines[0]))
    for machine in INSTANCES:
        built = building(machine, known["build"].value)
        seconds = built.hours * 3600 / cost_estimate.IMAGES * 1000
        found = [("build", "1,000 images", seconds, built.bound_by)]
        if machine.gpus:
            epoch = training(machine, batch, 1, known["decode"].value, known["gpu"].value)
            found.append(("train", "epoch", epoch.hours * 3600, epoch.bound_by))
        elif "train" in known:
            seconds = TRAIN_IMAGES / (machine.cpus * known["train"].value)
            found.append(("train", "epoch", seconds, "CPUs"))
        for job, unit, seconds, bound_by in found:
            cells = [job, machine.name, f"{machine.cpus}", f"{machine.gpus or '–'}", unit]
            cells += [f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}", bound_by]
            if prices:
                price = prices.get(machine.name)
                cells.append("–" if price is None else _three_digits(seconds / 3600 * price))
            lines.append(cells)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{_origins(known, batch)}"


def _three_digits(value: float) -> str:
    """0.0000572, not 5.72e-05."""
    places = 2 - math.floor(math.log10(value)) if value > 0 else 2
    return f"{value:,.{max(places, 2)}f}"


def _origins(known: Mapping[str, Rate], batch: int) -> str:
    words = {
        "build": "{:.0f} images/s per CPU built ({})",
        "decode": "{:,.0f} images/s per CPU loaded ({})",
        "train": "{:.1f} images/s per CPU trained ({})",
        "gpu": "{:.0%} of a GPU's data sheet in bfloat16 ({})",
    }
    told = [words[job].format(rate.value, rate.origin) for job, rate in known.items()]
    return "\n".join(
        [
            f"- Rates: {'; '.join(told)}.",
            "- Extrapolated: every second of the table. That all CPUs of a machine do as much as "
            "those measured, at any number; ImageNet's mean sizes over the network at 92 % of its "
            f"line rate; steps of `baseline`, batch {batch}, by benchmarks/cost_model.py on GPUs, "
            "and in proportion to CPUs without. Without start-up, evaluation and storage.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, metavar="FOLDER")
    parser.add_argument("--batch", type=int, default=256, help="global, of a training")
    parser.add_argument(
        "--price", action="append", default=[], metavar="NAME=USD", help="for an hour; repeatable"
    )
    return command.answered(lambda: _answer(parser.parse_args(argv)))


def _answer(arguments: argparse.Namespace) -> int:
    if arguments.batch < 1:
        raise UserError(f"--batch {arguments.batch} is below 1; pass 1 or more")
    prices = dict(map(cost_estimate.price, arguments.price))
    known = rates(results.newest(arguments.results))
    print(document(known, arguments.batch, prices))
    return 0


if __name__ == "__main__":
    command.begin()
    command.leave(main)
