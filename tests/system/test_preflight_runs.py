"""MLflow's run and the checkpoints of a name: what one remembers and the other does not."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from registered import MLFLOW_WARNINGS
from shard_sets import write_shard_set
from small_training import small_config

from alexnet.errors import UserError
from pipelines.shards import Manifest, load_manifest
from training import checkpoint, tracking
from training.config import TrainConfig, to_dict
from training.preflight import agreed

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("memories") / "set"
    return load_manifest(write_shard_set(folder, train=(4,), val=(2,)))


@pytest.fixture
def client(used_home: Path) -> MlflowClient:
    return tracking.connect(tracking.tracking_uri())


def config_of(home: Path, **changes: Any) -> TrainConfig:
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
    config = config_of(home)
    assert agreed(client, config, manifest) is None
    run_id = opened(client, config, manifest)
    store(client, run_id, config, manifest)
    assert agreed(client, config, manifest).info.run_id == run_id


def test_run_that_ended_before_its_first_checkpoint_begins_again(client, home, manifest):
    config = config_of(home)
    run_id = opened(client, config, manifest)
    client.log_metric(run_id, "loss", 1.0, step=2)
    assert agreed(client, config, manifest).info.run_id == run_id


@pytest.mark.parametrize("seed", [0, 1])
def test_printed_commands_bring_a_deleted_run_and_experiment_back(client, home, manifest, seed):
    config = config_of(home, name="Größe")
    run_id = opened(client, config, manifest)
    again = config_of(home, name="Größe", seed=seed)
    client.delete_run(run_id)
    line = refusal(client, again, manifest)
    assert "was deleted in MLflow" in line and "choose another --name" in line
    if seed:
        return
    copied(line)
    assert agreed(client, config, manifest).info.run_id == run_id
    client.delete_experiment(client.get_experiment_by_name("alexnet").experiment_id)
    copied(refusal(client, config_of(home, name="new"), manifest))
    assert agreed(client, config, manifest).info.run_id == run_id


def copied(line: str) -> None:
    (command,) = re.findall("`(.+)`", line)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PATH": path})


def test_finished_run_is_finished_wherever_its_checkpoints_are(client, home, manifest):
    config = config_of(home)
    run_id = opened(client, config, manifest)
    client.set_tag(run_id, tracking.STORED, "3")
    client.set_terminated(run_id, "FINISHED")
    assert agreed(client, config, manifest).info.status == "FINISHED"


def test_run_whose_checkpoints_are_gone_is_not_begun_again(client, home, manifest):
    config = config_of(home)
    run_id = opened(client, config, manifest)
    shutil.rmtree(store(client, run_id, config, manifest))
    line = refusal(client, config, manifest)
    assert "has stored a checkpoint of step 3" in line and "--storage" not in line
    elsewhere = small_config(storage=str(home / "elsewhere"))
    assert f"pass --storage {config.storage} as before" in refusal(client, elsewhere, manifest)


def test_checkpoints_of_a_run_that_mlflow_does_not_have_are_not_taken(client, home, manifest):
    config = config_of(home)
    run_id = opened(client, config, manifest)
    store(client, run_id, config, manifest)
    other = tracking.connect(f"sqlite:///{home / 'other.db'}")
    line = refusal(other, config, manifest)
    assert f"of MLflow's run {run_id}, which MLflow at sqlite:///" in line and "other.db" in line
    opened(other, config, manifest)
    assert "its run small is another" in refusal(other, config, manifest)


def test_run_with_another_name_by_now_is_told_by_it(client, home, manifest):
    config = config_of(home)
    run_id = opened(client, config, manifest)
    store(client, run_id, config, manifest)
    client.update_run(run_id, name="best")
    assert "is named best there" in refusal(client, config, manifest)
    client.delete_run(run_id)
    assert f"runs restore --run-id {run_id}" in refusal(client, config, manifest)


def test_of_two_runs_of_one_name_that_of_the_checkpoints_goes_on(client, home, manifest):
    config = config_of(home)
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
    config = config_of(home)
    run_id = opened(client, config, manifest)
    other = config_of(home, optim_lr=0.5)
    folder = store(client, run_id, other, manifest)
    assert "optim.lr: 0.5 -> 0.01" in refusal(client, config, manifest)
    (folder / "state.json").write_text("{}")
    assert "is whole; start again under another --name" in refusal(client, config, manifest)


def test_value_that_mlflow_would_cut_is_refused(client, home, manifest):
    long = config_of(home, optim_milestones=tuple(range(2000)))
    assert "--optim.milestones [0, 1" in refusal(client, long, manifest)
