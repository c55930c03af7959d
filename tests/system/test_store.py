"""The store of MLflow: what its URI may be, why it cannot be used, and a home that was moved."""

import shutil
import sqlite3
from collections import OrderedDict
from contextlib import closing
from pathlib import Path

import pytest
from answering import answering
from mlflow.tracking._tracking_service import utils as service
from registered import GOOD
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import tracking
from training.registry.versions import load


@pytest.fixture(autouse=True)
def no_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


# Which


def test_database_of_mlflows_own_form_is_used_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("sqlite+pysqlite:///./mlflow.db", "sqlite:///mlflow.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        found = tracking.tracking_uri()
        assert found == f"sqlite:///{tmp_path / 'mlflow.db'}" and found.startswith("sqlite:////")
    experiment = tracking.connect(found).get_experiment_by_name("alexnet")
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()
    assert (tmp_path / "mlflow.db").stat().st_size > 0


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("./mlruns", "sqlite:///FILE"),
        ("file:///mlruns", "sqlite:///FILE"),
        ("127.0.0.1:5000", "http://HOST:PORT"),
        ("htp://host", "http://HOST:PORT"),
        ("databricks", "http://HOST:PORT"),
        ("http://", "names no host"),
        ("http://[", "http://HOST:PORT"),
        ("http://host:port", "http://HOST:PORT"),
        ("http://me:geheim@host", "MLFLOW_TRACKING_PASSWORD"),
        ("https://geheim@host", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://me:geheim@host/mlflow", "--backend-store-uri"),
        ("postgresql+psycopg2://me:ge/heim@host/x?password=geheim", "--backend-store-uri"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///x.db?mode=ro", "holds '\\?'"),
    ],
)
def test_uri_of_no_server_and_no_file_is_refused_without_its_password(uri, told, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=told) as refused:
        tracking.tracking_uri()
    assert "MLFLOW_TRACKING_URI" in str(refused.value) and "heim" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/below")
    assert tracking.tracking_uri() == "http://host:5000/below"


# Why not


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(statement)
        database.commit()


@pytest.mark.parametrize(
    ("fault", "told", "remedy"),
    [
        ("garbage", "is no database", "move it away"),
        ("torn", "is no database, or damaged", "move it away"),
        ("other", "a database of another program", "MLFLOW_TRACKING_URI"),
        ("older", "of an older MLflow", "run `python -m mlflow db upgrade sqlite:///"),
        ("newer", "of a newer MLflow", "install that one or a newer one"),
        ("locked", "database is locked", "another program is at work"),
        ("folder", "unable to open", "set ALEXNET_HOME to a folder that you can write"),
    ],
)
def test_embedded_store_that_cannot_be_used_has_a_remedy_of_its_own(
    fault, told, remedy, home, empty_store
):
    path = home / "mlflow.db"
    home.mkdir(exist_ok=True)
    if fault == "garbage":
        path.write_bytes(b"this is no database" * 100)
    elif fault == "other":
        change(path, "create table users (name)")
    elif fault == "folder":
        path.mkdir()
    else:
        shutil.copy(empty_store, path)
    if fault == "torn":
        path.write_bytes(empty_store.read_bytes()[:100_000])
    elif fault in ("older", "newer"):
        revision = {"older": "181f10493468", "newer": "ffffffffffff"}[fault]
        change(path, f"update alembic_version set version_num = '{revision}'")
    with closing(sqlite3.connect(":memory:" if fault != "locked" else path)) as other:
        other.execute("begin exclusive")
        with pytest.raises(UserError, match=told) as refused:
            tracking.connect(tracking.tracking_uri())
    line = str(refused.value)
    assert remedy in line
    assert "unset MLFLOW_TRACKING_URI" not in line, "it is not set"


def test_home_below_a_file_is_told_to_be_set_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match="set ALEXNET_HOME to a folder that you can write"):
        tracking.connect(tracking.tracking_uri())


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b"<html>Ray's dashboard</html>", "what answers there is no MLflow"),
        (200, b"{}", "what answers there is no MLflow"),
        (404, b'{"detail": "Not Found"}', "what answers there is no MLflow"),
        (404, b"nothing here", "what answers there is no MLflow"),
        (401, b"", "set MLFLOW_TRACKING_USERNAME"),
        (403, b"no", "the right to write"),
        (403, b"Invalid Host header", "--allowed-hosts"),
        (503, b"", "look at the server's log"),
    ],
)
def test_server_that_answers_otherwise_has_a_remedy_of_its_own(status, body, told):
    with answering(status, body) as uri, pytest.raises(UserError) as refused:
        tracking.connect(uri)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("scheme", "told"),
    [("https://127.0.0.1", "begin with http://"), ("http://no-host.invalid", "no host")],
)
def test_server_that_is_elsewhere_or_speaks_otherwise_is_told_apart(scheme, told):
    with answering(200, b"") as uri, pytest.raises(UserError, match=told):
        tracking.connect(f"{scheme}:{uri.rpartition(':')[2]}")


