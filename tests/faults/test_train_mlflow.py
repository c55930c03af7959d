"""What MLflow is told survives its server's SIGKILLs, full disks and the logger's own death."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from registered import MLFLOW_WARNINGS
from scripts import only_in_long_runs
from shard_sets import write_shard_set
from small_training import small_config
from tmpfs import filled, tmpfs

from pipelines.shards import load_manifest
from training import tracking
from training.tracking import Spool

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

ROW = ("loss", 1.5, 1_700_000_000_000, 7)


@pytest.fixture
def long_run(request: pytest.FixtureRequest) -> None:
    only_in_long_runs(request)


@pytest.fixture
def server(tmp_path: Path, home: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        server.start()
        yield server


def killed_and_started(server: Server, waits: list[float], over: threading.Event) -> None:
    try:
        for seconds in waits:
            time.sleep(seconds)
            server.kill()
            time.sleep(seconds)
            server.start()
    finally:
        over.set()


def test_no_value_is_lost_or_doubled_while_the_server_is_killed_and_started(
    attack, long_run, server, home, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    data = write_shard_set(tmp_path / "set", train=(4,), val=(2,))
    client = tracking.connect(server.uri)
    run = tracking.open_run(client, small_config(), load_manifest(data), data)
    tracker = tracking.Tracker(server.uri, run.info.run_id)
    over = threading.Event()
    waits = [attack.draw.uniform(0, 1), attack.draw.uniform(0, 1)]
    killing = threading.Thread(target=killed_and_started, args=(server, waits, over))
    killing.start()
    for step in itertools.count(1):
        tracker.log({"loss": 1 / step, "top1": 1 - 1 / step}, step)
        time.sleep(0.01)
        if over.is_set():
            break
    killing.join()
    tracker.log({}, 0)
    assert not list((home / "spool").glob("*"))
    there = MlflowClient(tracking_uri=server.uri)
    for key, value in (("loss", lambda n: 1 / n), ("top1", lambda n: 1 - 1 / n)):
        history = there.get_metric_history(run.info.run_id, key)
        found = sorted((point.step, point.value) for point in history)
        assert found == [(n, value(n)) for n in range(1, step + 1)]
    attack.survived("SIGKILL", "MLflow server, training", faults=len(waits), seconds_lost=0.0)


def test_values_of_a_killed_training_wait_for_the_next_one(home, tmp_path):
    Spool(home / "spool" / "a.jsonl").keep([ROW])
    assert Spool(home / "spool" / "a.jsonl").rows() == [ROW]
    Spool(home / "spool" / "a.jsonl").clear()
    assert Spool(home / "spool" / "a.jsonl").rows() == []


@pytest.mark.parametrize("torn", ['["loss", 1.0, 17', "[]", '["loss", "x", 1, 2]', "\udc80"])
def test_torn_file_costs_what_was_torn_and_not_the_training(home, caplog, torn):
    path = home / "spool" / "a.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(f"{json.dumps(ROW)}\n{torn}".encode(errors="surrogateescape"))
    rows = Spool(path).rows()
    assert rows == ([] if torn == "\udc80" else [ROW])
    assert "lost from here on" in caplog.text


def test_disk_without_room_for_waiting_values_keeps_them_in_memory(tmp_path):
    with tmpfs(tmp_path / "disk", 4096 * 4) as disk:
        spool, many = Spool(disk.path / "spool" / "a.jsonl"), [ROW] * 1000
        assert spool.keep([ROW]) == "on disk"
        assert spool.keep(many).startswith("in memory (")
        assert spool.rows() == many
        disk.resize(1 << 20)
        assert spool.keep([*many, ROW]) == "on disk"
        assert Spool(disk.path / "spool" / "a.jsonl").rows() == [*many, ROW]


def test_home_that_vanishes_or_is_write_protected_does_not_end_a_training(tmp_path):
    with tmpfs(tmp_path / "disk", 1 << 20) as disk:
        spool = Spool(disk.path / "home" / "spool" / "a.jsonl")
        assert spool.keep([ROW]) == "on disk"
        disk.write_protect()
        assert spool.keep([ROW, ROW]).startswith("in memory (")
        spool.clear()
        assert (disk.path / "home" / "spool" / "a.jsonl").exists()
    assert Spool(tmp_path / "disk" / "home" / "spool" / "a.jsonl").rows() == []


def test_full_disk_of_the_embedded_store_does_not_end_a_training(attack, tmp_path, monkeypatch):
    data = write_shard_set(tmp_path / "set", train=(4,), val=(2,))
    with tmpfs(tmp_path / "disk", 1 << 24) as disk:
        monkeypatch.setenv("ALEXNET_HOME", str(disk.path))
        uri = f"sqlite:///{disk.path / 'mlflow.db'}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        client = tracking.connect(uri)
        run = tracking.open_run(client, small_config(), load_manifest(data), data)
        tracker = tracking.Tracker(uri, run.info.run_id)
        filler = disk.path / "filler"
        steps, full = 40, attack.draw.randint(1, 20)
        for step in range(1, steps + 1):
            if step == full:
                filled(filler)
            tracker.log({"loss": 1 / step}, step)
            if step == full + attack.draw.randint(1, 15):
                filler.unlink(missing_ok=True)
        filler.unlink(missing_ok=True)
        tracker.log({}, 0)
        found = [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, "loss")]
        assert sorted(found) == [(n, 1 / n) for n in range(1, steps + 1)]
    attack.survived("full disk", "MLflow's SQLite")
