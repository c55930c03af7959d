"""The dry run: what it says is so, what it refuses would fail later, and it starts nothing."""

import dataclasses
import pickle
import re
import shutil

import pytest
import ray
from mlflow.tracking import MlflowClient
from registered import MLFLOW_WARNINGS
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import load_manifest
from training import lease, tracking
from training.config import TrainConfig
from training.preflight import (
    check_node,
    dry_run,
    preflight,
    resolve,
)
from training.worker import refuse_changed

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]
pytestmark += [pytest.mark.usefixtures("used_home")]


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
