"""A lost MLflow is brought back by the document's own commands, on a real PostgreSQL and store."""

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests
import torch
from drawn import ROOT
from mlflow.tracking import MlflowClient
from ports import free_ports
from registered import MLFLOW_WARNINGS
from shard_sets import write_shard_set
from small_training import fit, small_config

from pipelines.shards import load_manifest
from training import tracking
from training.network import load_model
from training.registry.package import register
from training.registry.versions import NAME

if TYPE_CHECKING:
    from seaweed import Seaweed

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

DOCUMENT = (ROOT / "docs" / "operations.md").read_text()
ALONE = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]


def commands(section: str) -> str:
    """The indented block of a section, as a reader would paste it."""
    [text] = re.findall(rf"^### {section}\n(.*?)(?=^##)", DOCUMENT, re.MULTILINE | re.DOTALL)
    return "\n".join(re.findall(r"^    (.+)$", text, re.MULTILINE))


@dataclass(frozen=True)
class Place:
    """folder: of everything; environment: what the document asks its reader to have set."""

    folder: Path
    programs: Path  # of PostgreSQL
    environment: dict[str, str]

    def paste(self, section: str, shards: str = "", uri: str = "") -> str:
        """What the commands print. shards, uri: what the reader has there as set and MLflow."""
        script = commands(section).replace("s3://BUCKET/shards", shards)
        assert script, section
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=self.environment | {"MLFLOW_TRACKING_URI": uri},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def postgres(self, data: str) -> Iterator[None]:
        """A server with an empty database `mlflow`; it refuses root and has its own user."""
        folder, password = self.folder / data, self.folder / "password"
        password.write_text(self.environment["PGPASSWORD"])
        own = ALONE if os.geteuid() == 0 else []
        if own:
            shutil.chown(self.folder, "postgres")
            shutil.chown(password, "postgres")
        made = [self.programs / "initdb", "-D", folder, "-A", "scram-sha-256", "-U", "mlflow"]
        subprocess.run([*own, *made, f"--pwfile={password}"], check=True, capture_output=True)
        options = f"-p {self.environment['PGPORT']} -h 127.0.0.1 -k {self.folder}"
        control = [*own, self.programs / "pg_ctl", "-D", folder, "-w", "-l", f"{folder}.log"]
        subprocess.run([*control, "-o", options, "start"], check=True, capture_output=True)
        try:
            subprocess.run(["createdb", "mlflow"], env=self.environment, check=True)
            yield
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True)

    @contextlib.contextmanager
    def mlflow(self) -> Iterator[str]:
        """Its server, with artifacts through it as infra's manifests have it."""
        uri = f"http://127.0.0.1:{free_ports(1)[0]}"
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", uri.rsplit(":", 1)[1]]
        command += ["--backend-store-uri", self.environment["BACKEND"]]
        command += ["--artifacts-destination", self.environment["ARTIFACTS"]]
        with (self.folder / "mlflow.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 120
            while not _answers(uri):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.3)
            yield uri
        finally:
            os.killpg(process.pid, 15)
            process.wait(60)


def _answers(uri: str) -> bool:
    try:
        return requests.get(f"{uri}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


@pytest.fixture
def place(seaweed: "Seaweed", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    initdb = shutil.which("initdb") or next(
        map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))[::-1]), None
    )
    if initdb is None:
        pytest.skip("this machine has no PostgreSQL server (initdb)")
    programs = Path(initdb).parent
    # Its path must be open to the user postgres, and short for its socket.
    folder = Path("/tmp") / f"restore-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "PG"))}
    environment = kept | seaweed.environment()
    path = f"{Path(sys.executable).parent}:{programs}:{os.environ['PATH']}"
    environment |= {"PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment |= {"ALEXNET_HOME": str(folder / "home")}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment |= {"PGHOST": "127.0.0.1", "PGPORT": str(free_ports(1)[0]), "PGUSER": "mlflow"}
    environment |= {"PGDATABASE": "mlflow", "PGPASSWORD": secrets.token_hex(16)}
    bucket = f"mlflow-{secrets.token_hex(4)}"
    seaweed.client().create_bucket(Bucket=bucket)
    environment |= {
        "BACKEND": f"postgresql+psycopg2://mlflow@127.0.0.1:{environment['PGPORT']}/mlflow",
        "ARTIFACTS": f"s3://{bucket}/artifacts",
        "BACKUP": str(folder / "backup"),
    }
    yield Place(folder, programs, environment)
    seaweed.client().delete_bucket(Bucket=bucket)
    shutil.rmtree(folder)


def use(uri: str, home: Path, patch: pytest.MonkeyPatch) -> MlflowClient:
    patch.setenv("ALEXNET_HOME", str(home))
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    return tracking.connect(uri)


def test_champion_answers_the_same_after_database_and_bucket_were_lost(
    place, seaweed, tmp_path, monkeypatch
):
    data = write_shard_set(tmp_path / "set", train=(8, 8), val=(7,))
    x = torch.randn(2, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    with place.postgres("first"), place.mlflow() as uri, torch.inference_mode():
        client = use(uri, tmp_path / "home", monkeypatch)
        version = champion(client, data, tmp_path / "checkpoints", monkeypatch)
        kept = client.get_model_version(NAME, version)
        tags, metrics = kept.tags, client.get_run(kept.run_id).data.metrics
        before = load_model("champion").network(x)
        place.paste("Back up")

    bucket = place.environment["ARTIFACTS"].split("/")[2]
    shutil.rmtree(place.folder / "first")
    seaweed.client().delete_bucket(Bucket=bucket)
    seaweed.client().create_bucket(Bucket=bucket)

    with place.postgres("second"):
        place.paste("Restore")
        place.paste("Upgrade MLflow")
        with place.mlflow() as uri, torch.inference_mode():
            client = use(uri, tmp_path / "elsewhere", monkeypatch)
            found = client.get_model_version_by_alias(NAME, "champion")
            assert (found.version, found.tags) == (version, tags)
            assert torch.equal(load_model("champion").network(x), before)
            assert client.get_run(found.run_id).data.metrics == metrics != {}
            said = place.paste("Look at what came back", data, uri)
            assert "champion" in said and "7 images" in said


def champion(client: MlflowClient, data: str, folder: Path, patch: pytest.MonkeyPatch) -> str:
    """The number of a version that was trained for one epoch and is the champion."""
    config, manifest = small_config(name="kept", optim_epochs=1), load_manifest(data)
    with torch.inference_mode(False):
        done = fit(config, data, folder)
    run_id = tracking.open_run(client, replace(config), manifest, data).info.run_id
    tracking.Tracker(tracking.tracking_uri(), run_id).log({"val_top1": 0.5, "loss": 1.0}, 2)
    number = register(client, run_id, done.last, manifest, config)
    assert number is not None
    client.set_registered_model_alias(NAME, "champion", number)
    return number
