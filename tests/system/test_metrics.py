"""What Prometheus would see: read from the metrics port of a real Ray's node, with its parser."""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from clusters import tree
from drawn import ROOT
from made import started
from mlflow.tracking import MlflowClient
from ports import free_ports
from prometheus_client.parser import text_string_to_metric_families
from shard_sets import write_shard_set
from small_training import small_config

from pipelines import shards
from training.config import to_dict

# One node; what its processes count is handed to its port every second, not every ten.
_RAY = """
import sys, ray
context = ray.init(
    address="local", num_cpus=2, include_dashboard=False, logging_level="error",
    _metrics_export_port=int(sys.argv[1]), _system_config={"metrics_report_interval_ms": 1000},
)
print(context.address_info["address"], flush=True)
sys.stdin.read()
"""
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True)
class Node:
    port: int
    process: subprocess.Popen[str]
    environment: dict[str, str]  # of a driver

    def samples(self, **tag: str) -> Samples:
        """Our own by name and tags. Counters of several processes are added up; gauges are not,
        since that of a process just killed is still there for a moment."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        found: Counter[Any] = Counter()
        for sample in (sample for family in families for sample in family.samples):
            if sample.name.startswith("ray_alexnet_") and tag.items() <= sample.labels.items():
                kept = "reason" if sample.name.endswith("_total") else "WorkerId"
                rest = {k: v for k, v in sample.labels.items() if k == kept}
                found[sample.name.removeprefix("ray_alexnet_"), tuple(rest.items())] += sample.value
        return dict(found)

    def wait_for(self, enough: Callable[[Samples], bool], **tag: str) -> Samples:
        deadline = time.monotonic() + 60
        while not enough(found := self.samples(**tag)):
            assert time.monotonic() < deadline, found
            time.sleep(0.3)
        return found


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    (port,), token = (
        free_ports(1),
        {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_MODE": "token"},
    )
    process = subprocess.Popen(
        [sys.executable, "-c", _RAY, str(port)],
        env=os.environ | token | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    yield Node(port, process, token | {"RAY_ADDRESS": address, "RAY_DEDUP_LOGS": "0"})
    process.communicate(timeout=60)


def built(node: Node, raw: str, out: str, folder: Path, *flags: str) -> str:
    argv = ["build", "--raw", raw, "--out", out, "--samples-per-shard", "8"]
    build = started([*argv, "--max-rejected", "5%", *flags], folder, node.environment)
    said, errors = build.communicate(timeout=180)
    assert build.returncode == 0, errors
    return said


def test_counters_of_a_build_are_the_totals_of_its_manifest(node, drawn_raw, tmp_path):
    out = str(tmp_path / "Größe")
    said = built(node, drawn_raw, out, tmp_path, "--json")
    found = node.wait_for(lambda samples: len(samples) == 7, out=f"{tmp_path}/Gr%C3%B6%C3%9Fe")
    document = shards.load_manifest(out).document
    assert sum(document["rejected"].values()) == 1, "one image of the drawn set is cut"
    for reason, number in document["rejected"].items():
        assert found.pop(("build_rejected_total", (("reason", reason),))) == number
    totals = document["totals"].values()
    stored = sum(total["samples"] for total in totals)
    assert found.pop(("build_images_total", ())) == stored + 1
    assert found.pop(("build_shards_total", ())) == len(document["shards"])
    assert found.pop(("build_stored_bytes_total", ())) == sum(total["bytes"] for total in totals)
    raw_bytes = [
        pc.sum(shards.load_index(out, s)["source_size"]).as_py() for s in document["totals"]
    ]
    assert found.pop(("build_read_bytes_total", ())) >= sum(raw_bytes) > 0
    work = found.pop(("build_work_seconds_total", ()))
    share = found.pop(("build_wait_seconds_total", ())) / work
    told = [json.loads(line) for line in said.splitlines() if line.startswith('{"state"')]
    assert share == pytest.approx(told[-1]["waiting_share"], abs=1e-4) and 0 < share < 1
    assert found == {}


def test_a_shard_whose_task_was_killed_and_run_again_counts_once(node, drawn_raw, tmp_path):
    out, killed = str(tmp_path / "out"), list[int]()
    stop = threading.Event()

    def kill_one() -> None:
        """A worker in the middle of a shard, as a lost node would end it."""
        while not killed and not stop.wait(0.001):
            for pid in tree(node.process.pid):
                with contextlib.suppress(OSError):
                    title = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if title.startswith(b"ray::") and b"_task" in title:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                        return

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        built(node, drawn_raw, out, tmp_path, "--only", "0-2")
    finally:
        stop.set()
        killer.join()
    assert killed, "no worker was seen at work"
    built(node, drawn_raw, out, tmp_path)  # the rest
    expected = len(shards.load_manifest(out).shards)
    enough = ("build_shards_total", ())
    found = node.wait_for(lambda samples: samples.get(enough, 0) >= expected, out=out)
    time.sleep(2)  # what would count twice has had the time to
    assert node.samples(out=out) == found
    assert found[enough] == expected
    assert found["build_images_total", ()] == 4 * (8 + 3)


def test_gauges_of_a_training_are_the_figures_of_its_log_lines(node, tmp_path):
    data = write_shard_set(tmp_path / "set", train=(40,), val=(12,))
    config = small_config(
        name="训练",
        data=data,
        device="cpu",
        register=False,
        optim_epochs=6,
        checkpoint_steps=5,
        storage=str(tmp_path / "runs"),
    )
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    home = {"HOME": str(tmp_path), "ALEXNET_HOME": str(tmp_path / "home")}
    home["MLFLOW_TRACKING_URI"] = ""  # MLflow sets it in the process that uses it
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "training" / "run.py", "--config", tmp_path / "config.json"],
            env=os.environ | node.environment | home,
            stdout=log,
            stderr=log,
        )
    seen: dict[str, set[float]] = {}
    killed = False
    while process.poll() is None:
        for (name, _), value in node.samples(run="%E8%AE%AD%E7%BB%83").items():
            seen.setdefault(name, set()).add(value)
        said = (tmp_path / "log").read_text()
        if not killed and re.search(r"step=12 ", said):
            os.kill(int(re.search(r"pid=(\d+)\) world_rank=0,", said)[1]), signal.SIGKILL)
            killed = True
        time.sleep(0.2)
    assert process.returncode == 0, said[-4000:]
    assert killed and seen.pop("train_restarts_total") == {1.0}
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("alexnet").experiment_id
    (run,) = client.search_runs([experiment])
    steps = {point.step for point in client.get_metric_history(run.info.run_id, "loss")}
    assert seen.pop("train_step") <= steps
    for name in ("images_per_second", "data_wait", "utilization", "loss", "val_top1", "epoch"):
        history = client.get_metric_history(run.info.run_id, name)
        assert seen.pop(f"train_{name}") <= {point.value for point in history}, name
    etas = client.get_metric_history(run.info.run_id, "eta_seconds")
    assert seen.pop("train_eta_seconds") <= {point.value for point in etas}
    assert seen.pop("train_workers") == {1.0}
    assert seen == {}
