"""Lives of a command that end when they are told to: python mortal.py MODULE

A process that has imported MODULE once and forks each life from there, since the imports take
seconds. It reads a line of JSON for each (`Mortals.live`) and answers with one when it is over.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# What a process does to the file system, as Python tells its audit hooks.
_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
_OPERATIONS.add("mortal.call")  # what the module tells of its own
# Seconds by which a clock may be wrong from one look to the next.
_JUMPS = (0.0, 0.0, 0.0, -86_400.0, -45.0, 45.0, 90.0, 86_400.0)


@dataclass(frozen=True)
class Life:
    """status: exit code, or minus the signal; operations: on files below the watched folders, of a
    life that was not killed."""

    status: int
    seconds: float
    operations: int
    said: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Mortals:
    """The process that forks them. As a context manager, since it must be ended."""

    def __init__(self, module: str) -> None:
        path = os.pathsep.join(map(str, [TESTS.parent, TESTS, TESTS / "faults"]))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(__file__)), module],
            env=os.environ | {"PYTHONPATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Mortals":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)  # the end of its input is its end

    def live(
        self,
        work: str,
        *,
        watch: str = "",
        after: float | None = None,
        at: int | None = None,
        clock: int | None = None,
        sent: signal.Signals = signal.SIGKILL,
        home: Path | None = None,
        **arguments: Any,
    ) -> Life:
        """Calls function `work` of the module in a process of its own, to which `sent` comes
        `after` seconds or `at` its so many-th operation on files whose paths hold `watch`.

        clock: a seed, with which time.time() jumps from call to call. home: its $ALEXNET_HOME.
        """
        asked = {"work": work, "watch": watch, "after": after, "at": at, "clock": clock}
        asked |= {"sent": int(sent), "home": None if home is None else str(home)}
        asked |= {"arguments": arguments}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process that forks them has ended with {self._process.wait()}"
        return Life(**json.loads(answer))


def main(module: str) -> None:
    works = importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for line in sys.stdin:
        answers.write(json.dumps(_life(works, json.loads(line))) + "\n")
        answers.flush()


def _life(works: Any, asked: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _born(works, asked, write)
    os.close(write)
    said: list[bytes] = []
    listening = threading.Thread(target=_listen, args=(read, said))
    listening.start()
    if asked["after"] is not None:
        listening.join(asked["after"])
        with contextlib.suppress(ProcessLookupError):  # pidfd-less: it is not waited for yet
            os.kill(pid, asked["sent"])
    listening.join()
    _, status = os.waitpid(pid, 0)
    text = b"".join(said).decode(errors="replace")
    told, over, count = text.rpartition("\0")  # the last that a life says, if it is not killed
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - began,
        "operations": int(count) if over else 0,
        "said": told if over else text,
    }


def _listen(read: int, said: list[bytes]) -> None:
    with os.fdopen(read, "rb") as pipe:
        said.append(pipe.read())


def _born(works: Any, asked: dict[str, Any], write: int) -> None:
    """In the new process: stdout and stderr go to the pipe, which ends with it."""
    status = 1
    try:
        os.dup2(write, 1)
        os.dup2(write, 2)
        counted = _watched(asked["watch"], asked["at"], asked["sent"])
        if asked["home"] is not None:
            os.environ["ALEXNET_HOME"] = asked["home"]
        if asked["clock"] is not None:
            _jump(random.Random(asked["clock"]))
        status = getattr(works, asked["work"])(**asked["arguments"]) or 0
    except KeyboardInterrupt:
        status = 130
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(1, b"\0%d" % counted[0])
        os._exit(status)


def _watched(watch: str, at: int | None, sent: int) -> list[int]:
    """Counts operations from now on, in the list's one number."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or watch not in str(arguments[0]):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), sent)

    sys.addaudithook(hook)
    return count


def _jump(draw: random.Random) -> None:
    real = time.time
    time.time = lambda: real() + draw.choice(_JUMPS)


if __name__ == "__main__":
    main(sys.argv[1])
