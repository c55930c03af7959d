"""Several Ray nodes on this machine, as `ray start` makes them, to be killed without mercy."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ports import free_ports
from waiting import wait_until

BIN = Path(sys.executable).parent
_FOR_DRIVERS = ("--include-dashboard=false", "--num-cpus", "0")


class Cluster:
    """A head, for drivers alone unless its flags say otherwise, and nodes of one CPU. Ended by
    pid, node by node."""

    def __init__(
        self, folder: Path, env: dict[str, str], head: Sequence[str] = _FOR_DRIVERS
    ) -> None:
        """folder: for Ray's sockets; its path must be short. env: of every process."""
        known = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        known |= {"RAY_prestart_worker_first_driver": "0", "RAY_worker_niceness": "0"}
        self._env = known | env
        self._folder, self._started = folder, 0
        self.nodes: list[subprocess.Popen[bytes]] = []
        (port,) = free_ports(1)
        self.head = self._start(["--head", "--port", str(port), "--temp-dir", str(folder), *head])
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
        _kill(node)
        next(n for n in self.nodes if n.pid == node).wait()
        self.nodes = [n for n in self.nodes if n.pid != node]

    def close(self) -> None:
        for node in list(self.nodes):
            self.kill(node.pid)
        _kill(self.head.pid)
        self.head.wait()

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        self._started += 1
        log = self._folder / f"node-{self._started}.log"
        (port,) = free_ports(1)
        command = [str(BIN / "ray"), "start", "--block", "--object-store-memory", "100000000"]
        command += ["--dashboard-agent-listen-port", str(port), *arguments]
        with log.open("wb") as output:
            node = subprocess.Popen(
                [*command, "--disable-usage-stats"],
                env=self._env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

        def is_there() -> bool:
            assert node.poll() is None, log.read_text()
            return b"Ray runtime started" in log.read_bytes()

        wait_until(is_there)
        return node


def tree(pid: int) -> list[int]:
    """A process and all that descend from it, from the root down."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            after_name = entry.read_text().rpartition(")")[2].split()
            parents[int(entry.parent.name)] = int(after_name[1])
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found


def _kill(root: int) -> None:
    for pid in tree(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
