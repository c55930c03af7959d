"""Charts of the report as inline SVG, without a script.

Shapes lie in data units (a bar of 1,300 pictures is 1,300 high) and are stretched to the width of
the page; numbers stand beside them as text, so that they are as legible on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipelines.report.page import escape

Numbers = np.ndarray[Any, np.dtype[Any]]
Ticks = Sequence[tuple[float, str]]  # (position from 0 to 1, text)
_LEVELS = 8  # of a colour in `density`
_CELLS = 40
_BINS = 48
_COLOURS = 5  # of lines
_SHORT = 6  # characters


def columns(caption: str, counts: Numbers, ticks: Ticks, mark: float | None = None) -> str:
    """Upright bars, side by side. `mark`: position of a dashed line, from 0 to 1."""
    most = max(int(counts.max(initial=0)), 1)
    bars = "".join(f"M{i} 0v-{n}h1v{n}z" for i, n in enumerate(counts.tolist()) if n)
    line = ""
    if mark is not None:
        at = f"{mark * len(counts):.3f}"
        line = f'<line class="mark" x1="{at}" x2="{at}" y1="0" y2="-{most}"/>'
    shapes = f'<path class="bar" d="{bars}"/>{line}'
    return _plot(caption, f"0 -{most} {max(len(counts), 1)} {most}", shapes, ticks, _heights(most))


def rows(names: Sequence[str], counts: Numbers) -> str:
    """Lying bars with a name before and the number behind each."""
    most = max(int(counts.max(initial=0)), 1)
    lines = [
        f'<span title="{escape(name)}">{escape(name)}</span>'
        f'<svg viewBox="0 0 {most} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{n:,}"><path class="bar" d="M0 0h{n}v1h-{n}z"/></svg><b>{n:,}</b>'
        for name, n in zip(names, counts.tolist(), strict=True)
    ]
    return f'<div class="bars">{"".join(lines)}</div>'


def sizes(caption: str, pixels: Numbers, mark: int) -> str:
    """How many pictures have which size, on a logarithmic axis; dashed at `mark` pixels."""
    edges = np.geomspace(max(pixels.min(), 1), pixels.max() + 1, _BINS + 1)
    counts, _ = np.histogram(pixels, edges)
    return columns(caption, counts, _powers(edges[0], edges[-1]), _place(mark, edges))


def ratios(caption: str, values: Numbers) -> str:
    """Width by height from 1:4 to 4:1 on a logarithmic axis; beyond them in the outermost bars."""
    edges = np.linspace(-2, 2, _BINS + 2)  # an odd number of bars: 1:1 lies inside of one
    logs = np.log2(values).clip(-2, 2)
    counts, _ = np.histogram(logs, edges)
    shapes = ((1, 4), (1, 2), (3, 4), (1, 1), (4, 3), (2, 1), (4, 1))
    ticks = [((math.log2(across / up) + 2) / 4, f"{across}:{up}") for across, up in shapes]
    return columns(caption, counts, ticks)


def density(caption: str, width: Numbers, height: Numbers, mark: int) -> str:
    """How many pictures have which width and height; darker is more, by powers."""
    low = max(min(width.min(), height.min()), 1)
    edges = np.geomspace(low, max(width.max(), height.max()) + 1, _CELLS + 1)
    counts, _, _ = np.histogram2d(width, height, [edges, edges])
    most = max(counts.max(), 1)
    levels = np.ceil(_LEVELS * np.log1p(counts) / np.log1p(most)).astype(int)
    shapes = []
    for level in range(1, _LEVELS + 1):
        cells = "".join(f"M{x} -{y + 1}h1v1h-1z" for x, y in np.argwhere(levels == level).tolist())
        if cells:
            opacity = f"{0.12 + 0.88 * level / _LEVELS:.2f}"
            shapes.append(f'<path class="bar" fill-opacity="{opacity}" d="{cells}"/>')
    if (at := _place(mark, edges)) is not None:
        place = f"{at * _CELLS:.3f}"
        shapes.append(f'<line class="mark" x1="{place}" x2="{place}" y1="0" y2="-{_CELLS}"/>')
        shapes.append(f'<line class="mark" x1="0" x2="{_CELLS}" y1="-{place}" y2="-{place}"/>')
    ticks = _powers(edges[0], edges[-1])
    box = f"0 -{_CELLS} {_CELLS} {_CELLS}"
    return _plot(caption, box, "".join(shapes), ticks, ticks, "square")


def lines(
    caption: str,
    courses: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    gaps: Iterable[tuple[float, float]],
    ticks: Ticks,
) -> str:
    """Named polylines of (x from 0 to 1, value), each in the next colour; `gaps` are shaded."""
    most = max((value for _, course in courses for _, value in course), default=0) or 1.0
    top = round_up(most)
    shapes = [
        f'<path class="gap" d="M{1000 * a:.1f} 0V-{top:g}H{1000 * b:.1f}V0z"/>' for a, b in gaps
    ]
    for number, (_, course) in enumerate(courses):
        points = " ".join(f"{1000 * x:.1f},-{value:.2f}" for x, value in course)
        shapes.append(f'<polyline class="line{number % _COLOURS}" points="{points}"/>')
    names = "".join(
        f'<span class="line{number % _COLOURS}">{escape(name)}</span>'
        for number, (name, _) in enumerate(courses)
    )
    plot = _plot(caption, f"0 -{top:g} 1000 {top:g}", "".join(shapes), ticks, _heights(top))
    return f'{plot}<p class="names">{names}</p>'


def _plot(caption: str, box: str, shapes: str, across: Ticks, upward: Ticks, kind: str = "") -> str:
    labels = "".join(
        f'<span class="{axis}{_end(at, text)}" style="{side}:{100 * at:.2f}%">{escape(text)}</span>'
        for axis, side, ticks in (("x", "left", across), ("y", "bottom", upward))
        for at, text in ticks
    )
    return (
        f'<figure class="chart"><figcaption>{escape(caption)}</figcaption>'
        f'<div class="plot {kind}"><svg viewBox="{box}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(caption)}">{shapes}</svg>{labels}</div></figure>'
    )


def _end(at: float, text: str) -> str:
    """A class for long texts at the ends of an axis, which would stick out."""
    return {0.0: " start", 1.0: " end"}.get(at, "") if len(text) > _SHORT else ""


def _heights(most: float) -> Ticks:
    return [(0, "0"), (1, f"{most:,.0f}" if most >= 10 else f"{most:g}")]


def _powers(low: float, high: float) -> Ticks:
    """1, 2, 5, 10, … between the two, or every tenth of them only where they would be crowded."""
    spread = math.log(high / low)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        values = [step * 10.0**power for power in decades for step in steps]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= 8:
            break
    if len(inside) < 2:
        inside = [low, high]
    return [(math.log(value / low) / spread, f"{value:,.0f}") for value in inside]


def _place(value: float, edges: Numbers) -> float | None:
    """Where a value lies on a logarithmic axis, from 0 to 1; None when it is not on it."""
    if not edges[0] <= value <= edges[-1]:
        return None
    return float(math.log(value / edges[0]) / math.log(edges[-1] / edges[0]))


def round_up(value: float) -> float:
    """The next number of one digit and zeros, such as 200 or 0.03."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * power >= value)
