"""What MLflow is told: in the embedded store, through a real server, and while there is none."""

import base64
import dataclasses
import getpass
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answering import answering
from gated import pass_as_used
from held_answers import relayed
from mlflow.entities import Param, RunTag
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from ports import free_ports
from registered import GOOD_CONFIG
from safetensors.torch import load_file
from shard_sets import write_shard_set
from small_training import small_config
from waiting import wait_until

from alexnet.errors import UserError
from pipelines.shards import Manifest, load_manifest
from training import tracking
from training.config import flatten, to_dict
from training.lease import Superseded
from training.metrics import Tracker, metric_history, metrics_of, system_metrics
from training.preflight import preflight
from training.registry import __main__ as registry
from training.registry.package import register
from training.registry.versions import load

CONFIG = small_config(optim_lr=0.125)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("tracking") / "set", train=(4,), val=(2,))


@pytest.fixture(scope="module")
def manifest(data: str) -> Manifest:
    return load_manifest(data)


@pytest.fixture
def run_id(client: MlflowClient, manifest: Manifest, data: str) -> str:
    """Of a new run."""
    return str(tracking.open_run(client, CONFIG, manifest, data).info.run_id)


def test_new_run_holds_config_data_set_and_code(client, run_id, manifest, data, tmp_path):
    run = client.get_run(run_id)
    assert run.data.params == flatten(CONFIG)
    assert run.data.params["optim.lr"] == "0.125"
    tags = run.data.tags
    assert (tags["recipe"], tags["variant"], tags["data"]) == ("baseline", "ungrouped", data)
    assert (tags["manifest_sha256"], tags["plan_id"]) == (manifest.digest, manifest.plan_id)
    source = ("LOCAL", "training/run.py")
    assert (tags["mlflow.source.type"], tags["mlflow.source.name"]) == source
    assert tags["mlflow.user"] == getpass.getuser()
    assert tags["mlflow.source.git.commit"] != "" and len(tags["code_sha256"]) == 64
    counts = {}
    for used in run.inputs.dataset_inputs:
        assert manifest.digest.startswith(used.dataset.digest) and len(used.dataset.digest) == 36
        assert json.loads(used.dataset.source) == {"uri": data, "manifest_sha256": manifest.digest}
        counts[used.tags[0].value] = json.loads(used.dataset.profile)["num_rows"]
    assert counts == {"training": 4, "eval": 2}
    saved = client.download_artifacts(run_id, "config.json", str(tmp_path))
    assert json.loads(Path(saved).read_text()) == to_dict(CONFIG)


@pytest.mark.parametrize("before", ["", "genai_development_inferred", "genai_development"])
def test_experiment_opens_as_model_training_unless_somebody_chose(client, before):
    number = client.get_experiment_by_name("alexnet").experiment_id
    assert client.get_experiment(number).tags["mlflow.experimentKind"] == "custom_model_development"
    client.set_experiment_tag(number, "mlflow.experimentKind", before)
    tracking.connect(tracking.tracking_uri(), write=True)
    kind = client.get_experiment(number).tags["mlflow.experimentKind"]
    chosen = before == "genai_development"
    assert kind == ("genai_development" if chosen else "custom_model_development")


@pytest.mark.parametrize(
    ("flag", "variable", "wanted"),
    [(None, "", "alexnet"), (None, "ours", "ours"), ("mine", "ours", "mine")],
)
def test_experiment_is_that_of_the_flag_or_else_of_the_variable(
    used_home, data, monkeypatch, flag, variable, wanted
):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", variable)
    config = small_config(data=data, storage=str(used_home / "runs"), experiment=flag)
    job, client = preflight(config, alone=True)
    run = tracking.open_run(client, job.config, job.manifest, data)
    assert client.get_experiment(run.info.experiment_id).name == wanted
    assert tracking.find_run(client, config, job.manifest).info.run_id == run.info.run_id
    assert run.data.params["experiment"] == wanted


def test_experiment_that_mlflow_refuses_is_told_in_one_line(client):
    with pytest.raises(UserError, match=r"takes no experiment 'xxx.*choose another --experiment"):
        tracking.connect(tracking.tracking_uri(), "x" * 600, write=True)


def test_same_name_continues_its_run_with_other_workers_and_log_steps(client, run_id, manifest):
    again = small_config(optim_lr=0.125, workers=2, log_steps=7, register=False)
    assert tracking.find_run(client, again, manifest).info.run_id == run_id
    assert tracking.find_run(client, small_config(name="other"), manifest) is None


def test_name_of_a_run_that_learned_something_else_is_refused(client, run_id, manifest, tmp_path):
    with pytest.raises(UserError) as told:
        tracking.find_run(client, small_config(optim_lr=0.5), manifest)
    assert "run small exists with other settings (optim.lr 0.125 → 0.5)" in str(told.value)
    assert "choose another --name" in str(told.value)
    other = load_manifest(write_shard_set(tmp_path / "other", train=(5,), val=(2,)))
    with pytest.raises(UserError, match=f"manifest {manifest.digest[:16]} → {other.digest[:16]}"):
        tracking.find_run(client, CONFIG, other)


