"""Charts of results, as SVG."""

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.table import Bars, Lines, Panel

_BLUE = "#4878a8"
_ACROSS = 4  # panels in a row


def draw(chart: Bars | Lines, path: Path) -> bool:
    """False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # slow to import, and not needed to print
    except ImportError:
        return False
    figure = _lines(Figure, chart) if isinstance(chart, Lines) else _bars(Figure, chart)
    figure.suptitle(chart.title, fontsize="medium")
    figure.savefig(path, metadata={"Date": None})
    return True


def _bars(figure_of: Any, chart: Bars) -> Any:
    names = list(chart.values)[::-1]
    values = [[value for value in chart.values[name] if value == value] for name in names]
    middle = [statistics.median(of_name) if of_name else 0.0 for of_name in values]
    figure = figure_of(figsize=(9, 0.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    spread = [
        (m - min(v), max(v) - m) if v else (0, 0) for m, v in zip(middle, values, strict=True)
    ]
    axes.barh(names, middle, xerr=list(zip(*spread, strict=True)), capsize=3, color=_BLUE)
    for place, (of_name, figure_of_name) in enumerate(zip(values, middle, strict=True)):
        end = max(of_name, default=0.0)
        shown = f"{figure_of_name:,.0f}" if figure_of_name >= 100 else f"{figure_of_name:.1f}"
        axes.annotate(shown, (end, place), (4, 0), textcoords="offset points", va="center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    return figure


def _lines(figure_of: Any, chart: Lines) -> Any:
    down = math.ceil(len(chart.panels) / _ACROSS)
    across = min(_ACROSS, len(chart.panels))
    figure = figure_of(figsize=(3.4 * across, 3.1 * down), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, panel in zip(grid, chart.panels, strict=False):
        (_share_panel if panel.share else _panel)(axes, panel)
    for axes in grid[len(chart.panels) :]:
        axes.set_axis_off()
    return figure


def _panel(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    for name, points in panel.lines.items():
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=3.5, label=name)
    axes.set(xlabel=panel.across, ylabel=panel.up)
    low, high = axes.get_ylim()
    if high / low < 10:  # a flat line should look flat
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / math.sqrt(10), middle * math.sqrt(10))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    sizes = sorted({x for points in panel.lines.values() for x, _ in points})
    axes.set_xticks(sizes, [_short(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="x-small", frameon=False)


def _share_panel(axes: Any, panel: Panel) -> None:
    for name, points in panel.lines.items():
        axes.plot(*zip(*points, strict=True), linewidth=1.2, label=name)
    axes.set(xlabel=panel.across, ylabel=panel.up, ylim=(0, 1), xlim=(0, None))
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="x-small", frameon=False, loc="center right", bbox_to_anchor=(1, 0.33))


def _short(size: float) -> str:
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{size / unit:.3g}{letter}"
    return f"{size:g}"
