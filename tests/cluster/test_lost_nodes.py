"""A machine that goes dark in the middle of a job: another does its work, with the same result."""

import re
import time
from pathlib import Path
from subprocess import Popen

import pytest
from machines import Machines, submission, until
from made import contents
from road import BUILD, OUT, RAW, RUNS, TRAIN, Job, learned, ok, run_named

from pipelines import shards, storage

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_user")]


def test_a_build_that_loses_a_node_ends_with_the_same_bytes(
    cluster: Machines, built: Job, tmp_path: Path
) -> None:
    out, log = "s3://alexnet/disturbed", tmp_path / "log"
    build = [*BUILD, "--raw", RAW, "--out", out, "--address", cluster.env["RAY_GCS"]]
    with cluster.begun(*cluster.on("head", *build), log=log) as process:
        until(lambda: tars(out) >= 4 or process.poll() is not None, 180)
        cluster.kill(cluster.workers()[0])
        assert not storage.exists(f"{out}/manifest.json"), "killed too late"
        try:
            assert process.wait(180) == 0, log.read_text()
        finally:
            cluster.add_node()
    assert shards.load_manifest(out).digest == shards.load_manifest(OUT).digest
    assert contents(out) == contents(OUT)


def test_a_training_that_was_stopped_and_lost_a_node_learns_the_same(
    cluster: Machines, trained: Job, tmp_path: Path
) -> None:
    uri = cluster.env["MLFLOW_TRACKING_URI"]
    train = [*TRAIN, "--data", OUT, "--storage", RUNS, "--name", "disturbed", "--register", "False"]
    first = tmp_path / "first.log"
    with cluster.begun(*submission(*train, name="stopped"), log=first) as process:
        wait_for(r"step=(\d\d+) epoch", first, process)
        ok(cluster.run("ray", "job", "stop", "stopped"))
        process.wait(60)
    assert cluster.ask("jobs/stopped")["status"] == "STOPPED"
    assert run_named("disturbed", uri).info.status == "KILLED"
    assert "registered" not in first.read_text()

    again = tmp_path / "again.log"
    with cluster.begun(*submission(*train, name="again"), log=again) as process:
        told = wait_for(r"continues at step (\d+)", again, process)
        assert int(told[1]) > 0
        wait_for(rf"step={int(told[1]) + 25} ", again, process)
        rank1 = wait_for(r"\(ip=([\d.]+), pid=(\d+)\) world_rank=1", again, process)
        cluster.kill(cluster.node_of(rank1[1], int(rank1[2])))
        cluster.add_node()
        lost = r"worker group restarted with 2 workers; continues at step (\d+), lost \d+ steps"
        wait_for(f"{lost}[^$]*{lost}", again, process)
        assert process.wait(240) == 0, again.read_text()[-6000:]
    assert learned("disturbed", uri) == learned("first", uri)


def tars(out: str) -> int:
    return sum(name.endswith(".tar") for name, _ in storage.list_files(out))


def wait_for(pattern: str, log: Path, process: "Popen[bytes]") -> re.Match[str]:
    """Where a job that is under way has said this."""
    deadline = time.monotonic() + 240
    while (found := re.search(pattern, log.read_text())) is None:
        said = log.read_text()[-6000:]
        assert process.poll() is None and time.monotonic() < deadline, f"{pattern}\n{said}"
        time.sleep(0.05)
    return found
