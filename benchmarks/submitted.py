"""A training by `ray job submit`, on a Ray of one node that is there already."""

import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks import processes

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_START_SECONDS = 60


def run(words: Sequence[str], home: Path) -> float:
    """A job of `training/run.py WORDS`, whose ALEXNET_HOME is `home`, to its end; when it was
    submitted (time.time())."""
    with _head() as settings:
        command = [*_RAY, "job", "submit", "--working-dir", ".", "--"]
        command += ["env", f"ALEXNET_HOME={home}", "python", "training/run.py", *words]
        began = time.time()
        processes.run(command, on=processes.cpus(), settings=settings)
        return began


@contextmanager
def _head() -> Iterator[Mapping[str, str]]:
    """A node that takes jobs; the environment of who submits them."""
    ports = random.sample(range(20000, 32000), 4)  # Ray gives 10002 to 19999 to its workers
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    flags = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    settings = token | path | {"RAY_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        flags += ["--head", "--block", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
        environment = {**os.environ, **token, **path, "RAY_USAGE_STATS_ENABLED": "0"}
        head = subprocess.Popen(
            [*_RAY, "start", *flags],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait(settings)
            yield settings
        finally:
            head.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                head.wait(40)
            with suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def _wait(settings: Mapping[str, str]) -> None:
    """Only a job tells: the dashboard answers before the agent that starts jobs is there."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            command = [*_RAY, "job", "submit", "--no-wait", "--", "true"]
            processes.run(command, on=processes.cpus(), settings=settings, timeout=_START_SECONDS)
            return
        except processes.Failed:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
