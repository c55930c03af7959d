"""A process of its own for what eats garbage, so that a crash or a hang of it is only a find.

    python child.py DESCRIPTOR FOLDER

reads "TARGET\\nINPUT" from a socket and answers each with a JSON verdict: `right` (the target's own
oracle agreed), `refused` (the one line of a UserError or a rejection) or `bug` (anything else: an
exception, several lines, a file opened outside of the input's own folder, memory that grew).
"""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 15.0  # per input, most of which take milliseconds; a loaded machine included
# The largest image that is decoded takes 1.4 GB by the docstring of pipelines/transform.
MAX_GROWTH = 2 << 30
MAX_ADDRESSES = 6 << 30  # beyond what the libraries take: more is a MemoryError, and a find
MAX_LINE = 2000  # characters of a message


@dataclass(frozen=True)
class Verdict:
    outcome: str  # right, refused or bug
    text: str = ""


class Child:
    """Started when it is first asked, and again after each input that ended it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good = folder / "good"
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None

    def ask(self, target: str, data: bytes) -> Verdict:
        if self._process is None:
            self._start()
        assert self._process is not None and self._line is not None
        try:
            self._line.send_bytes(target.encode() + b"\n" + data)
            if not self._line.poll(SECONDS):
                self.close()
                return Verdict("bug", f"no answer within {SECONDS:g} s")
            return Verdict(**json.loads(self._line.recv_bytes()))
        except (EOFError, ConnectionError):
            code = self._process.wait()
            self.close()
            return Verdict("bug", f"the process ended with {code}")

    def close(self) -> None:
        if self._process is not None and self._line is not None:
            self._line.close()
            self._process.kill()
            self._process.wait()
        self._process = self._line = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(self.folder)],
                pass_fds=[theirs.fileno()],
                env=os.environ
                | {"ALEXNET_HOME": str(self.folder / "home"), "FUZZ_GOOD": str(self.good)}
                | {"TMPDIR": str(self.folder)},
            )
        self._line = Connection(ours.detach())
        if not self._line.poll(120):
            self.close()
            raise RuntimeError("the process for the inputs does not start")
        assert self._line.recv_bytes() == b"ready"


# In the child


def main(descriptor: int, folder: Path) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]
    from targets import TARGETS

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MAX_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    line = Connection(descriptor)
    opened = _opened_outside(folder)
    line.send_bytes(b"ready")
    for number, (name, data) in enumerate(_inputs(line)):
        case = folder / "cases" / f"{os.getpid()}-{number}"
        case.mkdir(parents=True)
        opened.clear()
        verdict = _verdict(TARGETS[name], data, case)
        if opened:
            verdict = {"outcome": "bug", "text": f"it opened {opened[0]}"}
        shutil.rmtree(case)
        line.send_bytes(json.dumps(verdict).encode())


def _inputs(line: Connection) -> Iterator[tuple[str, bytes]]:
    while True:
        try:
            message = line.recv_bytes()
        except EOFError:
            return
        name, _, data = message.partition(b"\n")
        yield name.decode(), data


def _verdict(target: Any, data: bytes, case: Path) -> dict[str, str]:
    from targets import Refused

    from alexnet.errors import UserError

    before = _peak()
    try:
        target(data, case)
        verdict = {"outcome": "right", "text": ""}
    except (UserError, Refused) as error:
        text = str(error)
        good = text.isprintable() and 0 < len(text) <= MAX_LINE
        verdict = {"outcome": "refused" if good else "bug", "text": text[: 2 * MAX_LINE]}
    except BaseException:
        verdict = {"outcome": "bug", "text": traceback.format_exc()[-6000:]}
    if (grown := _peak() - before) > MAX_GROWTH:
        verdict = {"outcome": "bug", "text": f"memory grew by {grown >> 20} MiB"}
    return verdict


def _peak() -> int:
    """Bytes of memory at the most, so far; only the first large input is seen to make it grow."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _opened_outside(folder: Path) -> list[str]:
    """Fills, from now on, with files that are opened outside of `folder`; Python's own and what the
    machine itself offers are no concern."""
    allowed = tuple(
        f"{Path(place).resolve()}/"
        for place in (folder, ROOT, sys.prefix, sys.base_prefix, *_libraries(), "/proc", "/dev")
    )
    found: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            if not f"{place}/".startswith(allowed):
                found.append(place)

    sys.addaudithook(hook)
    return found


def _libraries() -> list[str]:
    return [place for place in sys.path if place.endswith("site-packages")]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
