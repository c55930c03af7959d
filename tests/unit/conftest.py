"""A unit test starts no process and no server: whatever tries to fails."""

import contextlib
import io
import json
import resource
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

_FORBIDDEN = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "socket.bind"}
_testing = False


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    # `uname` is what Python's own `platform` asks once.
    if _testing and event in _FORBIDDEN and arguments[0] != "uname":
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


@pytest.fixture(autouse=True)
def devkits_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """meta.mat is read by the same code as ever, but not in a process of its own."""
    from pipelines.sources import devkit

    def read(meta: bytes, id_field: str) -> Any:
        said = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setattr(sys, "argv", ["", id_field])
            patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(meta)))
            patch.setattr(resource, "setrlimit", lambda *_: None)
            try:
                with warnings.catch_warnings(action="ignore"):
                    devkit._synsets_as_json()
            except Exception as error:  # as from that process
                raise ValueError(str(error)) from error
        return json.loads(said.getvalue())

    monkeypatch.setattr(devkit, "_read_matlab", read)
