"""Commands that are attacked while they run, many lives in a minute.

Each life is a process of its own, forked from one that has imported once what takes seconds:
multiprocessing's server.
"""

import atexit
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from drawn import ROOT

_numbers = itertools.count()
_CONTEXT = multiprocessing.get_context("forkserver")
_STOPS = (signal.SIGINT, signal.SIGTERM)
# What a process does to the file system, as Python tells its audit hooks.
_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
_OPERATIONS.add("mortal.call")  # what a module tells of its own


@functools.cache
def _folder() -> Path:
    """For what lives say; from now on the server runs."""
    folder = tempfile.mkdtemp(prefix="lives-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _CONTEXT.set_forkserver_preload(["pytest", "works"])
    with pytest.MonkeyPatch.context() as patch:
        path = [ROOT, ROOT / "tests", ROOT / "tests" / "faults"]
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, path)))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        forkserver.ensure_running()
    return Path(folder)


class Life:
    """One run of function `work` of works.py. At its `at`-th operation on files whose paths hold
    `watch` it is killed, or runs the command `sabotage`.

    memory: bytes of address space that it may take on.
    """

    def __init__(
        self,
        work: str,
        *,
        watch: str = "",
        at: int | None = None,
        sabotage: list[str] | None = None,
        memory: int | None = None,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        self._errors = _folder() / str(next(_numbers))
        self._line, line = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_live,
            args=(line, self._errors, environment or {}, (watch, at, sabotage), memory),
            kwargs={"work": work, "arguments": arguments},
        )
        self._process.start()
        line.close()
        self._line.recv()  # it answers signals from now on
        self._began = time.monotonic()
        self.seconds = 0.0

    def signal(self, number: int) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """`do` at that instant of this life, or at its end where that comes first."""
        self._process.join(max(0, self._began + seconds - time.monotonic()))
        do()

    def end(self) -> int:
        """Its exit code, or minus its signal."""
        self._process.join(100)
        assert self.status is not None, "it stands still"
        self.seconds = self.seconds or time.monotonic() - self._began
        return self.status

    @property
    def status(self) -> int | None:
        return self._process.exitcode

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @functools.cached_property
    def operations(self) -> int:
        """On files whose paths held what was watched; of a life that was not killed."""
        return int(self._line.recv())

    def check_refused(self) -> None:
        """It ended with a line that says what to do, below warnings at most."""
        assert self.status in (1, 2), self.errors
        assert self.errors.splitlines()[-1].startswith(("error: ", "failed: ")), self.errors
        assert "Traceback" not in self.errors, self.errors


def lived(work: str, *, after: float | None = None, **how: Any) -> Life:
    """A whole life, which SIGKILL ends `after` so many seconds."""
    life = Life(work, **how)
    if after is not None:
        life.after(after, lambda: life.signal(signal.SIGKILL))
    life.end()
    return life


def _live(
    line: Any,
    errors: Path,
    environment: dict[str, str],
    watched: tuple[str, int | None, list[str] | None],
    memory: int | None,
    *,
    work: str,
    arguments: dict[str, Any],
) -> None:
    count, status = [0], 1
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ.update(environment)
        tempfile.tempdir = None  # to be found anew
        warnings.simplefilter("ignore")
        function = getattr(importlib.import_module("works"), work)
        count = _watch(*watched)
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        for number in _STOPS:
            signal.signal(number, signal.default_int_handler)
        line.send("ready")
        status = function(**arguments) or 0
    except KeyboardInterrupt:  # before the first line of the program, which answers from then on
        print("stopped; nothing was begun", file=sys.stderr)
        status = 130
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        line.send(count[0])
        os._exit(status)


def _watch(watch: str, at: int | None, sabotage: list[str] | None) -> list[int]:
    """Counts operations from now on, in the list's one number."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or watch not in str(arguments[0]):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count[0] += 1
        if count[0] == at and sabotage is None:
            os.kill(os.getpid(), signal.SIGKILL)
        elif count[0] == at:
            subprocess.run(sabotage, stderr=subprocess.DEVNULL)

    sys.addaudithook(hook)
    return count
