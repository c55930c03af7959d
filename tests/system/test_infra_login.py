"""MLflow in the manifests lets nobody in without a password, and Ray's nodes have one."""

import configparser
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from manifests import COMPOSE, INFRA, KUBERAY, KUBERNETES, documents, ray_clusters
from mlflow.utils.credentials import read_mlflow_creds
from ports import free_ports
from registered import MLFLOW_WARNINGS
from waiting import wait_until

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

(FILE,) = documents(COMPOSE)
SERVICES = FILE["services"]


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """As secrets.sh draws them, in a copy of infra/."""
    (tmp_path / "infra").mkdir()
    script = tmp_path / "infra" / "secrets.sh"
    script.write_text((INFRA / "secrets.sh").read_text())
    subprocess.run(["bash", str(script)], check=True)
    return tmp_path / "infra" / "secrets"


def test_mlflow_asks_for_a_login_and_every_ray_node_has_one(
    secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server with compose.yaml's words and the secrets as drawn, on another database."""
    where = {"source": "mlflow_login", "target": "/home/alexnet/.mlflow/credentials"}
    for name in ("head", "worker", "gpu-worker"):
        assert where in SERVICES[name]["secrets"]
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_bytes((secrets / "mlflow_login").read_bytes())
    with mlflow_server(secrets, tmp_path) as uri:
        asked = f"{uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
        assert requests.get(asked, timeout=60).status_code == 401
        assert requests.get(f"{uri}/health", timeout=60).status_code == 200
        for home, expected in ((tmp_path, None), (tmp_path / "elsewhere", 401)):
            monkeypatch.setenv("HOME", str(home))
            login = read_mlflow_creds()
            assert (login.username is None) == (expected is not None)
            auth = login.username and (login.username, str(login.password))
            answer = requests.get(asked, auth=auth or None, timeout=60)
            assert answer.status_code == (expected or 200), answer.text


@contextlib.contextmanager
def mlflow_server(secrets: Path, folder: Path) -> Iterator[str]:
    words = [
        word.replace("/run/secrets", str(secrets))
        for word in SERVICES["mlflow"]["command"]
        if not word.startswith(("--host", "--port", "--allowed-hosts", "--artifacts", "--backend"))
    ]
    (port,) = free_ports(1)
    uri, database = f"http://127.0.0.1:{port}", f"sqlite:///{folder}/mlflow.db"
    users = (INFRA / "mlflow-login.ini").read_text()
    (folder / "login.ini").write_text(re.sub("postgresql.*", f"sqlite:///{folder}/users.db", users))
    environment = os.environ | {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "login.ini"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", *words, f"--port={port}", f"--backend-store-uri={database}"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        wait_until(lambda: answers(f"{uri}/health"), seconds=120)
        yield uri
    finally:
        server.terminate()
        server.wait()


def answers(uri: str) -> bool:
    try:
        return requests.get(uri, timeout=10).ok
    except requests.ConnectionError:
        return False


def test_pods_have_the_login_that_the_server_is_given() -> None:
    objects = [each for path in KUBERNETES for each in documents(path)]
    (server,) = (
        each["spec"]["template"]["spec"]
        for each in objects
        if each["kind"] == "Deployment" and each["metadata"]["name"] == "mlflow"
    )
    (container,) = server["containers"]
    assert "--app-name=basic-auth" in container["command"]
    given = {each["name"]: each for each in container["env"]}
    user, password = (given[f"MLFLOW_AUTH_ADMIN_{what}"] for what in ("USERNAME", "PASSWORD"))
    trains = [name for name in ray_clusters() if name != "build-job.yaml"]  # builds need no MLflow
    assert len(trains) == len(KUBERAY) - 1
    for name in trains:
        cluster = ray_clusters()[name]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for pod in (group["template"]["spec"]["containers"][0] for group in groups):
            found = {each["name"]: each for each in pod["env"]}
            assert found["MLFLOW_TRACKING_USERNAME"]["value"] == user["value"]
            assert found["MLFLOW_TRACKING_PASSWORD"]["valueFrom"] == password["valueFrom"]
    (kept,) = (each["data"]["login.ini"] for each in objects if each["kind"] == "ConfigMap")
    assert settings(kept) == settings((INFRA / "mlflow-login.ini").read_text())
    (uri,) = (word for word in container["command"] if "postgresql" in word)
    assert settings(kept)["database_uri"] == uri.partition("=")[2]


def settings(text: str) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return dict(parser["mlflow"])
