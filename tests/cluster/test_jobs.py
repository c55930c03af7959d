"""Jobs that cannot succeed, and jobs that bring a package along."""

import pytest
from machines import Machines, submission
from road import BUILD, OUT, RAW, RUNS, TRAIN, Job

pytestmark = pytest.mark.timeout(600)


def last_lines(cluster: Machines, *command: str) -> str:
    """Of a job that fails."""
    done = cluster.run(*submission(*command))
    assert done.returncode == 1, done.stdout[-3000:]
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "\n".join(said[-6:])


def test_a_failed_build_ends_with_its_cause(cluster: Machines, built: Job) -> None:
    out = "s3://alexnet/strict"
    told = last_lines(cluster, *BUILD, "--raw", RAW, "--out", out, "--max-rejected", "0")
    assert "rejected" in told and "--max-rejected" in told


def test_a_failed_training_ends_with_its_cause(cluster: Machines, built: Job) -> None:
    where = ["--data", OUT, "--storage", RUNS, "--name", "diverges"]
    told = last_lines(cluster, *TRAIN, *where, "--optim.lr", "1e20")
    assert "error: loss is nan at step" in told
