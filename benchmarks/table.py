"""What every benchmark returns: rows under promised columns, the words they need, and a chart."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.speed import processor

_PACKAGES = ("torch", "pillow", "simplejpeg", "webdataset", "ray", "numpy")


@dataclass(frozen=True)
class Bars:
    """A bar for each name: the median of its values, with a whisker from lowest to highest."""

    title: str
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Lines:
    """Lines of (x, y) points by name, in panels by title, on logarithmic axes."""

    title: str
    across: str  # what x is
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    setting: str  # one paragraph: input, configuration, number of runs
    chart: Bars | Lines | None = None

    def markdown(self) -> str:
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return "\n".join([self.setting, "", *(f"| {' | '.join(line)} |" for line in lines)])


def spread(values: Sequence[float], digits: int = 0) -> str:
    """`median [lowest..highest]`."""
    shown = [f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} [{shown[1]}..{shown[2]}]"


def machine() -> str:
    """Hardware, versions, date and load: without them no figure here means anything."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; {processor()}, "
        f"{os.cpu_count()} CPUs; Python {platform.python_version()}, {versions}; "
        f"load average before the run {load}."
    )