def test_run_that_was_begun_under_the_former_names_is_continued(client, manifest):
    experiment = client.get_experiment_by_name("alexnet").experiment_id
    run_id = client.create_run(experiment, run_name="small").info.run_id
    former = flatten(CONFIG) | {"recipe": "deck", "model.variant": "deck"}
    del former["shuffle_window"]  # which earlier releases did not have
    params = [Param(key, value) for key, value in former.items()]
    client.log_batch(run_id, params=params, tags=[RunTag("manifest_sha256", manifest.digest)])
    assert tracking.find_run(client, CONFIG, manifest).info.run_id == run_id


def test_metrics_are_in_groups_and_those_of_earlier_releases_are_read_with_them(client, run_id):
    former = {"loss": 3.0, "val_top1": 0.1, "workers": 1.0}
    for name, value in former.items():
        client.log_metric(run_id, name, value, step=1)
    line = {"loss": 2.0, "val_top1": 0.5, "data_wait": 0.1, "images_per_second": 9.0}
    tracker = Tracker(tracking.tracking_uri(), run_id)
    tracker.log(line, 2)
    tracker.wait()
    run = client.get_run(run_id)
    grouped = {"train/loss", "val/top1", "data/wait", "time/images_per_second"}
    assert run.data.metrics.keys() - former.keys() == grouped
    assert metrics_of(run) == former | line
    assert metric_history(client, run_id, "val_top1") == [(1, 0.1), (2, 0.5)]


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (KeyboardInterrupt, "KILLED"),
        (SystemExit, "KILLED"),
        (RuntimeError, "FAILED"),
        (UserError, "FAILED"),
        (Superseded, "RUNNING"),  # by its new writer
    ],
)
def test_status_tells_how_the_run_was_left(client, run_id, raised, status):
    with pytest.raises(raised), tracking.run_status(client, run_id):
        assert client.get_run(run_id).info.status == "RUNNING"
        raise raised("left")
    assert client.get_run(run_id).info.status == status
    with tracking.run_status(client, run_id):  # continued
        assert client.get_run(run_id).info.status == "RUNNING"
    assert client.get_run(run_id).info.status == "FINISHED"


def test_metrics_have_their_step_and_repeated_steps_show_the_last(client, run_id):
    tracker = Tracker(tracking.tracking_uri(), run_id)
    for step, loss in ((5, 2.0), (10, 1.5), (15, 1.0)):
        tracker.log({"loss": loss, "seconds": 3.0, "steps": 5.0}, step)
    time.sleep(0.01)  # a continued run repeats the steps since its checkpoint
    tracker.log({"loss": 1.25}, 10)
    tracker.wait()
    history = metric_history(client, run_id, "loss")
    assert history == [(5, 2.0), (10, 1.25), (15, 1.0)]
    assert set(client.get_run(run_id).data.metrics) == {"train/loss"}
    assert metric_history(client, run_id, "lr") == []


def test_last_sign_of_a_run_is_its_newest_loss(run_id):
    tracker = Tracker(tracking.tracking_uri(), run_id)
    tracker.log({"workers": 2.0}, 0)
    assert tracker.last_logged() is None
    for step in (5, 10, 7):  # after step 10 the run went back to a checkpoint
        tracker.log({"loss": 1.0}, step)
        time.sleep(0.01)
    step, seconds = tracker.last_logged()
    assert step == 7 and 0 <= seconds < 30


# A server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def served(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    return tracking.connect(server.uri)


def test_end_of_a_run_on_a_server_prints_nothing_of_mlflows(served, manifest, data, capsys):
    run_id = tracking.open_run(served, CONFIG, manifest, data).info.run_id
    with tracking.run_status(served, run_id):
        pass
    assert served.get_run(run_id).info.status == "FINISHED"
    assert capsys.readouterr() == ("", "")


@pytest.mark.timeout(60)  # MLflow's own retries take minutes
def test_server_that_is_not_there_is_told_within_seconds(monkeypatch):
    (port,) = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with pytest.raises(UserError) as told:
        tracking.connect(tracking.tracking_uri())
    assert str(told.value).startswith(f"MLflow at http://127.0.0.1:{port} cannot be used")
    assert "unset MLFLOW_TRACKING_URI" in str(told.value)


def test_registry_that_is_not_there_or_would_refuse_the_artifacts_is_told_before_a_training(
    served, server, monkeypatch
):
    (port,) = free_ports(1)
    same_by_another_name = server.uri.replace("127.0.0.1", "localhost")
    for uri, told in (
        (f"http://127.0.0.1:{port}", "cannot be used"),
        (same_by_another_name, "takes no model from mlflow-artifacts:"),
    ):
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
        with pytest.raises(UserError, match=f"^MLflow's registry at {uri} {told}") as refused:
            tracking.connect(server.uri, write=True)
        assert "unset MLFLOW_REGISTRY_URI" in str(refused.value)


