"""Several Ray nodes on this machine, as `ray start` makes them, to be killed without mercy."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent


class Cluster:
    """A head without CPUs, for drivers alone, and nodes of one CPU. Ended by pid, node by node."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        """folder: for Ray's sockets; its path must be short. env: of every process."""
        self._env = env | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self._folder, self._started = folder, 0
        self.nodes: list[subprocess.Popen[bytes]] = []
        head = ["--head", "--port", str(_free_port()), "--temp-dir", str(folder)]
        self.head = self._start([*head, "--include-dashboard=false", "--num-cpus", "0"])
        # With the interface that Ray chose.
        self.address = (folder / "ray_current_cluster").read_text().strip()
        self.env = self._env | {"RAY_ADDRESS": self.address, "RAY_DEDUP_LOGS": "0"}

    def add_node(self) -> int:
        """Pid of a new node, once it is there."""
        node = self._start(["--address", self.address, "--num-cpus", "1"])
        self.nodes.append(node)
        return node.pid

    def node_of(self, pid: int) -> int:
        """Pid of the node that a worker process runs on."""
        return next(node.pid for node in self.nodes if pid in tree(node.pid))

    def kill(self, node: int) -> None:
        """SIGKILL to a node: raylet, agents and workers at once."""
        for pid in tree(node):
            _kill(pid)
        next(n for n in self.nodes if n.pid == node).wait()
        self.nodes = [n for n in self.nodes if n.pid != node]

    def close(self) -> None:
        for node in list(self.nodes):
            self.kill(node.pid)
        for pid in tree(self.head.pid):
            _kill(pid)
        self.head.wait()

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        self._started += 1
        log = self._folder / f"node-{self._started}.log"
        command = [str(BIN / "ray"), "start", "--block", "--object-store-memory", "100000000"]
        command += ["--dashboard-agent-listen-port", str(_free_port()), *arguments]
        command += ["--disable-usage-stats"]
        with log.open("wb") as output:
            node = subprocess.Popen(
                command, env=self._env, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while b"Ray runtime started" not in log.read_bytes():
            assert node.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return node


def tree(pid: int) -> list[int]:
    """A process and all that descend from it, from the root down."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.parent.name)] = int(after_name[1])
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    """Above Ray's own range for workers, as the kernel chooses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
