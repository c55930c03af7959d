"""A node of a real Ray cluster dies in the middle of an epoch, and the training does not."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from clusters import BIN, Cluster
from drawn import ROOT
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from ranks import run_ranks
from registered import MLFLOW_WARNINGS
from shard_sets import write_shard_set
from small_training import fit, small_config

from training import checkpoint, loop
from training.config import TrainConfig, to_dict

pytestmark = [pytest.mark.timeout(480)]
pytestmark += [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

# 30 steps an epoch; in the end every val image is told right. A checkpoint every 7 steps, so that
# some steps are lost by a kill.
CHANGES = {
    "model_width": 1 / 16,
    "optim_batch_size": 8,
    "optim_epochs": 8,
    "optim_lr": 0.0005,
    "augment_crop": "centre",
    "augment_flip": False,
    "augment_colour_sigma": 0.0,
    "checkpoint_steps": 7,
}
STEPS = 8 * 30


@dataclass(frozen=True)
class Place:
    cluster: Cluster
    server: Server
    data: str
    folder: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("elastic")
    data = write_shard_set(folder / "set", train=(80, 80, 80), val=(30, 21))
    sockets = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # their paths have a limit
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    env = kept | {"HOME": str(folder), "ALEXNET_HOME": str(folder / "home")}
    server = Server(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        stack.callback(server.kill)
        server.start()
        cluster = Cluster(sockets, env)
        stack.callback(cluster.close)
        cluster.add_node()
        cluster.add_node()
        yield Place(cluster, server, data, folder)


def config(place: Place, name: str) -> TrainConfig:
    where = {"storage": str(place.folder / "runs"), "shared_fs": True, "device": "cpu"}
    return small_config(name=name, data=place.data, register=False, **where, **CHANGES)


class Training:
    """`training/run.py` on the cluster, with the flags that make `config` of the smoke recipe."""

    def __init__(self, place: Place, name: str, workers: str) -> None:
        self._log = place.folder / f"{name}.log"
        saved = place.folder / f"{name}.json"
        # Ray waits so long for a place on a dead node before it looks again.
        impatient = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
        self._env = place.cluster.env | {"MLFLOW_TRACKING_URI": place.server.uri} | impatient
        saved.write_text(json.dumps(to_dict(config(place, name))))
        command = [str(BIN / "python"), str(ROOT / "training" / "run.py"), "--config", str(saved)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", workers], env=self._env, stdout=log, stderr=log
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str, seconds: float = 180) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.said)) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said[-6000:]
            time.sleep(0.02)
        return found

    def worker(self, rank: int) -> int:
        """Pid of a rank of the first worker group."""
        return int(self.wait_for(rf"pid=(\d+)\) world_rank={rank},")[1])


def only_run(place: Place, name: str) -> Run:
    client = MlflowClient(tracking_uri=place.server.uri)
    experiment = client.get_experiment_by_name("alexnet").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    assert run.info.status == "FINISHED"
    return run


def history(place: Place, run: Run, key: str) -> dict[int, float]:
    points = MlflowClient(tracking_uri=place.server.uri).get_metric_history(run.info.run_id, key)
    return {point.step: point.value for point in points}


def uninterrupted(rank: int, world_size: int, wanted: TrainConfig, keep: Path) -> dict[str, float]:
    os.environ["ALEXNET_HOME"] = str(keep / "home")
    here = loop.Place(torch.device("cpu"), rank, world_size)
    return fit(wanted, str(wanted.data), keep / f"rank-{rank}", place=here).result


def test_a_lost_node_changes_not_one_bit_when_another_takes_its_place(place, tmp_path):
    training = Training(place, "replaced", "2")
    training.wait_for(r"step=20 ")
    place.cluster.kill(place.cluster.node_of(training.worker(rank=0)))
    died_at = int(re.findall(r"step=(\d+) epoch=\S+ loss", training.said)[-1])
    assert died_at < STEPS
    place.cluster.add_node()
    told = training.wait_for(
        r"worker group restarted with 2 workers; continues at step (\d+), lost (\d+) steps and "
    )
    at, lost = int(told[1]), int(told[2])
    assert at % 7 == 0 and at > 0 and at + lost >= died_at
    wanted = config(place, "replaced")
    expected = run_ranks([2], uninterrupted, tmp_path, wanted, tmp_path)[2]
    assert training.process.wait(120) == 0, training.said[-6000:]

    run = only_run(place, "replaced")
    assert {key: run.data.metrics[key] for key in expected[0]} == expected[0] == expected[1]
    assert history(place, run, "workers") == {0: 2.0, at: 2.0}
    with checkpoint.newest_good(str(place.folder / "runs" / "replaced")) as last:
        theirs = sorted((tmp_path / "rank-0").glob("step-*"), key=lambda p: int(p.name[5:]))[-1]
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (last / name).read_bytes() == (theirs / name).read_bytes()
        mine, other = checkpoint.load_state(last), checkpoint.load_state(theirs)
        assert (mine["step"], mine["samples"]) == (STEPS, other["samples"])


def test_with_fewer_workers_the_same_samples_are_learned_from(place, tmp_path):
    training = Training(place, "elastic", "1:2")
    training.wait_for(r"step=20 ")
    assert "Deciding to start/restart training with this worker group size" in training.said
    place.cluster.kill(place.cluster.node_of(training.worker(rank=1)))
    told = training.wait_for(r"worker group restarted with 1 worker; continues at step (\d+), ")
    at = int(told[1])
    wanted = config(place, "elastic")
    expected = fit(wanted, place.data, tmp_path)
    assert training.process.wait(120) == 0, training.said[-6000:]

    run = only_run(place, "elastic")
    digests = {step: m["sample_digest"] for step, m in expected.logged if "sample_digest" in m}
    assert history(place, run, "sample_digest") == digests and len(digests) == STEPS
    assert history(place, run, "workers") == {0: 2.0, at: 1.0}
    found, reference = run.data.metrics, expected.result
    assert found["val_images"] == reference["val_images"] == 51
    # Masks of dropout are drawn by rank, so the weights differ; what they learned does not.
    assert found["val_correct1"] == reference["val_correct1"] == 51
    assert abs(found["val_loss"] - reference["val_loss"]) < 0.05
