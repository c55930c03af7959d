"""A node of a real Ray cluster dies in the middle of an epoch, and the training does not."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster
from drawn import ROOT
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from registered import MLFLOW_WARNINGS
from scripts import Script
from shard_sets import write_shard_set
from small_training import fit, small_config

from training.config import to_dict

pytestmark = [pytest.mark.timeout(480)]
pytestmark += [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

# 15 steps an epoch; in the end every val image is told right. A checkpoint every 7 steps, so that
# some steps are lost by a kill.
CHANGES = {
    "model_width": 1 / 16,
    "optim_batch_size": 16,
    "optim_epochs": 8,
    "optim_lr": 0.001,
    "augment_crop": "centre",
    "augment_flip": False,
    "augment_colour_sigma": 0.0,
    "checkpoint_steps": 7,
}
STEPS = 8 * 15


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes of one CPU each."""
    sockets = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # their paths have a limit
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        cluster = Cluster(sockets, kept | {"HOME": str(tmp_path), "ALEXNET_HOME": str(tmp_path)})
        stack.callback(cluster.close)
        cluster.add_node()
        cluster.add_node()
        yield cluster


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        server.start()
        yield server


def test_with_fewer_workers_the_same_samples_are_learned_from(cluster, server, tmp_path):
    data = write_shard_set(tmp_path / "set", train=(80, 80, 80), val=(30, 21))
    where = {"data": data, "storage": str(tmp_path / "runs"), "shared_fs": True, "device": "cpu"}
    config = small_config(name="elastic", register=False, **where, **CHANGES)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    (tmp_path / "home").mkdir()
    ray = {name: value for name, value in cluster.env.items() if name.startswith("RAY_")}
    # Ray waits so long for a place on a dead node before it looks again.
    ray |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5", "MLFLOW_TRACKING_URI": server.uri}
    argv = [str(ROOT / "training" / "run.py"), "--config", str(tmp_path / "config.json")]
    script = Script([*argv, "--workers", "1:2"], tmp_path / "home", tmp_path / "log", **ray)
    try:
        second = script.wait_for(r"pid=(\d+)\) world_rank=1,", 240)
        script.wait_for(r"step=20 ", 240)
        cluster.kill(cluster.node_of(int(second[1])))
        told = r"worker group restarted with 1 worker; continues at step (\d+), lost \d+ steps"
        at = int(script.wait_for(told, 240)[1])
        assert script.wait(240) == 0, script.said[-6000:]
    finally:
        script.end()
    expected = fit(config, data, tmp_path / "kept")
    digests = {step: m["sample_digest"] for step, m in expected.logged if "sample_digest" in m}
    client = MlflowClient(tracking_uri=server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("alexnet").experiment_id])
    assert run.info.status == "FINISHED"

    def history(key: str) -> dict[int, float]:
        return {p.step: p.value for p in client.get_metric_history(run.info.run_id, key)}

    assert history("sample_digest") == digests and len(digests) == STEPS
    assert history("workers") == {0: 2.0, at: 1.0}
    # Masks of dropout are drawn by rank, so the weights differ; what they learned does not.
    assert run.data.metrics["val_correct1"] == expected.result["val_correct1"] == 51
    assert abs(run.data.metrics["val_loss"] - expected.result["val_loss"]) < 0.05
