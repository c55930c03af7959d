"""Commands as somebody runs them, each in a session of its own, with all that they start."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drawn import ROOT


class Script:
    """`python ARGV` with $HOME and $ALEXNET_HOME in `home`, by which its processes are known."""

    def __init__(self, argv: list[str], home: Path, log: Path, **environment: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        kept |= {"HOME": str(home), "ALEXNET_HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
        kept |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "RAY_DEDUP_LOGS": "0"}
        self._home, self._log, self._began = home, log, time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT,
                env=kept | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def wait_for(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.said)) is None:
            assert self._process.poll() is None and time.monotonic() < deadline, self.said[-5000:]
            time.sleep(0.02)
        return found

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def press_ctrl_c(self) -> None:
        """As a terminal does it: every process of the group hears it."""
        os.killpg(self._process.pid, signal.SIGINT)

    def kill_one(self, name: str) -> bool:
        """SIGKILL to the first of its processes whose command line holds `name`; "driver" is the
        command itself."""
        if name == "driver":
            self.send(signal.SIGKILL)
            return True
        for pid, command in self.processes().items():
            if name in command:
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def wait(self, seconds: float = 150) -> int:
        """The exit code, once nothing that it started is left. Ray's agents look for a GCS that was
        killed for more than half a minute before they end."""
        code = self._process.wait(seconds)
        deadline = time.monotonic() + 180
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.1)
        return code

    def end(self) -> None:
        """For the end of a test that failed."""
        for pid in [self._process.pid, *self.processes()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()

    def processes(self) -> dict[int, str]:
        """Command line by pid, of all that know this home and are no zombies."""
        mark = f"ALEXNET_HOME={self._home}\0".encode()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if mark in environment + b"\0" and command:
                found[int(entry.name)] = command
        return found


def only_in_long_runs(request: pytest.FixtureRequest) -> None:
    """Skips where nobody asked for many attacks."""
    if not request.config.getoption("--fault-runs", default=None):
        pytest.skip("takes a quarter of a minute or more: with --fault-runs only")
