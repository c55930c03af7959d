"""`training/run.py` with a real Ray: stopped by Ctrl-C, or a node of its cluster killed in the
middle of an epoch."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster
from drawn import ROOT
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from shard_sets import write_shard_set
from small_training import fit, small_config

from training import checkpoint
from training.config import TrainConfig, to_dict
from training.metrics import metric_history

pytestmark = [pytest.mark.timeout(480)]

RUN = str(ROOT / "training" / "run.py")
SHELL = "import os, sys; os.execlp('sh', 'sh', '-c', sys.argv[1])"


class Script:
    """`python ARGV` as somebody runs it, in a session of its own, with $HOME and $ALEXNET_HOME in
    `home`, by which its processes are known. As a context manager, which ends them all."""

    def __init__(self, argv: list[str], home: Path, **environment: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        kept |= {"HOME": str(home), "ALEXNET_HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
        kept |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "RAY_DEDUP_LOGS": "0"}
        self._mark = f"ALEXNET_HOME={home}\0".encode()
        self._log = home / f"log-{len(list(home.glob('log-*')))}"
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT,
                env=kept | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self._left()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + 400
        while (found := re.search(pattern, self.said)) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said[-5000:]
            time.sleep(0.02)
        return found

    def wait(self) -> int:
        """The exit code, once nothing that it started is left."""
        code = self.process.wait(400)
        deadline = time.monotonic() + 180
        while left := self._left():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.1)
        return code

    def _left(self) -> list[int]:
        """All that know its home and are no zombies."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if self._mark in (entry / "environ").read_bytes() + b"\0":
                    found.append(int(entry.name))
        return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def sockets() -> Iterator[Path]:
    """For Ray's, whose paths have a limit."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def training(home: Path, **changes: Any) -> tuple[TrainConfig, list[str]]:
    """Of the set that is `data`, and its command."""
    chosen = {"storage": str(home / "runs"), "device": "cpu", "register": False} | changes
    config = small_config(name="run", cpus_per_worker=1, **chosen)
    (home / "config.json").write_text(json.dumps(to_dict(config)))
    return config, [RUN, "--config", str(home / "config.json")]


def test_first_ctrl_c_saves_and_the_command_that_it_prints_goes_on_to_the_same_bits(
    home, sockets, tmp_path
):
    """Pressed at a terminal, where every process of the group hears it."""
    data = write_shard_set(tmp_path / "set", train=(20, 20), val=(7,))
    config, command = training(home, data=data, optim_epochs=30)
    record = fit(config, data, tmp_path / "kept")
    with Script(command, home, RAY_TMPDIR=str(sockets)) as stopped:
        stopped.wait_for(r"step=7 ")
        os.killpg(stopped.process.pid, signal.SIGINT)
        assert stopped.wait() == 130, stopped.said[-5000:]
        last = stopped.said.splitlines()[-1]
    assert "stopping: saving a checkpoint first (at most 60 s; " in stopped.said
    assert re.search("^Traceback", stopped.said, re.MULTILINE) is None, "of the driver"
    found = re.search(r"^interrupted: stopped at step (\d+), saved; continue with: (.*)", last)
    assert found is not None, last
    step, run = int(found[1]), home / "runs" / "run"
    assert 7 <= step < 30 * 5 and checkpoint.last_step(str(run)) == step
    assert json.loads((run / "writer" / "000001.json").read_text())["ended"] is True
    with Script(["-c", SHELL, found[2]], home, RAY_TMPDIR=str(sockets)) as going_on:
        assert going_on.wait() == 0, going_on.said[-5000:]
    assert f"continues at step {step}, lost 0 steps" in going_on.said
    with checkpoint.newest_good(str(run)) as end:
        assert end is not None
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (end / name).read_bytes() == (record.last / name).read_bytes()
        states = [checkpoint.load_state(place) for place in (end, record.last)]
        for state in states:
            del state["run_id"], state["config"]
        assert states[0] == states[1]
    assert not (home / ".ray").exists(), "a token was left behind"


# 15 steps an epoch; in the end every val image is told right. A checkpoint every 7 steps, so that
# some steps are lost by a kill.
ELASTIC = {"optim_batch_size": 16, "optim_epochs": 8, "optim_lr": 0.001, "checkpoint_steps": 7}
ELASTIC |= {"augment_crop": "centre", "augment_flip": False, "augment_colour_sigma": 0.0}
ELASTIC |= {"model_width": 1 / 16, "shared_fs": True}


@pytest.fixture
def cluster(sockets: Path, tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes of one CPU each."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    own = {"HOME": str(tmp_path), "ALEXNET_HOME": str(tmp_path)}
    with contextlib.closing(Cluster(sockets, kept | own)) as cluster:
        cluster.add_node()
        cluster.add_node()
        yield cluster


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def test_with_fewer_workers_the_same_samples_are_learned_from(cluster, server, home, tmp_path):
    data = write_shard_set(tmp_path / "set", train=(80, 80, 80), val=(30, 21))
    config, command = training(home, data=data, **ELASTIC)
    ray = {name: value for name, value in cluster.env.items() if name.startswith("RAY_")}
    # Ray waits so long for a place on a dead node before it looks again.
    ray |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5", "MLFLOW_TRACKING_URI": server.uri}
    with Script([*command, "--workers", "1:2", "--ray-logs", "True"], home, **ray) as script:
        second = script.wait_for(r"pid=(\d+)\) world_rank=1,")
        script.wait_for(r"step=20 ")
        cluster.kill(cluster.node_of(int(second[1])))
        told = r"worker group restarted with 1 worker; continues at step (\d+), lost \d+ steps"
        at = int(script.wait_for(told)[1])
        assert script.wait() == 0, script.said[-6000:]
    expected = fit(config, data, tmp_path / "kept")
    digests = {step: m["sample_digest"] for step, m in expected.logged if "sample_digest" in m}
    client = MlflowClient(tracking_uri=server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("alexnet").experiment_id])
    assert run.info.status == "FINISHED"

    def history(key: str) -> dict[int, float]:
        return dict(metric_history(client, run.info.run_id, key))

    assert history("sample_digest") == digests and len(digests) == 8 * 15
    assert history("workers") == {0: 2.0, at: 1.0}
    # Masks of dropout are drawn by rank, so the weights differ; what they learned does not.
    assert run.data.metrics["val/correct1"] == expected.result["val_correct1"] == 51
    assert abs(run.data.metrics["val/loss"] - expected.result["val_loss"]) < 0.05
