"""Claim: what is done once per set grows no faster than the set, in time and in memory.

Plan, bookkeeping at the end of a build, verify and the start of a loader, each in a process of its
own, over made-up sets (see benchmarks.grown): a series over pictures in shards of one length, and
one over shards of one number of pictures.
"""

import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.pictures import Raw
from benchmarks.table import Lines, Table, spread

COLUMNS = (
    "pictures",
    "shards",
    "plan, s",
    "finish, s",
    "verify, s",
    "loader start, s",
    "peak MB: plan",
    "finish",
    "verify",
    "loader start",
)
STEPS = ("plan", "finish", "verify", "load")
PICTURES = (1_000, 10_000, 100_000, 1_000_000)
SHARDS = (200, 2_000)  # of _OF_SHARDS pictures, which are in 20 above
_OF_SHARDS = 100_000
_PER_SHARD = 5_005

Figures = dict[str, list[tuple[float, float]]]  # step → (seconds, peak MB) of each round


def run(
    raw: Raw,
    rounds: int = 5,
    pictures: Sequence[int] = PICTURES,
    shards: Sequence[int] = SHARDS,
    of_shards: int = _OF_SHARDS,
) -> Table:
    """`raw` is not needed: the pictures are made up."""
    sizes = [(count, _PER_SHARD) for count in pictures]
    sizes += [(of_shards, -(-of_shards // number)) for number in shards]
    figures = {size: measure(*size, rounds) for size in sizes}
    rows = [_row(count, per_shard, figures[count, per_shard]) for count, per_shard in sizes]
    setting = (
        "Made-up sets of up to 1,000 classes, whose tars are sparse; local disk, page cache warm; "
        "each step in a fresh process on one CPU, without the time of "
        f"imports, with their memory; {rounds} rounds, median [lowest..highest]. The first "
        f"{len(pictures)} rows have {_PER_SHARD} pictures per shard. From the second largest to "
        f"the largest number of pictures, time grows with its power {_powers(pictures, figures)}."
    )
    series = [figures[count, _PER_SHARD] for count in pictures]
    chart = Lines(
        "growth with the number of pictures",
        "pictures",
        {
            panel: {
                step: [
                    (count, statistics.median(figure[at] for figure in found[step]))
                    for count, found in zip(pictures, series, strict=True)
                ]
                for step in STEPS
            }
            for at, panel in enumerate(("seconds", "peak MB"))
        },
    )
    return Table(COLUMNS, tuple(rows), setting, chart)


def measure(pictures: int, per_shard: int, rounds: int) -> Figures:
    """Each round runs the steps in their order, on one set."""
    figures: Figures = {step: [] for step in STEPS}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        request = {"pictures": pictures, "per_shard": per_shard, "out": f"{folder}/set"}
        for number in range(rounds):
            plan = request | {"out": f"{folder}/plan{number}"}
            figures["plan"].append(_step("plan", request if number == 0 else plan))
            if number == 0:
                _step("tasks", request)
            for step in STEPS[1:]:
                figures[step].append(_step(step, request))
    return figures


def _step(step: str, request: dict[str, Any]) -> tuple[float, float]:
    Path(request["out"]).mkdir(exist_ok=True)
    module = ["-m", "benchmarks.grown", step]
    answer = processes.python(module, request, on=processes.cpus(1)).answer()
    return answer["seconds"], answer["peak_mb"]


def _row(pictures: int, per_shard: int, figures: Figures) -> tuple[str, ...]:
    seconds = [spread([figure[0] for figure in figures[step]], 2) for step in STEPS]
    peaks = [spread([figure[1] for figure in figures[step]]) for step in STEPS]
    return (f"{pictures:,}", f"{-(-pictures // per_shard):,}", *seconds, *peaks)


def _powers(pictures: Sequence[int], figures: dict[tuple[int, int], Figures]) -> str:
    """log(time ratio) / log(size ratio) of the two largest sets: 1 is a straight line."""
    before, last = sorted(pictures)[-2:]
    found = []
    for step in STEPS:
        times = [
            statistics.median(figure[0] for figure in figures[count, _PER_SHARD][step])
            for count in (before, last)
        ]
        found.append(f"{math.log(times[1] / times[0]) / math.log(last / before):.2f} ({step})")
    return ", ".join(found)
