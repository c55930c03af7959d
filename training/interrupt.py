"""Ctrl-C and SIGTERM, which `ray job stop` and every supervisor send: one line, exit code 130."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130
# What one raises: since it was joined, Ray answers SIGTERM in its own way.
KINDS = (KeyboardInterrupt, SystemExit)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_at_once() -> None:
    """From now on both end the process, with a line. For the seconds in which a command imports its
    libraries: nothing has begun yet."""
    for number in _SIGNALS:
        signal.signal(number, _end)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Both raise KeyboardInterrupt inside. Main thread only."""
    previous = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)  # libraries are half imported: their ends would say much
