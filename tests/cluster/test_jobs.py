"""Jobs that cannot succeed say why at their end."""

import re
from pathlib import Path

import pytest
from machines import Machines, submission
from road import BUILD, OUT, RAW, RUNS, TRAIN, Job

pytestmark = pytest.mark.timeout(600)


def last_lines(cluster: Machines, log: Path, *command: str) -> str:
    """Of a job that fails, as a terminal shows them."""
    with cluster.begun(*submission(*command), log=log) as process:
        assert process.wait(300) == 1, log.read_text()[-3000:]
    said = [line for line in log.read_text().splitlines() if line.strip()]
    return "\n".join(said[-6:])


def test_a_failed_build_ends_with_its_cause(cluster: Machines, built: Job, tmp_path: Path) -> None:
    build = [*BUILD, "--raw", RAW, "--out", "s3://alexnet/strict", "--max-rejected", "0"]
    told = last_lines(cluster, tmp_path / "log", *build)
    assert "failed: 1 of 240 images" in told and "more than --max-rejected 0" in told


def test_a_failed_training_ends_with_its_cause(
    cluster: Machines, built: Job, tmp_path: Path
) -> None:
    where = ["--data", OUT, "--storage", RUNS, "--name", "diverges"]
    told = last_lines(cluster, tmp_path / "log", *TRAIN, *where, "--optim.lr", "1e20")
    cause = r"error: (loss|gradient norm) is (nan|inf) at step \d+ .* with a lower --optim.lr"
    assert re.search(cause, told), told