# A home that was moved


@pytest.fixture
def filled(used_home: Path) -> Path:
    """A home with shards and a run."""
    client = tracking.connect(tracking.tracking_uri())
    data = write_shard_set(used_home / "shards" / "s", train=(4,), val=(2,))
    config = small_config(data=data, storage=str(used_home / "runs"))
    tracking.open_run(client, config, load_manifest(data), data)
    return used_home


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", ["moved", "copied"])
def test_moved_home_is_used_where_it_is_now(left, filled, tmp_path, monkeypatch):
    moved = tmp_path / "an other#disk" / "home"
    shutil.copytree(filled, moved)
    before = content(filled)
    if left == "moved":
        shutil.rmtree(filled)
        before = {}
    monkeypatch.setenv("ALEXNET_HOME", str(moved))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    # As in a new process: MLflow keeps in mind where it wrote for a run.
    monkeypatch.setattr(service, "_artifact_repos_cache", OrderedDict())
    client = tracking.connect(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("alexnet")
    assert experiment.artifact_location == (moved / "mlartifacts").as_uri()
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["data"] == str(moved / "shards" / "s")
    assert run.data.params["storage"] == str(moved / "runs")
    assert str(moved) in run.inputs.dataset_inputs[0].dataset.source
    client.log_text(run.info.run_id, "new", "new.txt")
    found = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert found == {"config.json", "new.txt"}
    assert load_manifest(run.data.tags["data"]).num_samples("val") == 2
    assert filled.exists() == (left == "copied") and content(filled) == before


def test_registered_model_is_read_from_the_moved_home(registered_models, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(registered_models.folder / "home", moved)
    monkeypatch.setenv("ALEXNET_HOME", str(moved))
    client = tracking.connect(tracking.tracking_uri())
    load(f"models:/alexnet/{GOOD}")
    model_id = client.get_model_version("alexnet", GOOD).source.removeprefix("models:/")
    (weights,) = moved.rglob(f"{model_id}/**/model.safetensors")
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"model\.safetensors changed"):
        load(f"models:/alexnet/{GOOD}")
    shutil.rmtree(moved / "mlartifacts")
    (moved / "mlartifacts").mkdir()
    with pytest.raises(UserError) as told:
        load(f"models:/alexnet/{GOOD}")
    assert "register it again" not in str(told.value), "its files were not changed, they are gone"


def test_store_of_the_users_own_is_left_as_it_is(filled, tmp_path):
    shutil.copytree(filled, tmp_path / "other")
    uri = f"sqlite:///{tmp_path / 'other' / 'mlflow.db'}"
    experiment = tracking.connect(uri).get_experiment_by_name("alexnet")
    assert experiment.artifact_location == (filled / "mlartifacts").as_uri()
