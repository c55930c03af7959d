"""A unit test starts no process and no server: whatever tries to fails."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

_FORBIDDEN = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "socket.bind"}
_testing = False


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _testing and event in _FORBIDDEN:
        raise AssertionError(f"{event} {arguments!r:.200}: such a test belongs in tests/system")


sys.addaudithook(_refuse)  # for the rest of the process: Python takes none away


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Fixtures may start what they need once; the test itself may not."""
    global _testing
    _testing = True
    try:
        return (yield)
    finally:
        _testing = False
