"""What is asked before a run: the dry run, which starts nothing, and what is known of its name."""

import dataclasses
import pickle
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import ray
import torch
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import Manifest, load_manifest
from training import checkpoint, lease, tracking
from training.config import TrainConfig, to_dict
from training.metrics import Tracker
from training.preflight import agreed, check_node, dry_run, preflight, resolve
from training.worker import refuse_changed

pytestmark = pytest.mark.usefixtures("used_home")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("dry") / "set", train=(11, 10), val=(4,))


def config_of(data: str, **changes) -> TrainConfig:
    return small_config(data=data, device="cpu", **changes)


def test_table_has_data_steps_checkpoints_and_state_and_nothing_is_started(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    told = dry_run(config_of(data, checkpoint_steps=2))
    manifest = load_manifest(data)
    assert f"{data} ({manifest.digest[:12]}): 21 train and 4 val samples of 4 classes, 227" in told
    assert "3 in an epoch, 6 in 2 epochs; batches of 8 over 1 worker(s)" in told
    assert "at the end, after the best epochs, every 2 steps, every 10 minutes" in told
    assert f"to {tmp_path / 'home' / 'runs'}/small" in told
    assert "run small is new" in told
    client = tracking.connect(tracking.tracking_uri())
    assert client.search_runs([client.get_experiment_by_name("alexnet").experiment_id]) == []
    assert list((tmp_path / "home" / "runs").iterdir()) == []


def test_job_for_the_workers_is_resolved_and_shows_no_manifest(data, tmp_path):
    shutil.copytree(data, tmp_path / "set")
    job, _ = preflight(config_of(str(tmp_path / "set"), name=None, storage=None), alone=True)
    assert job.folder == str(tmp_path / "home" / "runs" / job.config.name) and job.run_id is None
    assert job.manifest.plan_id not in str(job), "Ray's dashboard shows it"
    handed = pickle.loads(pickle.dumps(job))
    assert handed == job
    refuse_changed(handed)
    (tmp_path / "set" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=f"changed under the run.* was {job.manifest.digest[:16]};"):
        refuse_changed(handed)


def test_hours_are_those_of_the_newest_run_of_the_same_network(data):
    unknown = "0.01 h at 1,000 img/s; no run of this network and precision has shown a rate"
    assert f"time        {unknown}" in dry_run(config_of(data, optim_epochs=1714))
    config, manifest = resolve(config_of(data))
    client: MlflowClient = tracking.connect(tracking.tracking_uri())
    run_id = tracking.open_run(client, config, manifest, data).info.run_id
    tracker = Tracker(tracking.tracking_uri(), run_id)
    tracker.tag("hardware", "an abacus")
    for step, rate in enumerate([0.001, 0.002, 0.004]):
        tracker.log({"images_per_second": rate}, step)
    tracker.finish()
    # 21 images, 7 epochs: 147 / 0.002 s
    told = dry_run(config_of(data, name="next", optim_epochs=7))
    assert "about 20.42 h, at the 0 img/s of run small on an abacus" in told
    other = dry_run(config_of(data, name="other", model_width=1 / 16))
    assert "no run of this network" in other


def test_run_that_exists_is_told_to_continue(data):
    config, manifest = resolve(config_of(data))
    client: MlflowClient = tracking.connect(tracking.tracking_uri())
    tracking.open_run(client, config, manifest, data)
    assert "run small exists (RUNNING): it continues" in dry_run(config)
    with pytest.raises(UserError, match=r"other settings \(optim\.lr"):
        dry_run(config_of(data, optim_lr=0.5))


def test_run_that_is_being_written_is_refused_and_one_that_may_be_is_told(
    data, tmp_path, monkeypatch
):
    with lease.held(str(tmp_path / "home" / "runs" / "small")):
        with pytest.raises(UserError, match="run small is being written by"):
            dry_run(config_of(data))
        monkeypatch.setattr(lease, "_system", lambda: "another machine")
        assert re.search(
            r"^writer +perhaps still .*: the run would wait$", dry_run(config_of(data)), re.M
        )


def test_batch_beyond_the_memory_is_refused_with_one_that_fits(data):
    with pytest.raises(UserError, match=r"needs about .* GB each, this machine has") as refused:
        dry_run(config_of(data, optim_batch_size=10**8))
    fits = int(re.search(r"pass --optim\.batch-size (\d+)", str(refused.value))[1])
    assert 1 <= fits < 10**8
    assert "memory" in dry_run(config_of(data, optim_batch_size=fits))


def test_disk_without_room_for_the_checkpoints_is_refused(data, small_disk):
    with pytest.raises(UserError, match=r"GB free and the checkpoints of this run take"):
        dry_run(config_of(data, storage=str(small_disk)))


def test_disk_without_room_for_the_decoded_images_is_refused_with_both_sizes_and_a_limit_fits(
    data, small_disk, tmp_path, monkeypatch
):
    """A row of 227 * 227 * 3 bytes takes 38 pages; each file has two more."""
    needed = (25 * 38 + 2 * 2) * 4096
    config = config_of(data, storage=str(tmp_path / "runs"), cache="decoded")
    shown = f"{needed / 1e9:.2f} GB of images on each node's disk in {tmp_path}/home/cache/decoded"
    assert shown in dry_run(config)
    job, _ = preflight(config, alone=True)
    monkeypatch.setenv("ALEXNET_HOME", str(small_disk))
    with pytest.raises(UserError) as told:
        dry_run(config)
    assert str(told.value) == (
        f"{small_disk}/cache has 0.00 GB free and the decoded images take {needed / 1e9:.2f} GB; "
        "make room on this node, set ALEXNET_HOME to another disk, or pass a lower --decoded-gb"
    )
    check_node(dataclasses.replace(job, config=dataclasses.replace(config, decoded_gb=1e-5)))


def test_storage_that_deletes_nothing_is_told_and_trained_on(data, monkeypatch, caplog):
    def refused(uri: str) -> None:
        raise UserError(f"{uri}: Access Denied")

    monkeypatch.setattr(storage, "delete", refused)
    dry_run(config_of(data))
    assert "old checkpoints will stay" in caplog.text and "Access Denied" in caplog.text


# MLflow's run and the checkpoints of a name: what one remembers and the other does not


@pytest.fixture(scope="module")
def manifest(data: str) -> Manifest:
    return load_manifest(data)


def stored_in(home: Path, **changes) -> TrainConfig:
    return small_config(storage=str(home / "runs"), **changes)


def opened(client: MlflowClient, config: TrainConfig, manifest: Manifest) -> str:
    return str(tracking.open_run(client, config, manifest, "/data").info.run_id)


def store(client: MlflowClient, run_id: str, config: TrainConfig, manifest: Manifest) -> Path:
    """A checkpoint of step 3, as a worker would keep it, and what it tells MLflow."""
    folder = Path(str(config.storage)) / str(config.name) / "checkpoint-00000003-0a0a0a"
    state = {"step": 3, "run_id": run_id, "manifest": manifest.digest, "config": to_dict(config)}
    checkpoint.save(folder, {"model": {"w": torch.zeros(1)}, "optimizer": {}}, state)
    client.set_tag(run_id, tracking.STORED, "3")
    return folder


def refusal(client: MlflowClient, config: TrainConfig, manifest: Manifest) -> str:
    with pytest.raises(UserError) as told:
        agreed(client, config, manifest)
    assert str(told.value).isprintable()
    return str(told.value)


def test_name_that_neither_knows_is_new_and_one_that_both_know_goes_on(client, home, manifest):
    config = stored_in(home)
    assert agreed(client, config, manifest) is None
    run_id = opened(client, config, manifest)
    store(client, run_id, config, manifest)
    assert agreed(client, config, manifest).info.run_id == run_id


def test_run_that_ended_before_its_first_checkpoint_begins_again(client, home, manifest):
    config = stored_in(home)
    run_id = opened(client, config, manifest)
    client.log_metric(run_id, "loss", 1.0, step=2)
    assert agreed(client, config, manifest).info.run_id == run_id


def test_printed_commands_bring_a_deleted_run_and_experiment_back(
    client, home, manifest, monkeypatch
):
    config = stored_in(home, name="Größe")
    run_id = opened(client, config, manifest)
    client.delete_run(run_id)
    line = refusal(client, stored_in(home, name="Größe", seed=1), manifest)
    assert "was deleted in MLflow" in line and "choose another --name" in line
    copied(refusal(client, config, manifest), monkeypatch)
    assert agreed(client, config, manifest).info.run_id == run_id
    client.delete_experiment(client.get_experiment_by_name("alexnet").experiment_id)
    copied(refusal(client, stored_in(home, name="new"), manifest), monkeypatch)
    assert agreed(client, config, manifest).info.run_id == run_id


def copied(line: str, patch: pytest.MonkeyPatch) -> None:
    """Runs the command of a line here."""
    (command,) = re.findall("`(.+)`", line)
    setting, *program = shlex.split(command)
    patch.setenv(*setting.split("=", 1))
    assert program[:3] == ["python", "-m", "mlflow"]
    with warnings.catch_warnings(action="ignore"):  # of SQLAlchemy, about MLflow's models
        from mlflow.cli import cli

        cli.main(program[3:], standalone_mode=False)


def test_finished_run_is_finished_wherever_its_checkpoints_are(client, home, manifest):
    config = stored_in(home)
    run_id = opened(client, config, manifest)
    client.set_tag(run_id, tracking.STORED, "3")
    client.set_terminated(run_id, "FINISHED")
    assert agreed(client, config, manifest).info.status == "FINISHED"


def test_run_whose_checkpoints_are_gone_is_not_begun_again(client, home, manifest):
    config = stored_in(home)
    run_id = opened(client, config, manifest)
    shutil.rmtree(store(client, run_id, config, manifest))
    line = refusal(client, config, manifest)
    assert "has stored a checkpoint of step 3" in line and "--storage" not in line
    elsewhere = small_config(storage=str(home / "elsewhere"))
    assert f"pass --storage {config.storage} as before" in refusal(client, elsewhere, manifest)


def test_checkpoints_of_a_run_that_mlflow_does_not_have_are_not_taken(client, home, manifest):
    config = stored_in(home)
    run_id = opened(client, config, manifest)
    store(client, run_id, config, manifest)
    other = tracking.connect(f"sqlite:///{home / 'other.db'}")
    line = refusal(other, config, manifest)
    assert f"of MLflow's run {run_id}, which MLflow at sqlite:///" in line and "other.db" in line
    opened(other, config, manifest)
    assert "its run small is another" in refusal(other, config, manifest)


def test_run_with_another_name_by_now_is_told_by_it(client, home, manifest):
    config = stored_in(home)
    run_id = opened(client, config, manifest)
    store(client, run_id, config, manifest)
    client.update_run(run_id, name="best")
    assert "is named best there" in refusal(client, config, manifest)
    client.delete_run(run_id)
    assert f"runs restore --run-id {run_id}" in refusal(client, config, manifest)


def test_of_two_runs_of_one_name_that_of_the_checkpoints_goes_on(client, home, manifest):
    config = stored_in(home)
    run_id = opened(client, config, manifest)
    store(client, run_id, config, manifest)
    client.update_run(run_id, name="aside")
    opened(client, config, manifest)
    client.update_run(run_id, name="small")
    assert agreed(client, config, manifest).info.run_id == run_id
    experiment = client.get_experiment_by_name("alexnet").experiment_id
    assert len(client.search_runs([experiment], run_view_type=ViewType.ALL)) == 2


def test_checkpoints_of_other_settings_or_damaged_ones_are_told_before_the_start(
    client, home, manifest
):
    config = stored_in(home)
    run_id = opened(client, config, manifest)
    other = stored_in(home, optim_lr=0.5)
    folder = store(client, run_id, other, manifest)
    assert "optim.lr: 0.5 -> 0.01" in refusal(client, config, manifest)
    (folder / "state.json").write_text("{}")
    assert "is whole; start again under another --name" in refusal(client, config, manifest)


def test_value_that_mlflow_would_cut_is_refused(client, home, manifest):
    long = stored_in(home, optim_milestones=tuple(range(2000)))
    assert "--optim.milestones [0, 1" in refusal(client, long, manifest)
