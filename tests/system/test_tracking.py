"""What MLflow is told: in the embedded store, through a real server, and while there is none."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Param, RunTag
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from ports import free_ports
from registered import MLFLOW_WARNINGS
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from pipelines.shards import Manifest, load_manifest
from training import tracking
from training.config import flatten, to_dict
from training.lease import Superseded

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("tracking") / "set", train=(4,), val=(2,))


@pytest.fixture(scope="module")
def manifest(data: str) -> Manifest:
    return load_manifest(data)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking-home")


@pytest.fixture(autouse=True)
def own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXNET_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # undoes what connect sets for children


@pytest.fixture
def client(own_home: None) -> MlflowClient:
    return tracking.connect(tracking.tracking_uri())


# Where


def test_embedded_store_lies_under_the_home_with_its_artifacts(client, home):
    assert (home / "mlflow.db").stat().st_size > 0
    experiment = client.get_experiment_by_name("alexnet")
    assert experiment.artifact_location == (home / "mlartifacts").as_uri()


def test_server_that_is_not_there_is_told_within_seconds():
    (port,) = free_ports(1)
    uri, start = f"http://127.0.0.1:{port}", time.monotonic()
    with pytest.raises(UserError) as told:
        tracking.connect(uri)
    assert time.monotonic() - start < 60, "MLflow's own retries take minutes"
    assert str(told.value).startswith(f"MLflow at {uri} cannot be used")
    assert "unset MLFLOW_TRACKING_URI" in str(told.value) and "\n" not in str(told.value)


# A run


def test_new_run_holds_config_data_set_and_code(client, manifest, data, tmp_path):
    config = small_config(name="whole", optim_lr=0.125)
    run = tracking.open_run(client, config, manifest, data)
    assert run.data.params == flatten(config)
    assert run.data.params["optim.lr"] == "0.125"
    tags = run.data.tags
    assert (tags["recipe"], tags["variant"], tags["data"]) == ("baseline", "ungrouped", data)
    assert (tags["manifest_sha256"], tags["plan_id"]) == (manifest.digest, manifest.plan_id)
    assert tags["mlflow.source.git.commit"] != "" and len(tags["code_sha256"]) == 64
    (used,) = run.inputs.dataset_inputs
    assert manifest.digest.startswith(used.dataset.digest) and len(used.dataset.digest) == 36
    assert json.loads(used.dataset.source) == {"uri": data, "manifest_sha256": manifest.digest}
    profile = json.loads(used.dataset.profile)
    assert profile == {"train": 4, "val": 2, "classes": 4, "crop": 227}
    saved = client.download_artifacts(run.info.run_id, "config.json", str(tmp_path))
    assert json.loads(Path(saved).read_text()) == to_dict(config)


def test_same_name_continues_its_run_with_other_workers_and_log_steps(client, manifest, data):
    config = small_config(name="twice")
    first = tracking.open_run(client, config, manifest, data)
    again = small_config(name="twice", workers=2, log_steps=7, register=False)
    assert tracking.find_run(client, again, manifest).info.run_id == first.info.run_id
    assert tracking.find_run(client, small_config(name="thrice"), manifest) is None


def test_name_of_a_run_that_learned_something_else_is_refused(client, manifest, data, tmp_path):
    tracking.open_run(client, small_config(name="taken"), manifest, data)
    with pytest.raises(UserError) as told:
        tracking.find_run(client, small_config(name="taken", optim_lr=0.5), manifest)
    assert "run taken exists with other settings (optim.lr 0.01 → 0.5)" in str(told.value)
    assert "choose another --name" in str(told.value)
    other = load_manifest(write_shard_set(tmp_path / "other", train=(5,), val=(2,)))
    with pytest.raises(UserError, match=f"manifest {manifest.digest[:16]} → {other.digest[:16]}"):
        tracking.find_run(client, small_config(name="taken"), other)


def test_run_that_was_begun_under_the_former_names_is_continued(client, manifest):
    config = small_config(name="former")
    experiment = client.get_experiment_by_name("alexnet").experiment_id
    run_id = client.create_run(experiment, run_name="former").info.run_id
    former = flatten(config) | {"recipe": "deck", "model.variant": "deck"}
    del former["shuffle_window"]  # which earlier releases did not have
    params = [Param(key, value) for key, value in former.items()]
    client.log_batch(run_id, params=params, tags=[RunTag("manifest_sha256", manifest.digest)])
    assert tracking.find_run(client, config, manifest).info.run_id == run_id


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, "FINISHED"),
        (KeyboardInterrupt, "KILLED"),
        (SystemExit, "KILLED"),
        (RuntimeError, "FAILED"),
        (UserError, "FAILED"),
        (Superseded, "RUNNING"),  # by its new writer
    ],
)
def test_status_tells_how_the_run_was_left(client, manifest, data, raised, status):
    config = small_config(name=f"left-{raised.__name__ if raised else 'well'}")
    run_id = tracking.open_run(client, config, manifest, data).info.run_id
    try:
        with tracking.run_status(client, run_id):
            assert client.get_run(run_id).info.status == "RUNNING"
            if raised is not None:
                raise raised("left")
    except BaseException as error:
        assert type(error) is raised
    else:
        assert raised is None, "swallowed"
    assert client.get_run(run_id).info.status == status
    with tracking.run_status(client, run_id):  # continued
        assert client.get_run(run_id).info.status == "RUNNING"


def test_metrics_have_their_step_and_repeated_steps_show_the_last(client, manifest, data):
    run_id = tracking.open_run(client, small_config(name="metrics"), manifest, data).info.run_id
    tracker = tracking.Tracker(tracking.tracking_uri(), run_id)
    for step, loss in ((5, 2.0), (10, 1.5), (15, 1.0)):
        tracker.log({"loss": loss, "seconds": 3.0, "steps": 5.0}, step)
    time.sleep(0.01)  # a continued run repeats the steps since its checkpoint
    tracker.log({"loss": 1.25}, 10)
    history = tracking.metric_history(client, run_id, "loss")
    assert history == [(5, 2.0), (10, 1.25), (15, 1.0)]
    assert set(client.get_run(run_id).data.metrics) == {"loss"}
    assert tracking.metric_history(client, run_id, "unknown") == []


def test_last_sign_of_a_run_is_its_newest_loss(client, manifest, data):
    run_id = tracking.open_run(client, small_config(name="signs"), manifest, data).info.run_id
    tracker = tracking.Tracker(tracking.tracking_uri(), run_id)
    assert tracker.last_logged() is None
    tracker.log({"workers": 2.0}, 0)
    assert tracker.last_logged() is None
    for step in (5, 10, 7):  # after step 10 the run went back to a checkpoint
        tracker.log({"loss": 1.0}, step)
        time.sleep(0.01)
    step, seconds = tracker.last_logged()
    assert step == 7 and 0 <= seconds < 30


# A server that comes and goes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def test_metrics_wait_on_disk_while_the_server_is_gone(server, home, manifest, data, caplog):
    client = tracking.connect(server.uri)
    run_id = tracking.open_run(client, small_config(name="spool"), manifest, data).info.run_id
    tracker, spool = tracking.Tracker(server.uri, run_id), home / "spool" / f"{run_id}.jsonl"
    tracker.log({"loss": 3.0}, 1)
    assert not spool.exists()

    server.kill()
    start = time.monotonic()
    tracker.log({"loss": 2.0, "top1": 0.5}, 2)
    tracker.log({"loss": 1.0}, 3)
    assert time.monotonic() - start < 100, "training waits for MLflow"
    assert len(spool.read_text().splitlines()) == 3
    assert "3 values wait on disk" in caplog.text
    assert tracker.last_logged()[0] == 3, "what waits on disk counts"
    tracker.attach(home, "profile")
    assert "profile could not be kept with the run" in caplog.text

    tracker.finish(patience=0)
    assert f"3 values have not reached MLflow; they stay in {spool}" in caplog.text

    starting = threading.Timer(1, server.start)
    starting.start()
    restarted = tracking.Tracker(server.uri, run_id)  # as after a restart of the worker
    restarted.finish(patience=240)  # waits for the server
    starting.join()
    assert not spool.exists()
    client = MlflowClient(tracking_uri=server.uri)
    assert tracking.metric_history(client, run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert tracking.metric_history(client, run_id, "top1") == [(2, 0.5)]
    assert client.get_run(run_id).data.params == flatten(small_config(name="spool"))
    saved = client.download_artifacts(run_id, "config.json", str(spool.parent))
    assert json.loads(Path(saved).read_text())["name"] == "spool"
