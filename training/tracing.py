"""A few steps as a trace that https://ui.perfetto.dev opens."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TRACE = "trace.json"
# The first steps allocate and, where asked to, compile: they say nothing about the others.
_SKIPPED, _WARM_UP, _RECORDED = 3, 1, 4


@contextlib.contextmanager
def traced(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each step. Four steps after the first four end up in
    `folder`/trace.json, fewer if the run is shorter; without a folder, nothing happens."""
    if folder is None:
        yield lambda: None
        return
    from torch import profiler

    folder.mkdir(parents=True, exist_ok=True)

    def write(profile: Any) -> None:
        profile.export_chrome_trace(str(folder / TRACE))

    schedule = profiler.schedule(wait=_SKIPPED, warmup=_WARM_UP, active=_RECORDED, repeat=1)
    with profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
