"""The commands of the road, and what the servers know of them."""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters import BIN
from drawn import ROOT
from machines import Machines
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from training.metrics import metric_history, metrics_of

RAW, OUT, RUNS = "s3://alexnet/raw", "s3://alexnet/shards", "s3://alexnet/runs"
DRAWING = ["--classes", "4", "--per-class", "50", "--val-per-class", "10"]
# 41 shards, so that a build can be met in its middle.
BUILD = ["python", "-m", "pipelines", "build", "--samples-per-shard", "6"]
# 13 steps an epoch; checkpoints between them, so that some steps are lost by a kill.
TRAIN = ["python", "training/run.py", "smoke", "--workers", "2", "--cpus-per-worker", "1"]
TRAIN += ["--device", "cpu", "--model.width", "0.125", "--optim.batch-size", "16"]
TRAIN += ["--optim.epochs", "16", "--log-steps", "1", "--checkpoint-steps", "10"]
TRAIN += ["--ray-logs", "True"]
STEPS = 13 * 16


@dataclass(frozen=True)
class Job:
    """A finished one: its submission id and all it said."""

    name: str
    said: str


def off_cluster(cluster: Machines, *command: str) -> subprocess.CompletedProcess[str]:
    """A command on this machine alone, with nothing but its disk: its own Ray, its own MLflow."""
    ours = ("RAY_", "MLFLOW_", "AWS_")
    env = {name: value for name, value in cluster.env.items() if not name.startswith(ours)}
    # Another Ray on this host may have left its address where a command would join it.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as own:
        env |= {"ALEXNET_HOME": str(alone(cluster)), "RAY_TMPDIR": own}
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=ROOT,
            env=env | {"RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=400,
        )


def alone(cluster: Machines) -> Path:
    """$ALEXNET_HOME of what runs off the cluster."""
    return cluster.home / "alone"


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def run_named(name: str, uri: str) -> Run:
    """The one run of that name in this MLflow."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("alexnet").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    return run


def learned(name: str, uri: str) -> dict[str, Any]:
    """What a finished run has learned, step by step: every loss, which samples, what it then knew.
    Of steps that were made twice, the last value."""
    run, client = run_named(name, uri), MlflowClient(tracking_uri=uri)
    assert run.info.status == "FINISHED"
    keys = ["loss", "sample_digest", *(key for key in metrics_of(run) if key.startswith("val_"))]
    assert {"val_images", "val_loss", "val_correct1"} <= set(keys)
    return {key: dict(metric_history(client, run.info.run_id, key)) for key in keys}
