"""What happens to the machines of a cluster that live on: cables, pauses, restarts of servers."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from clusters import tree
from machines import Machines, until


def cut_off(cluster: Machines, node: str, seconds: float) -> None:
    """Nobody hears the node, and it hears nobody, for so long."""
    if cluster.setting("kind") != "namespaces":
        pytest.skip("nodes that share one address have no cable")
    cable = f"ax{cluster.setting('network')}-{int(node.removeprefix('worker-')) + 10}"
    subprocess.run(["ip", "link", "set", cable, "down"], check=True)
    try:
        time.sleep(seconds)
    finally:
        subprocess.run(["ip", "link", "set", cable, "up"], check=True)


@contextlib.contextmanager
def frozen(cluster: Machines, node: str) -> Iterator[None]:
    """All processes of the node stand still meanwhile."""
    pids = tree(_pid(cluster, node))
    try:
        _signal(pids, signal.SIGSTOP)
        yield
    finally:
        _signal(pids, signal.SIGCONT)


def restart_mlflow(cluster: Machines) -> None:
    """SIGKILL, and the same command once more; returns when it answers."""
    space = f"alexnet-{cluster.setting('network')}-servers"
    inside = ["ip", "netns", "exec", space] if cluster.setting("kind") == "namespaces" else []
    _restart(cluster, "mlflow", inside)
    probe = f"{cluster.env['MLFLOW_TRACKING_URI']}/health"
    until(lambda: _succeeds("curl", "--silent", "--fail", "--noproxy", "*", probe), 120)


def restart_postgres(cluster: Machines) -> None:
    """The same for MLflow's database."""
    status = Path(f"/proc/{_pid(cluster, 'postgres')}/status").read_text()
    ids = {line.split()[0]: line.split()[1] for line in status.splitlines() if line[1:4] == "id:"}
    user = [f"--reuid={ids['Uid:']}", f"--regid={ids['Gid:']}", "--clear-groups"]
    _restart(cluster, "postgres", ["setpriv", *user] if os.geteuid() == 0 else [])

    def answers() -> bool:
        with contextlib.suppress(psycopg2.OperationalError):
            cluster.database().close()
            return True
        return False

    until(answers, 60)


def _restart(cluster: Machines, name: str, words: list[str]) -> None:
    """In the background, with the environment of before: down.sh knows it by that."""
    pid = _pid(cluster, name)
    process = Path(f"/proc/{pid}")
    command = process.joinpath("cmdline").read_bytes().decode().rstrip("\0").split("\0")
    lines = process.joinpath("environ").read_bytes().decode().rstrip("\0").split("\0")
    pids = tree(pid)
    _signal(pids, signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{each}").exists() for each in pids), 30)
    script = 'setsid "$@" </dev/null >>"$0" 2>&1 & echo $!'
    log = cluster.folder / "logs" / f"{name}.log"
    done = subprocess.run(
        ["bash", "-c", script, str(log), *words, *command],
        env=dict(line.split("=", 1) for line in lines),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (cluster.folder / "pids" / name).write_text(done.stdout)


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def _pid(cluster: Machines, name: str) -> int:
    return int((cluster.folder / "pids" / name).read_text())


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
