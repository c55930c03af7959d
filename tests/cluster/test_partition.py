"""Machines that are out of reach for some seconds and come back: the work goes on, unchanged."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbances import cut_off, frozen, restart_mlflow, restart_postgres
from machines import Machines, submission, until
from made import contents
from road import BUILD, OUT, RAW, RUNS, STEPS, TRAIN, Job, learned
from test_lost_nodes import tars, wait_for

from pipelines import storage

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_user")]

AWAY_SECONDS = 5.0  # Ray takes a node for lost after half a minute

Show = Callable[[str], None]


def test_a_build_with_a_node_cut_off_and_one_frozen_ends_with_the_same_bytes(
    cluster: Machines, built: Job, tmp_path: Path, show: Show
) -> None:
    out, log = "s3://alexnet/partitioned", tmp_path / "log"
    build = [*BUILD, "--raw", RAW, "--out", out, "--address", cluster.env["RAY_GCS"]]
    first, second = cluster.workers()[:2]
    began = time.monotonic()
    with cluster.begun(*cluster.on("head", *build), log=log) as process:
        until(lambda: tars(out) >= 2 or process.poll() is not None, 180)
        cut_off(cluster, first, AWAY_SECONDS)
        with frozen(cluster, second):
            assert not storage.exists(f"{out}/manifest.json"), "too late"
            time.sleep(AWAY_SECONDS)
        assert process.wait(180) == 0, log.read_text()
    assert contents(out) == contents(OUT)
    show(f"partition: a build with two nodes away for 5 s each: {time.monotonic() - began:.0f} s")


def test_a_training_through_a_partition_and_restarted_servers_learns_the_same(
    cluster: Machines, trained: Job, tmp_path: Path, show: Show
) -> None:
    uri, log = cluster.env["MLFLOW_TRACKING_URI"], tmp_path / "log"
    train = [*TRAIN, "--data", OUT, "--storage", RUNS, "--name", "cut", "--register", "False"]
    began = time.monotonic()
    with cluster.begun(*submission(*train, name="cut"), log=log) as process:
        rank1 = wait_for(r"\(ip=([\d.]+), pid=(\d+)\) world_rank=1", log, process)
        wait_for(r"step=[1-9]\d* epoch", log, process)
        restart_postgres(cluster)
        cut_off(cluster, cluster.node_of(rank1[1], int(rank1[2])), AWAY_SECONDS)
        restart_mlflow(cluster)
        assert process.poll() is None, "too late"
        assert process.wait(240) == 0, log.read_text()[-6000:]
    told = learned("cut", uri)
    assert told == learned("first", uri)
    assert len(told["loss"]) == STEPS, "metrics were lost"
    restarts = len(re.findall("worker group restarted", log.read_text()))
    show(f"partition: a training: {time.monotonic() - began:.0f} s, {restarts} restarts of workers")
