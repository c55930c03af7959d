"""Commands in processes of their own: pinned, with wall time and the CPU time of all below them."""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import clock

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
_SAMPLE_SECONDS = 0.25
_FOREIGN = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "PYTHONPATH")


@dataclass(frozen=True)
class Finished:
    """cpu_seconds: of every process below the command. Processes that nobody waits for, such as
    Ray's workers, are looked at four times a second: what they did after the last look is missing.
    peak_mb: resident memory of the command's own process, and largest_mb that of the largest of
    all, by these looks.
    """

    wall_seconds: float
    cpu_seconds: float
    stdout: str
    stderr: str
    peak_mb: float = 0.0
    largest_mb: float = 0.0

    def answer(self) -> Any:
        """The JSON of the last line on stdout."""
        return json.loads(self.stdout.splitlines()[-1])


class Failed(RuntimeError):
    """A command that did not end with 0, with the end of what it said."""


def cpus(count: int | None = None) -> list[int]:
    """The first `count` CPUs that this process may use; all by default."""
    return sorted(os.sched_getaffinity(0))[:count]


def run(
    command: Sequence[str],
    *,
    on: Sequence[int],
    settings: Mapping[str, str] | None = None,
    timeout: float = 900,
) -> Finished:
    """`command` from the checkout, on the CPUs `on` alone. Raises Failed."""
    ours = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    ours |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = os.sched_getaffinity(0)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.sched_setaffinity(0, on)
        try:
            began = time.perf_counter()
            process = subprocess.Popen(
                list(command), cwd=ROOT, env=ours | dict(settings or {}), stdout=out, stderr=err
            )
        finally:
            os.sched_setaffinity(0, before)
        wall, cpu, peak, largest = _watched(process, began, timeout)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            end = (out.read() + err.read()).strip()[-2000:]
            raise Failed(f"{' '.join(command)[:200]}: exit code {process.returncode}\n{end}")
        return Finished(wall, cpu, out.read(), err.read(), peak, largest)


def ask(
    python_path: str | Path, script: str, request: Mapping[str, Any], *, on: Sequence[int]
) -> Finished:
    """A runner of benchmarks/peers, in the Python given."""
    return run([str(python_path), str(PEERS / script), json.dumps(request)], on=on)


def ask_ours(module: str, request: Mapping[str, Any], *, on: Sequence[int]) -> Finished:
    return python(["-m", f"benchmarks.{module}"], request, on=on)


def python(words: Sequence[str], request: Mapping[str, Any], *, on: Sequence[int]) -> Finished:
    """This Python, with the request as its last word."""
    return run([sys.executable, *words, json.dumps(request)], on=on)


def _watched(
    process: subprocess.Popen[str], began: float, timeout: float
) -> tuple[float, float, float, float]:
    """Wall and CPU seconds, and peaks of memory in MB: of the process, of the largest of all.
    Raises Failed after `timeout` seconds."""
    seen: dict[tuple[int, int], float] = {}
    peaks, others = [0.0], [0.0]
    over = threading.Event()

    def look() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            found = clock.tree(process.pid, tuple(seen))
            seen.update({key: own for key, (own, _) in found.items()})
            peaks.append(_peak_mb(process.pid))
            others.extend(_peak_mb(pid) for pid, _ in found)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        ended = _wait(process, began + timeout)
        wall = time.perf_counter() - began
    finally:
        over.set()
        watcher.join()
    if ended is None:
        raise Failed(f"{' '.join(map(str, process.args))[:200]}: longer than {timeout:.0f} s")
    return wall, max(sum(seen.values()), ended), max(peaks), max(peaks + others)


def _peak_mb(pid: int) -> float:
    """Of the program that it runs now: what `wait4` tells has that of its parent in it."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[1]) / 1000 if found else 0.0


def _wait(process: subprocess.Popen[str], deadline: float) -> float | None:
    """CPU seconds of the process and of those it waited for; None when it had to be ended."""
    alarm = threading.Timer(deadline - time.perf_counter(), process.kill)
    alarm.start()
    _, status, usage = os.wait4(process.pid, 0)
    late = not alarm.is_alive()
    alarm.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return None if late else usage.ru_utime + usage.ru_stime
