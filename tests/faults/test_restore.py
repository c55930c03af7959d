"""A lost MLflow is brought back by the document's own commands, on a real PostgreSQL and store."""

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from drawn import ROOT
from mlflow.tracking import MlflowClient
from ports import free_ports
from seaweed import Seaweed
from shard_sets import write_shard_set
from small_training import fit, small_config
from waiting import wait_until

from pipelines.shards import load_manifest
from training import tracking
from training.metrics import Tracker
from training.network import load_model
from training.registry.package import register
from training.registry.versions import NAME

DOCUMENT = (ROOT / "docs" / "operations.md").read_text()
ALONE = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]


def pasted(environment: dict[str, str], section: str, shards: str = "", uri: str = "") -> str:
    """What the commands of a section print, pasted as they stand there. shards, uri: what the
    reader has as set and as MLflow."""
    [text] = re.findall(rf"^### {section}\n(.*?)(?=^##)", DOCUMENT, re.MULTILINE | re.DOTALL)
    script = "\n".join(re.findall(r"^    (.+)$", text, re.MULTILINE))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("s3://BUCKET/shards", shards)],
        env=environment | {"MLFLOW_TRACKING_URI": uri},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert script and done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def folder() -> Iterator[Path]:
    """Its path must be open to the user postgres, and short for its socket."""
    folder = Path("/tmp") / f"restore-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def environment(folder: Path, seaweed: Seaweed) -> Iterator[dict[str, str]]:
    """What the document asks its reader to have set, and the programs of PostgreSQL."""
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    initdb = shutil.which("initdb") or next(
        map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))[::-1]), None
    )
    if initdb is None:
        pytest.skip("this machine has no PostgreSQL server (initdb)")
    bucket, port = f"mlflow-{secrets.token_hex(4)}", free_ports(1)[0]
    seaweed.client().create_bucket(Bucket=bucket)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "PG"))}
    yield (
        kept
        | seaweed.environment()
        | {
            "PATH": f"{Path(sys.executable).parent}:{Path(initdb).parent}:{os.environ['PATH']}",
            "ALEXNET_HOME": str(folder / "home"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(port),
            "PGUSER": "mlflow",
            "PGDATABASE": "mlflow",
            "PGPASSWORD": secrets.token_hex(16),
            "BACKEND": f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow",
            "ARTIFACTS": f"s3://{bucket}/artifacts",
            "BACKUP": str(folder / "backup"),
        }
    )
    seaweed.client().delete_bucket(Bucket=bucket)


@contextlib.contextmanager
def postgres(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A new server with an empty database `mlflow`; it refuses root and has its own user."""
    data, password = folder / "data", folder / "password"
    shutil.rmtree(data, ignore_errors=True)
    password.write_text(environment["PGPASSWORD"])
    own = ALONE if os.geteuid() == 0 else []
    for path in (folder, password) if own else ():
        shutil.chown(path, "postgres")

    def run(*command: object) -> None:
        subprocess.run([*own, *command], check=True, capture_output=True, env=environment)

    run("initdb", "-D", data, "-A", "scram-sha-256", "-U", "mlflow", f"--pwfile={password}")
    options = f"-p {environment['PGPORT']} -h 127.0.0.1 -k {folder}"
    run("pg_ctl", "-D", data, "-w", "-l", f"{data}.log", "-o", options, "start")
    try:
        run("createdb", "mlflow")
        yield
    finally:
        run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


@contextlib.contextmanager
def mlflow_server(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """With artifacts through it as infra's manifests have it."""
    port = str(free_ports(1)[0])
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", port]
    command += ["--backend-store-uri", environment["BACKEND"]]
    command += ["--artifacts-destination", environment["ARTIFACTS"]]

    def answers() -> bool:
        assert process.poll() is None, (folder / "mlflow.log").read_text()
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{uri}/health", timeout=5).ok
        return False

    with (folder / "mlflow.log").open("ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(answers)
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def use(uri: str, home: Path, patch: pytest.MonkeyPatch) -> MlflowClient:
    patch.setenv("ALEXNET_HOME", str(home))
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    return tracking.connect(uri)


def champion(client: MlflowClient, data: str, folder: Path) -> str:
    """The number of a version that was trained for one epoch and is the champion."""
    config, manifest = small_config(name="kept", optim_epochs=1), load_manifest(data)
    done = fit(config, data, folder)
    run_id = tracking.open_run(client, config, manifest, data).info.run_id
    tracker = Tracker(tracking.tracking_uri(), run_id)
    tracker.log({"val_top1": 0.5, "loss": 1.0}, 2)
    tracker.wait()
    number = register(client, run_id, done.last, manifest, config)
    assert number is not None
    client.set_registered_model_alias(NAME, "champion", number)
    return number


def test_champion_answers_the_same_after_database_and_bucket_were_lost(
    folder, environment, seaweed, tmp_path, monkeypatch
):
    data = write_shard_set(tmp_path / "set", train=(8, 8), val=(7,))
    x = torch.randn(2, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    with postgres(folder, environment), mlflow_server(folder, environment) as uri:
        client = use(uri, tmp_path / "home", monkeypatch)
        version = champion(client, data, tmp_path / "checkpoints")
        kept = client.get_model_version(NAME, version)
        metrics = client.get_run(kept.run_id).data.metrics
        with torch.inference_mode():
            before = load_model("champion").network(x)
        pasted(environment, "Back up")

    bucket = environment["ARTIFACTS"].split("/")[2]
    seaweed.client().delete_bucket(Bucket=bucket)
    seaweed.client().create_bucket(Bucket=bucket)

    with postgres(folder, environment):  # another one, empty
        pasted(environment, "Restore")
        pasted(environment, "Upgrade MLflow")
        with mlflow_server(folder, environment) as uri, torch.inference_mode():
            client = use(uri, tmp_path / "elsewhere", monkeypatch)
            found = client.get_model_version_by_alias(NAME, "champion")
            assert (found.version, found.tags) == (version, kept.tags)
            assert torch.equal(load_model("champion").network(x), before)
            assert client.get_run(found.run_id).data.metrics == metrics != {}
            said = pasted(environment, "Look at what came back", data, uri)
            assert "champion" in said and "7 images" in said
