"""Claim: what is done once per set grows no faster than the set, in time and in memory; more
workers make building and training faster; the registry's list stays quick.

Made-up sets (see benchmarks.grown) in three series: more images in shards of one length, the same
images in more shards, and of more classes.
"""

import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks import grown_registry, grown_workers, processes
from benchmarks.images import Raw
from benchmarks.table import Lines, Panel, Table, spread

COLUMNS = ("what", "seconds", "power of time", "peak MB", "power of memory")
STEPS = {
    "plan": "plan",
    "resume": "a build goes on",
    "finish": "end of a build",
    "verify": "verify",
    "load": "loader start",
    "order": "order of an epoch",
}
IMAGES = (1_000, 10_000, 100_000, 1_281_167, 14_197_122)  # ImageNet-1k's train, ImageNet-21k
SHARDS = (20, 200, 2_000, 10_000, 40_000)  # of _MIDDLE images
CLASSES = (10, 1_000, 10_000)  # of _MIDDLE images in _FEW_SHARDS shards
VERSIONS = (10, 100, 1_000)
_MIDDLE = 100_000
_PER_SHARD, _FEW_SHARDS, _USUAL_CLASSES = 5_005, 20, 1_000
_LARGE_ROUNDS = 1  # of sets that take longer than all others together

Figures = dict[str, list[tuple[float, float]]]  # step → (seconds, peak MB) of each round


@dataclass(frozen=True)
class Series:
    """One thing measured at several sizes: (seconds, peak MB, nan where it is unknown)."""

    what: str
    across: str
    points: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def median(self, size: int, at: int) -> float:
        return statistics.median(figures[at] for figures in self.points[size])

    def power(self, size: int, at: int) -> str:
        """log(ratio) / log(size ratio) against the size before: 1 is a straight line, 0 flat."""
        before = max((other for other in self.points if other < size), default=None)
        if before is None:
            return "–"
        ratio = self.median(size, at) / self.median(before, at)
        if not ratio > 0:  # unknown, or a trial too small to have a steady rate
            return "–"
        return f"{math.log(ratio) / math.log(size / before):.2f}"


def run(
    raw: Raw,
    rounds: int = 3,
    images: Sequence[int] = IMAGES,
    shards: Sequence[int] = SHARDS,
    classes: Sequence[int] = CLASSES,
    middle: int = _MIDDLE,
    versions: Sequence[int] = VERSIONS,
    workers: grown_workers.Sizes | None = grown_workers.Sizes(),  # noqa: B008 (frozen)
) -> Table:
    """Without `workers` nothing is built and trained."""
    measured = functools.cache(measure)  # one set belongs to two series
    over = functools.partial(_over, measured, rounds)
    series = [
        *over("images", [(size, size, _PER_SHARD, _USUAL_CLASSES) for size in images]),
        *over("shards", [(n, middle, -(-middle // n), _USUAL_CLASSES) for n in shards]),
        *over("classes", [(n, middle, -(-middle // _FEW_SHARDS), n) for n in classes]),
        Series("registry list", "versions", grown_registry.listed(versions, rounds)),
    ]
    if workers is not None:
        more = workers.measured(raw, rounds)
        series += [Series(what, "CPUs", points) for what, points in more]
    rows = [row for one in series for row in _rows(one)]
    chart = Lines("growth: median time and peak memory", list(_panels(series)))
    return Table(COLUMNS, tuple(rows), _setting(raw, rounds, middle, workers), chart)


def _over(
    measured: Callable[..., Figures],
    rounds: int,
    across: str,
    sizes: Sequence[tuple[int, int, int, int]],
) -> list[Series]:
    """sizes: (size of the series, images, images per shard, classes)."""
    series = {step: Series(words, across) for step, words in STEPS.items()}
    for size, images, per_shard, classes in sizes:
        large = images > 10 * _MIDDLE or images / per_shard > 5_000
        few = min(rounds, _LARGE_ROUNDS) if large else rounds
        figures = measured(images, per_shard, classes, few)
        for step, one in series.items():
            one.points[size] = figures[step]
    return list(series.values())


def measure(images: int, per_shard: int, classes: int, rounds: int) -> Figures:
    """Each round runs the steps in their order, on one set."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        request = {"images": images, "per_shard": per_shard, "classes": classes}
        one = request | {"out": f"{folder}/set"}
        asked = [one | {"step": "plan"}, one | {"step": "tasks"}]
        for number in range(rounds):
            if number:
                asked.append(request | {"step": "plan", "out": f"{folder}/plan{number}"})
            asked += [one | {"step": step} for step in STEPS if step != "plan"]
        answers = processes.python(["-m", "benchmarks.grown"], asked, on=processes.cpus(1)).answer()
    figures: Figures = {step: [] for step in STEPS}
    for each, (seconds, peak) in zip(asked, answers, strict=True):
        figures.setdefault(str(each["step"]), []).append((seconds, peak))
    return figures


def _rows(series: Series) -> Iterator[tuple[str, ...]]:
    for size, figures in series.points.items():
        peaks = [peak for _, peak in figures]
        yield (
            f"{series.what}, {size:,} {series.across}",
            spread([seconds for seconds, _ in figures], 3),
            series.power(size, 0),
            "–" if peaks[0] != peaks[0] else spread(peaks),
            series.power(size, 1),
        )


def _panels(series: Sequence[Series]) -> Iterator[Panel]:
    for across in dict.fromkeys(one.across for one in series):
        for at, up in enumerate(("seconds", "peak MB")):
            lines = {
                one.what: [(size, one.median(size, at)) for size in one.points]
                for one in series
                if one.across == across and all(one.median(n, at) > 0 for n in one.points)
            }
            if lines:
                yield Panel(across, up, lines)


def _setting(raw: Raw, rounds: int, middle: int, workers: grown_workers.Sizes | None) -> str:
    return (
        f"Made-up sets whose tars are sparse; local disk, page cache warm; each step on one CPU "
        f"in a process of its own, without the time of imports, with their memory; {rounds} "
        f"rounds ({min(rounds, _LARGE_ROUNDS)} of the largest two sets), median "
        f"[lowest..highest]. Images: {_PER_SHARD} in a shard, {_USUAL_CLASSES} classes. Shards: "
        f"{middle:,} images. Classes: {middle:,} images in {_FEW_SHARDS} shards. "
        "Power: 1 is a straight line from the size before, "
        "0 is flat, -1 is twice as fast on twice the CPUs. Registry list: the whole command, on "
        f"SQLite. {'' if workers is None else workers.words(raw)}"
    )
