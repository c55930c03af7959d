"""The cluster of infra/local as its user has it: jobs, nodes to kill, and what it keeps."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
from clusters import BIN, tree
from drawn import ROOT

LOCAL = ROOT / "infra" / "local"
LACKING = 69  # how up.sh ends where the host lacks a program
# Nobody's settings: they come from the file that up.sh writes.
OTHERS = ("RAY_", "MLFLOW_", "AWS_", "ALEXNET_HOME", "PYTHONPATH")


class Machines:
    """Nodes of one CPU, started by up.sh in `folder`, whose path must be short."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        kept = {k: v for k, v in os.environ.items() if not k.startswith(OTHERS)}
        self._before = kept | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(home),
            "ALEXNET_HOME": str(home / "alexnet"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.env = self._before

    def up(self, *flags: str) -> subprocess.CompletedProcess[str]:
        done = self.script("up.sh", "--dir", str(self.folder), *flags)
        if done.returncode == 0:
            source = ["bash", "-c", f". {self.folder}/env; env -0"]
            found = subprocess.run(source, env=self._before, capture_output=True, text=True)
            lines = found.stdout.rstrip("\0").split("\0")
            self.env = dict(line.split("=", 1) for line in lines)
        return done

    def down(self) -> None:
        done = self.script("down.sh", str(self.folder))
        assert done.returncode == 0, done.stdout + done.stderr

    def script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("bash", str(LOCAL / name), *arguments)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """In the checkout, as in the shell that has sourced the file."""
        return subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=500
        )

    @contextlib.contextmanager
    def begun(self, *command: str, log: Path) -> Any:
        """The same, under way; ended if it still is afterwards."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=output, stderr=output
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def on(self, node: str, *command: str) -> list[str]:
        """The words of a command that runs on a node."""
        return ["bash", str(LOCAL / "on.sh"), str(self.folder), node, *command]

    def workers(self) -> list[str]:
        """Names of the worker nodes that live, such as worker-1."""
        names = sorted(path.name for path in (self.folder / "pids").glob("worker-*"))
        return [name for name in names if Path(f"/proc/{self._pid(name)}").exists()]

    def add_node(self) -> None:
        done = self.script("node.sh", str(self.folder), "1")
        assert done.returncode == 0, done.stderr

    def kill(self, node: str) -> None:
        """SIGKILL to all of its processes."""
        for pid in tree(self._pid(node)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def node_of(self, node_ip: str, pid: int) -> str:
        """Which worker node has this address, or, where all have the same, runs this process."""
        addresses = {f"10.77.{self.setting('network')}.{n + 10}": f"worker-{n}" for n in range(10)}
        if node_ip in addresses:
            return addresses[node_ip]
        return next(name for name in self.workers() if pid in tree(self._pid(name)))

    def setting(self, name: str) -> str:
        lines = (self.folder / "network").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)[name]

    def ask(self, path: str) -> Any:
        """JSON of Ray's dashboard."""
        token = (self.folder / "secrets" / "ray_token").read_text()
        request = urllib.request.Request(
            f"{self.env['RAY_API_SERVER_ADDRESS']}/api/{path}",
            headers={"Authorization": f"Bearer {token}"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=60) as answer:
            return json.loads(answer.read())

    def states(self, what: str, job: str) -> list[dict[str, Any]]:
        """Ray's own records of a job's tasks or actors."""
        job_id = self.ask(f"jobs/{job}")["job_id"]
        # Ray answers with no data while it is too busy to collect them in time.
        answer = until(lambda: self.ask(f"v0/{what}?detail=1&limit=9999")["data"], 60)
        return [row for row in answer["result"]["result"] if row["job_id"] == job_id]

    def by_node(self, rows: list[dict[str, Any]]) -> str:
        """How many of these records each node made, in words."""
        nodes = self.ask("v0/nodes?limit=999")["data"]["result"]["result"]
        address = {node["node_id"]: node["node_ip"] for node in nodes}
        counts = Counter(f"{address[row['node_id']]} ({row['node_id'][:6]})" for row in rows)
        return ", ".join(f"{count} on {node}" for node, count in sorted(counts.items()))

    def database(self) -> Any:
        """A connection to MLflow's PostgreSQL."""
        password = (self.folder / "secrets" / "pgpass").read_text().strip().split(":")[4]
        where = {"host": str(self.folder / "postgres"), "dbname": "mlflow", "user": "mlflow"}
        return psycopg2.connect(**where, password=password)

    def _pid(self, name: str) -> int:
        return int((self.folder / "pids" / name).read_text())


def until(found: Callable[[], Any], seconds: float) -> Any:
    """What `found` gives, as soon as that is anything."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return value


def submission(*command: str, name: str | None = None) -> list[str]:
    """The words of `ray job submit` for a command, with an id of its own."""
    name = name or f"job-{secrets.token_hex(4)}"
    return ["ray", "job", "submit", "--submission-id", name, "--working-dir", ".", "--", *command]
