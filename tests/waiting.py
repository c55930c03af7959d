"""Waiting for what other threads and processes do, as long as a loaded machine may need."""

import time
from collections.abc import Callable


def wait_until(done: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.01)
