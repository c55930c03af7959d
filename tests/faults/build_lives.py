"""Commands of pipelines/ that are attacked while they run: many lives in a minute.

As a program it imports what takes seconds, and then forks a process for each line of JSON on its
stdin. That process runs `python -m pipelines ARGV`, with one change: where a build gives its tasks
to Ray, it does them itself, one after the other. Attacks on Ray are in test_build_ray.py.
"""

import contextlib
import importlib
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawn import ROOT
from waiting import wait_until

STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Life:
    """One run of a command."""

    pid: int
    said: Path  # stdout, with stderr beside it
    started: float
    lives: "Lives"

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """`do` at that instant of this life, or at its end where that comes first."""
        while time.monotonic() < self.started + seconds and not self.lives.ended(self.pid):
            time.sleep(0.002)
        do()

    def end(self) -> int:
        """Its exit code, negative for a signal, once it has ended."""
        wait_until(lambda: self.lives.ended(self.pid), 100)
        return self.lives.codes.pop(self.pid)

    @property
    def out(self) -> str:
        return self.said.read_text()

    @property
    def errors(self) -> str:
        return self.said.with_suffix(".err").read_text()


class Lives:
    """The parent of the processes, asked through pipes."""

    def __init__(self, folder: Path) -> None:
        self.codes: dict[int, int] = {}  # of those that ended
        self._folder = folder
        self._count = 0
        paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._ask({}) == {}, "imports failed"

    def start(self, *argv: str, **wanted: Any) -> Life:
        """wanted: environment, address_bytes, ballast (see `_live`)."""
        self._count += 1
        said = self._folder / f"{self._count}.out"
        request = {"argv": argv, "said": str(said), **wanted}
        return Life(self._ask(request)["pid"], said, time.monotonic(), self)

    def run(self, *argv: str, **wanted: Any) -> Life:
        """A whole life, which must end well."""
        life = self.start(*argv, **wanted)
        assert life.end() == 0, life.errors
        return life

    def ended(self, pid: int) -> bool:
        if pid not in self.codes:
            code = self._ask({"ended": pid})["code"]
            if code is None:
                return False
            self.codes[pid] = code
        return True

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '"it died"')
        return answer


def serve() -> None:
    modules = "build cli cluster demo_raw inspect report sources transform verify write_shard"
    for name in ("ray.data", "webdataset", *(f"pipelines.{name}" for name in modules.split())):
        importlib.import_module(name)
    # Until the program itself answers them, as `_live` says, they wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        elif request:
            answer = {"pid": os.fork()}
            if not answer["pid"]:
                _live(request)
        print(json.dumps(answer), flush=True)


def _live(request: dict[str, Any]) -> None:
    """address_bytes: how much more memory than at its start it may have.
    ballast: a file that takes the disk's free bytes but so many, once their lack was asked for."""
    code = 70
    try:
        files = [os.open("/dev/null", os.O_RDONLY)]
        for suffix in (".out", ".err"):
            path = Path(request["said"]).with_suffix(suffix)
            files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.environ.update(request.get("environment", {}))
        sys.argv = ["pipelines", *request["argv"]]
        _without_ray()
        if "ballast" in request:
            _fill_later(*request["ballast"])
        if "jumps" in request:
            _jumping(request["jumps"])
        if (more := request.get("address_bytes")) is not None:
            _limit(more)
        for number in STOPS:
            signal.signal(number, signal.default_int_handler)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            runpy.run_module("pipelines", run_name="__main__")
        except (
            KeyboardInterrupt
        ):  # before the first line of the program, which answers from then on
            print("stopped; nothing was begun", file=sys.stderr, flush=True)
            code = 130
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _without_ray() -> None:
    import ray.data

    from pipelines import build, cluster

    @contextlib.contextmanager
    def connected(*_: Any, **__: Any) -> Iterator[None]:
        yield

    ray.data.from_items = lambda rows, **_: _InTurn(rows)
    cluster.connected = connected
    cluster.refuse_local_paths = lambda *_, **__: None
    build.export = lambda *_: None


class _InTurn:
    """As much of a Ray data set as a build uses."""

    def __init__(self, rows: list[Any], work: Callable[[Any], Any] | None = None) -> None:
        self._rows, self._work = rows, work

    def map(self, work: Callable[[Any], Any], **_: Any) -> "_InTurn":
        return _InTurn(self._rows, work)

    def iter_rows(self) -> Iterator[Any]:
        assert self._work is not None
        yield from map(self._work, self._rows)


def _fill_later(file: str, left: int) -> None:
    """Somebody else fills the disk, but for `left` bytes, after the build has looked."""
    from pipelines import plan_files

    look = plan_files.refuse_full

    def refuse_full(*arguments: Any) -> None:
        look(*arguments)
        disk = os.statvfs(Path(file).parent)
        with Path(file).open("wb") as ballast:
            ballast.write(b"\0" * max(0, disk.f_bavail * disk.f_bsize - left))

    plan_files.refuse_full = refuse_full


def _jumping(jumps: list[tuple[int, float]]) -> None:
    """From its n-th reading on, the wall clock is ahead by so many seconds."""
    real, readings = time.time, 0

    def now() -> float:
        nonlocal readings
        readings += 1
        return real() + sum(seconds for number, seconds in jumps if readings >= number)

    time.time = now


def _limit(more: int) -> None:
    used = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert used is not None
    limit = (int(used[1]) << 10) + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    serve()
