"""What every benchmark returns: rows under promised columns, and the words they need."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from training.speed import processor

_PACKAGES = ("torch", "pillow", "simplejpeg", "webdataset", "numpy")


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    setting: str  # one paragraph: input, configuration, number of runs

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