def test_version_registered_through_a_server_is_read_from_it(served, registered_models):
    data, manifest = registered_models.data, load_manifest(registered_models.data)
    run_id = tracking.open_run(served, GOOD_CONFIG, manifest, data).info.run_id
    register(served, run_id, registered_models.checkpoint, manifest, GOOD_CONFIG)
    found = load("models:/alexnet@candidate")
    weights = load_file(registered_models.checkpoint / "model.safetensors")
    assert all(weights[name].equal(value) for name, value in found.network.state_dict().items())


def test_one_promotion_through_a_server_calls_a_webhook_once_with_its_signature(
    served, registered_models, monkeypatch
):
    data, manifest = registered_models.data, load_manifest(registered_models.data)
    run_id = tracking.open_run(served, GOOD_CONFIG, manifest, data).info.run_id
    config = dataclasses.replace(GOOD_CONFIG, model_name="called")
    register(served, run_id, registered_models.checkpoint, manifest, config)
    pass_as_used(monkeypatch)
    calls: list[tuple[Any, bytes]] = []
    events = ["model_version_alias.created", "model_version_alias.deleted"]
    events += ["registered_model.created", "model_version.created"]
    with answering(200, asked=calls) as uri:
        served.create_webhook("deploy", uri, events, secret="geheim")
        assert registry.main(["promote", "--model", "called", "--dry-run"]) == 0
        assert registry.main(["promote", "--model", "called"]) == 0
        wait_until(lambda: bool(calls))
        served.set_registered_model_alias("called", "last", "1")  # which comes after all others
        wait_until(lambda: b'"last"' in calls[-1][1])
    (headers, body), _ = calls
    told = json.loads(body)
    assert (told["entity"], told["action"]) == ("model_version_alias", "created")
    assert told["data"] == {"name": "called", "alias": "champion", "version": "1"}
    signed = f"{headers['X-MLflow-Delivery-Id']}.{headers['X-MLflow-Timestamp']}.".encode() + body
    digest = hmac.digest(b"geheim", signed, "sha256")
    assert headers["X-MLflow-Signature"] == f"v1,{base64.b64encode(digest).decode()}"


def test_logging_returns_while_mlflow_has_not_answered_and_later_lines_go_together(
    served, server, manifest, data
):
    run_id = tracking.open_run(served, CONFIG, manifest, data).info.run_id
    with relayed(server.uri) as relay:
        tracker = Tracker(relay.uri, run_id)
        relay.hold()
        tracker.log({"loss": 1.0}, 1)
        wait_until(lambda: relay.asked)
        for step in range(2, 6):
            tracker.log({"loss": 1.0 / step}, step)
        tracker.tag("hardware", "a slow line")
        assert len(relay.asked) == 1 and not relay.answered, "somebody waited for the answer"
        relay.answer()
        tracker.finish()
        assert [path.rpartition("/")[2] for path in relay.answered] == [
            "log-batch",
            "log-batch",
            "set-tag",
        ]
    assert metric_history(served, run_id, "loss") == [(step, 1 / step) for step in range(1, 6)]


def test_load_of_the_node_is_logged_again_after_mlflow_was_away_without_a_word_of_that(
    served, server, manifest, data, monkeypatch, caplog
):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    run_id = tracking.open_run(served, CONFIG, manifest, data).info.run_id
    name = f"system/{socket.gethostname()}/cpu_utilization_percentage"

    def steps() -> set[int]:
        return {point.step for point in served.get_metric_history(run_id, name)}

    with relayed(server.uri) as relay, system_metrics(relay.uri, run_id):
        wait_until(steps)
        relay.failing, asked = True, len(relay.asked)
        wait_until(lambda: len(relay.asked) > asked + 2)
        before = steps()
        relay.failing = False
        wait_until(lambda: max(steps()) > max(before) + 1)
    assert caplog.text == ""


def test_metrics_wait_on_disk_while_the_server_is_gone(
    served, server, home, manifest, data, caplog
):
    run_id = tracking.open_run(served, CONFIG, manifest, data).info.run_id
    tracker, spool = Tracker(server.uri, run_id), home / "spool" / f"{run_id}.jsonl"
    tracker.log({"loss": 3.0}, 1)
    tracker.wait()
    assert not spool.exists()

    server.kill()
    tracker.log({"loss": 2.0, "top1": 0.5}, 2)
    tracker.wait()
    tracker.log({"loss": 1.0}, 3)
    tracker.wait()
    assert len(spool.read_text().splitlines()) == 3
    assert "3 values wait on disk" in caplog.text
    assert tracker.last_logged()[0] == 3, "what waits on disk counts"
    tracker.attach(home, "profile")
    assert "profile could not be kept with the run" in caplog.text
    tracker.finish(patience=0)
    assert f"3 values have not reached MLflow; they stay in {spool}" in caplog.text

    starting = threading.Timer(1, server.start)
    starting.start()
    restarted = Tracker(server.uri, run_id)  # as after a restart of the worker
    restarted.finish(patience=240)  # waits for the server
    starting.join()
    assert not spool.exists()
    assert metric_history(served, run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert metric_history(served, run_id, "top1") == [(2, 0.5)]
    assert served.get_run(run_id).data.params == flatten(CONFIG)
    saved = served.download_artifacts(run_id, "config.json", str(home))
    assert json.loads(Path(saved).read_text()) == to_dict(CONFIG)
