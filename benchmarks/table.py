"""What every benchmark returns: rows under promised columns, the words they need, and a chart."""

import contextlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.meter import processor

_PACKAGES = ("torch", "pillow", "simplejpeg", "webdataset", "ray", "numpy")


@dataclass(frozen=True)
class Bars:
    """A bar for each name: the median of its values, with a whisker from lowest to highest."""

    title: str
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """Lines of (x, y) points by name."""

    across: str  # what x is
    up: str  # what y is
    lines: Mapping[str, Sequence[tuple[float, float]]]
    share: bool = False  # y is a share: from 0 to 1; else both axes are logarithmic


@dataclass(frozen=True)
class Lines:
    title: str
    panels: Sequence[Panel]


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


def machine(accelerator: str = "") -> str:
    """Hardware, versions, date and load: without them no figure here means anything."""
    versions = ", ".join(_versions())
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    beside = f", {accelerator}" if accelerator else ""
    return (
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; {processor()}, "
        f"{os.cpu_count()} CPUs{beside}; Python {platform.python_version()}, {versions}; "
        f"load average before the run {load}."
    )


def _versions() -> Iterator[str]:
    """Of the packages that are there: a machine with a GPU alone may lack most."""
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{name} {importlib.metadata.version(name)}"
