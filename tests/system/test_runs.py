"""training/runs.py: what runs left, and how it goes."""

import json
from pathlib import Path

import pytest
from made_checkpoints import made
from mlflow.tracking import MlflowClient
from shard_sets import write_shard_set
from small_training import small_config

from pipelines import storage
from pipelines.shards import load_manifest
from training import lease, runs, tracking
from training.metrics import Tracker, spool_of


@pytest.fixture
def run_id(client: MlflowClient, used_home: Path, tmp_path: Path) -> str:
    """Of run `small`, with a checkpoint and a value that waits for MLflow."""
    uri = write_shard_set(tmp_path / "set")
    made(used_home / "runs" / "small" / "checkpoint-00000008-aaaaaa", 8)
    run = tracking.open_run(client, small_config(), load_manifest(uri), uri).info.run_id
    tracker = Tracker(tracking.tracking_uri(), run)
    tracker.log({"val_top1": 0.5, "epoch": 2.0}, 8)
    tracker.finish()
    spool_of(run).parent.mkdir(exist_ok=True)
    spool_of(run).write_text("[]\n")
    return run


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert runs.main(["list", "--json"]) == 0
    return {row["run"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_run_is_listed_with_its_figures_and_bytes_and_removed_with_them(
    client, used_home, run_id, capsys
):
    made(used_home / "runs" / "stranger" / "checkpoint-00000001-bbbbbb", 1)
    folder = used_home / "runs" / "small"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found = listed(capsys)
    small = found["small"]
    assert (small["epoch"], small["val_top1"], small["checkpoints"]) == (2.0, 0.5, size)
    assert found["stranger"]["state"] == "not in MLflow"

    assert runs.main(["rm", "small"]) == 0
    assert f"removed {folder}" in (said := capsys.readouterr().out) and "--mlflow" in said
    assert not folder.exists() and not spool_of(run_id).exists()
    assert listed(capsys)["small"]["checkpoints"] is None
    assert runs.main(["rm", "small", "--mlflow"]) == 0
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"


def test_what_is_written_or_is_not_there_is_not_removed(used_home, run_id, capsys):
    folder = used_home / "runs" / "small"
    with lease.held(str(folder)):
        assert runs.main(["rm", "small"]) == 2
    assert "is being written by" in capsys.readouterr().err
    assert len(storage.list_files(str(folder))) > 1
    for name in ("nobody", "../runs"):
        assert runs.main(["rm", name]) == 2
        assert capsys.readouterr().err.count("\n") == 1
