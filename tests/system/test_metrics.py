"""What Prometheus would see: read from the metrics port of a real Ray's node, with its parser."""

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import ray
from clusters import tree
from mlflow.tracking import MlflowClient
from prometheus_client.parser import text_string_to_metric_families
from shard_sets import write_shard_set
from small_training import small_config

from pipelines import cli, progress, shards
from training import run
from training.config import to_dict
from training.metrics import points

# Ray Data and Ray Train warn of their own defaults.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module", autouse=True)
def own_counters(local_ray: str) -> None:
    progress._counter.cache_clear()  # perhaps made before this Ray


def samples(**tag: str) -> Samples:
    """Our own by name and tags. Counters of several processes are added up; gauges are not, since
    that of a process just killed is still there for a moment."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: Counter[Any] = Counter()
    for sample in (sample for family in families for sample in family.samples):
        if sample.name.startswith("ray_alexnet_") and tag.items() <= sample.labels.items():
            kept = "reason" if sample.name.endswith("_total") else "WorkerId"
            rest = {k: v for k, v in sample.labels.items() if k == kept}
            found[sample.name.removeprefix("ray_alexnet_"), tuple(rest.items())] += sample.value
    return dict(found)


def wait_for(enough: Callable[[Samples], bool], **tag: str) -> Samples:
    deadline = time.monotonic() + 60
    while not enough(found := samples(**tag)):
        assert time.monotonic() < deadline, found
        time.sleep(0.3)
    return found


def build(raw: str, out: str, *flags: str) -> None:
    argv = ["build", "--raw", raw, "--out", out, "--samples-per-shard", "8"]
    assert cli.main([*argv, "--max-rejected", "5%", *flags]) == 0


@contextlib.contextmanager
def one_killed(title: bytes, when: Callable[[], object] = lambda: True) -> Iterator[None]:
    """Kills a process of Ray that is at such work, as a lost node would end it."""
    stop, killed = threading.Event(), list[int]()

    def kill_one() -> None:
        while not killed and not stop.wait(0.01):
            for pid in tree(os.getpid()) if when() else []:
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if words.startswith(b"ray::") and title in words:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                        return

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        yield
    finally:
        stop.set()
        killer.join()
    assert killed, "no worker was seen at work"


def test_counters_of_a_build_are_the_totals_of_its_manifest(drawn_raw, tmp_path, capsys):
    out = str(tmp_path / "Größe")
    build(drawn_raw, out, "--json")
    said = capsys.readouterr().out
    document = shards.load_manifest(out).document
    label, made = f"{tmp_path}/Gr%C3%B6%C3%9Fe", ("build_shards_total", ())
    wait_for(lambda found: found.get(made) == len(document["shards"]), out=label)
    time.sleep(2)  # what was counted a moment later has come too
    found = samples(out=label)
    assert sum(document["rejected"].values()) == 1, "one image of the drawn set is cut"
    for reason, number in document["rejected"].items():
        assert found.pop(("build_rejected_total", (("reason", reason),))) == number
    totals = document["totals"].values()
    stored = sum(total["samples"] for total in totals)
    assert found.pop(("build_images_total", ())) == stored + 1
    assert found.pop(made) == len(document["shards"])
    assert found.pop(("build_stored_bytes_total", ())) == sum(total["bytes"] for total in totals)
    indexes = [shards.load_index(out, split) for split in document["totals"]]
    raw_bytes = sum(pc.sum(index["source_size"]).as_py() for index in indexes)
    assert found.pop(("build_read_bytes_total", ())) >= raw_bytes > 0
    work = found.pop(("build_work_seconds_total", ()))
    share = found.pop(("build_wait_seconds_total", ())) / work
    told = [json.loads(line) for line in said.splitlines() if line.startswith('{"state"')]
    assert share == pytest.approx(told[-1]["waiting_share"], abs=1e-4) and 0 < share < 1
    assert found == {}


def test_a_shard_whose_task_was_killed_and_run_again_counts_once(drawn_raw, tmp_path):
    out = str(tmp_path / "out")
    with one_killed(b"_task"):
        build(drawn_raw, out)
    expected = len(shards.load_manifest(out).shards)
    enough = ("build_shards_total", ())
    found = wait_for(lambda found: found.get(enough, 0) >= expected, out=out)
    time.sleep(2)  # what would count twice has had the time to
    assert samples(out=out) == found
    assert found[enough] == expected
    assert found["build_images_total", ()] == 4 * (8 + 3)


@pytest.mark.timeout(480)
@pytest.mark.filterwarnings("ignore:Glyph")  # no font here has the run's name
def test_gauges_of_a_training_are_the_figures_of_its_log_lines(used_home, tmp_path):
    data = write_shard_set(tmp_path / "set", train=(40,), val=(12,))
    config = small_config(
        name="训练",
        data=data,
        device="cpu",
        register=False,
        optim_epochs=5,
        checkpoint_steps=5,
        storage=str(tmp_path / "runs"),
    )
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    seen: dict[str, set[float]] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            for (name, _), value in samples(run="%E8%AE%AD%E7%BB%83").items():
                seen.setdefault(name, set()).add(value)

    looking = threading.Thread(target=look)
    looking.start()
    stored = tmp_path / "runs" / "训练"
    try:
        with one_killed(b"RayTrainWorker", lambda: [*stored.glob("checkpoint-00000005-*")]):
            assert run.main(["--config", str(tmp_path / "config.json")]) == 0
    finally:
        ended.set()
        looking.join()
    assert seen.pop("train_restarts_total") == {1.0}
    client = MlflowClient(tracking_uri=f"sqlite:///{used_home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("alexnet").experiment_id
    (found,) = client.search_runs([experiment])
    steps = {point.step for point in points(client, found.info.run_id, "loss")}
    assert seen.pop("train_step") <= steps
    logged = ["images_per_second", "data_wait", "utilization", "loss", "val_top1", "epoch"]
    for name in [*logged, "eta_seconds"]:
        history = points(client, found.info.run_id, name)
        assert seen.pop(f"train_{name}") <= {point.value for point in history}, name
    assert seen.pop("train_workers") == {1.0}
    assert seen == {}
