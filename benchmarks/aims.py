"""What the measurements aim at, and whether the last results reach it."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import Result

_NUMBER = re.compile(r"-?[\d,]*\.?\d+")


@dataclass(frozen=True)
class Aim:
    """Of the rows of a theme's result that begin with `of` (a regular expression), the worst figure
    in `column`. With `against`, another row's beginning, the figures are divided by that row's, or
    with `less` that is taken from them.

    reason: why it is missed, where it is.
    """

    text: str
    theme: str
    of: str
    column: str
    sign: str  # "≥" or "≤"
    value: float
    against: str = ""
    less: bool = False
    reason: str = ""

    @property
    def wanted(self) -> str:
        return f"{self.sign} {self.value:g}"


_RATE, _LOADED, _STEPS = "steady img/s", "img/s", "img/s"
_LOADER, _BUILDER = r"training\.loader$", "pipelines build$"
_GPU_STEP = "baseline, bf16, eager, batch 1024$"
_OURS_STEP = r"training/run\.py"

AIMS = (
    Aim(
        "PSNR of the resize, dB",
        "resize",
        r"pipelines\.transform",
        "PSNR before encoding, dB (worst)",
        "≥",
        56,
    ),
    Aim(
        "building beside the limit",
        "builder",
        _BUILDER,
        _RATE,
        "≥",
        0.75,
        "the parts alone",
        reason="with hashes and sums the codecs reach 0.87; the rest is checks of headers, reading "
        "ahead, fsync, and Ray's processes, 5 % of two CPUs (LOG.md)",
    ),
    Aim(
        "building beside img2dataset",
        "builder",
        _BUILDER,
        _RATE,
        "≥",
        1.5,
        "img2dataset",
        reason="the same, and 6.7 s more of start-up: below about 32,000 images img2dataset's "
        "whole job is the quicker one. It resizes by another filter (area) and keeps no account",
    ),
    Aim(
        "building beside Ray Data",
        "builder",
        _BUILDER,
        _RATE,
        "≥",
        4,
        "Ray Data",
        reason="set when Ray Data wrote ten images a tar; with a block for each tar it is twice as "
        "fast. Its own CPU time bounds what is left to gain",
    ),
    Aim(
        "start-up of a build beyond Ray's own, s",
        "builder",
        _BUILDER,
        "start-up, s",
        "≤",
        3,
        "Ray alone",
        less=True,
    ),
    Aim(
        "loading beside the limit",
        "loader",
        _LOADER,
        _LOADED,
        "≥",
        0.85,
        "limit: simplejpeg",
        reason="the limit does not mirror; without the benchmark's mirroring 0.93 [0.90..0.98] in "
        "six rounds of their own (LOG.md)",
    ),
    Aim(
        "loading beside DALI",
        "loader",
        _LOADER,
        _LOADED,
        "≥",
        1.5,
        "nvidia-dali",
        reason="1.40, and 1.47 and 1.49 in two earlier runs, each within its spread of the aim",
    ),
    Aim("loading beside FFCV", "loader", _LOADER, _LOADED, "≥", 1.3, "ffcv"),
    Aim(
        "loading beside webdataset",
        "loader",
        _LOADER,
        _LOADED,
        "≥",
        3,
        "webdataset",
        reason="set when webdataset mirrored in a slow way here, which was ours to mend",
    ),
    Aim(
        "epochs from the decoded file beside decoding",
        "loader",
        r"training\.loader, decoded",
        _LOADED,
        "≥",
        10,
        "limit: simplejpeg",
        reason="copying from memory alone is 9.4 times as fast as decoding 227 px images of 20 kB "
        "on these CPUs; the loader has 0.68 [0.55..0.91] of that limit",
    ),
    Aim("first batch of a loader, s", "loader", _LOADER, "first batch, s", "≤", 2),
    Aim(
        "training beside a bare loop",
        "train",
        _OURS_STEP,
        _STEPS,
        "≥",
        0.95,
        "the same with the memory settings",
        reason="Ray's own processes, the five helpers of Ray Train and Data among them, take 11 % "
        "of one of the two CPUs on which the step computes (LOG.md); without Ray our loop is as "
        "fast as the bare one",
    ),
    Aim(
        "time of what is done once per set: its power of the number of images, shards or classes",
        "growth",
        r".*, ((1,281,167|14,197,122) (images|pictures)|[14]0,000 shards|10,000 classes)$",
        "power of time",
        "≤",
        1.1,
    ),
    Aim(
        "registry list of 1,000 versions, s",
        "growth",
        r"registry list, 1,000 ",
        "seconds",
        "≤",
        5,
        reason="10 versions take 3.3 s, most of which imports MLflow",
    ),
    Aim(
        "MFU of the recipe baseline on a GPU, %",
        "gpu-feed",
        "memory of the GPU: --synthetic, batch 1024$",
        "MFU",
        "≥",
        50,
        reason="measured before steps stopped waiting for the host, conv1 was computed in blocks "
        "of pixels and the view became one kernel, and not since: no GPU could be had again",
    ),
)


@dataclass(frozen=True)
class Judged:
    """shown: the figure as the table has it; met: None where nothing was measured."""

    shown: str
    met: bool | None


def judge(aim: Aim, result: Result | None) -> Judged:
    found = [] if result is None else [name for name in result.rows if re.match(aim.of, name)]
    if result is None or not found or aim.column not in result.columns:
        return Judged("not measured", None)
    other = next((name for name in result.rows if name.startswith(aim.against)), None)
    if aim.against and other is None:
        return Judged("not measured", None)
    if aim.against and not aim.less:
        assert other is not None
        values = ratio(result, found[0], other, aim.column)
        return Judged(shown_ratio(values), _reached(aim, statistics.median(values)))
    figures = {name: number(result.cell(name, aim.column)) for name in found}
    if aim.less:
        assert other is not None
        figures = {name: v - number(result.cell(other, aim.column)) for name, v in figures.items()}
    known = {name: value for name, value in figures.items() if value == value}
    if not known:
        return Judged("not measured", None)
    worst = _worst(aim, known)
    cell = f"{known[worst]:.1f}" if aim.less else result.cell(worst, aim.column)
    return Judged(f"{cell} ({worst})" if len(found) > 1 else cell, _reached(aim, known[worst]))


def ratio(result: Result, ours: str, other: str, column: str) -> list[float]:
    """Round by round where the result keeps the rounds of both, otherwise of the medians alone."""
    if ours in result.rounds and other in result.rounds:
        both = zip(result.rounds[ours], result.rounds[other], strict=True)
        values = [a / b for a, b in both if a == a and b == b and b]
        return values or [float("nan")]
    mine, theirs = (number(result.cell(name, column)) for name in (ours, other))
    return [mine / theirs if theirs else float("nan")]


def shown_ratio(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.2f}..{max(values):.2f}]"


def number(cell: str) -> float:
    """The first of a cell, a median where there is a spread; nan without one."""
    found = _NUMBER.search(cell)
    return float(found[0].replace(",", "")) if found else float("nan")


def _worst(aim: Aim, figures: dict[str, float]) -> str:
    worst = min if aim.sign == "≥" else max
    return worst(figures, key=lambda name: figures[name])


def _reached(aim: Aim, value: float) -> bool:
    return value >= aim.value if aim.sign == "≥" else value <= aim.value
