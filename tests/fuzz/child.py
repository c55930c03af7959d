"""A process of its own for what eats garbage, so that a crash or a hang of it is only a find.

It answers each input with an outcome and a text: `right` (the target's own oracle agreed),
`refused` (the one line of a UserError or a rejection) or `bug` (anything else: an exception,
several lines, a file opened outside of the input's own folder, memory that grew).
"""

import contextlib
import multiprocessing
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 15.0  # per input, most of which take milliseconds; a loaded machine included
# The largest image that is decoded takes 1.4 GB by the docstring of pipelines/transform.
MAX_GROWTH = 2 << 30
MAX_ADDRESSES = 6 << 30  # beyond what the libraries take: more is a MemoryError, and a find

Verdict = tuple[str, str]


class Child:
    """Started when it is first asked, and again after each input that ended it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.good = folder, folder / "good"
        self._process: Any = None

    def ask(self, target: str, data: bytes) -> Verdict:
        if self._process is None:
            self._start()
        try:
            self._line.send((target, data))
            if self._line.poll(SECONDS):
                return tuple(self._line.recv())
            found = f"no answer within {SECONDS:g} s"
        except (EOFError, ConnectionError):
            self._process.join()
            found = f"the process ended with {self._process.exitcode}"
        self.close()
        return "bug", found

    def close(self) -> None:
        if self._process is not None:
            self._line.close()
            self._process.kill()
            self._process.join()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.folder), daemon=True)
        self._process.start()
        theirs.close()
        assert self._line.poll(120) and self._line.recv() == "ready"


def serve(line: Any, folder: Path) -> None:
    """The child's part."""
    os.environ |= {"ALEXNET_HOME": str(folder / "home"), "TMPDIR": str(folder)}
    os.environ["FUZZ_GOOD"] = str(folder / "good")
    from targets_kept import KEPT
    from targets_raw import RAW

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MAX_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    opened, case = _opened_outside(folder), folder / "case"
    line.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            target, data = line.recv()
            shutil.rmtree(case, ignore_errors=True)  # also that of an input that ended a process
            case.mkdir()
            opened.clear()
            verdict = _verdict((RAW | KEPT)[target], data, case)
            line.send(("bug", f"it opened {opened[0]}") if opened else verdict)


def _verdict(target: Callable[[bytes, Path], None], data: bytes, case: Path) -> Verdict:
    from targets_raw import Refused

    from alexnet.errors import UserError

    verdict, before = ("right", ""), _peak()
    try:
        target(data, case)
    except (UserError, Refused) as error:
        text = str(error)
        good = text.isprintable() and 0 < len(text) <= 2000
        verdict = "refused" if good else "bug", text[:4000]
    except BaseException:
        verdict = "bug", traceback.format_exc()[-6000:]
    if (grown := _peak() - before) > MAX_GROWTH:
        verdict = "bug", f"memory grew by {grown >> 20} MiB"
    return verdict


def _peak() -> int:
    """Bytes of memory at the most, so far; only the first large input is seen to make it grow."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _opened_outside(folder: Path) -> list[str]:
    """Fills, from now on, with files that are opened outside of `folder`; Python's own and what the
    machine itself offers are no concern."""
    libraries = [place for place in sys.path if place.endswith("site-packages")]
    places = (folder, ROOT, sys.prefix, sys.base_prefix, *libraries, "/proc", "/dev")
    allowed = tuple(f"{Path(place).resolve()}/" for place in places)
    found: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            if not f"{place}/".startswith(allowed):
                found.append(place)

    sys.addaudithook(hook)
    return found
