"""A real MLflow server that a test may end and start again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import requests
from ports import free_ports
from waiting import wait_until

# By default MLflow calls public addresses by https alone, and looks for new webhooks each minute.
WEBHOOKS = {
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_CACHE_TTL": "0",
}


def wait_until_healthy(uri: str) -> None:
    def answers() -> bool:
        try:
            return requests.get(f"{uri}/health", timeout=30).ok
        except requests.RequestException:
            return False

    wait_until(answers)


class Server:
    """A real `mlflow server` on a port of its own, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        self._command += ["--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        self._command += ["--artifacts-destination", str(folder / "artifacts")]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", **WEBHOOKS}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        wait_until_healthy(self.uri)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
