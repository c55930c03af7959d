"""What MLflow is told survives full disks and the logger's own death."""

import json

import pytest
from shard_sets import write_shard_set
from small_training import small_config
from tmpfs import tmpfs

from pipelines.shards import load_manifest
from training import tracking
from training.metrics import Spool, Tracker, metric_history

ROW = ("loss", 1.5, 1_700_000_000_000, 7)


@pytest.mark.parametrize("torn", ["", '["loss", 1.0, 17', "[]", '["loss", "x", 1, 2]', "\udc80"])
@pytest.mark.first
def test_values_wait_for_the_next_training_and_a_torn_file_costs_what_was_torn(tmp_path, torn):
    path = tmp_path / "spool" / "a.jsonl"
    assert Spool(path).keep([ROW]) == "on disk"
    with path.open("ab") as file:
        file.write(torn.encode(errors="surrogateescape"))
    assert Spool(path).rows() == ([] if torn == "\udc80" else [ROW])
    Spool(path).clear()
    assert Spool(path).rows() == []


@pytest.mark.first
def test_disk_that_is_full_or_protected_keeps_waiting_values_in_memory(tmp_path):
    with tmpfs(tmp_path / "disk", 4096 * 4) as disk:
        path, many = disk.path / "spool" / "a.jsonl", [ROW] * 1000
        spool = Spool(path)
        assert spool.keep([ROW]) == "on disk"
        assert spool.keep(many).startswith("in memory (")
        assert spool.rows() == many
        disk.resize(1 << 20)
        assert spool.keep([*many, ROW]) == "on disk"
        assert Spool(path).rows() == [*many, ROW]
        disk.write_protect()
        assert spool.keep([ROW, ROW]).startswith("in memory (")
        spool.clear()
        assert json.loads(path.read_text().splitlines()[0]) == list(ROW)
    assert Spool(path).rows() == []


def test_full_disk_of_the_embedded_store_does_not_end_a_training(attack, tmp_path, monkeypatch):
    with tmpfs(tmp_path / "disk", 1 << 24) as disk:
        uri = f"sqlite:///{disk.path / 'mlflow.db'}"
        monkeypatch.setenv("ALEXNET_HOME", str(disk.path))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        client = tracking.connect(uri)
        data = write_shard_set(tmp_path / "set", train=(4,), val=(2,))
        run = tracking.open_run(client, small_config(), load_manifest(data), data)
        tracker = Tracker(uri, run.info.run_id)
        full = attack.draw.randint(1, 20)
        free = full + attack.draw.randint(1, 15)
        for step in range(1, 41):
            if step == full:
                filler = disk.fill()
            tracker.log({"loss": 1 / step}, step)
            tracker.wait()
            if step == free:
                filler.unlink()
        tracker.finish(patience=0)
        found = metric_history(client, run.info.run_id, "loss")
        assert found == [(n, 1 / n) for n in range(1, 41)]
