"""A real cluster for `make test-cluster`: what takes long is done once, and the tests look at it.

The road is that of a user: archives on S3, and jobs with `--working-dir .` on two nodes.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machines import LACKING, Machines, submission
from remains import left_of
from road import BUILD, DRAWING, OUT, RAW, RUNS, TRAIN, Job, off_cluster, ok


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A head and two nodes. Skips where the host lacks what up.sh needs.

    $ALEXNET_CLUSTER_FLAGS are more flags of up.sh, such as --same-network.
    """
    folder = Path(tempfile.mkdtemp(prefix="ax-", dir="/tmp"))  # its path has a limit
    folder.rmdir()
    machines = Machines(folder, tmp_path_factory.mktemp("user"))
    with contextlib.ExitStack() as stack:
        stack.callback(machines.down)  # also of an up that was interrupted
        done = machines.up(*os.environ.get("ALEXNET_CLUSTER_FLAGS", "").split())
        if done.returncode == LACKING:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stdout + done.stderr
        yield machines
    assert left_of(folder) == []


@pytest.fixture(scope="session")
def raw(cluster: Machines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archives that lie at RAW, as files here."""
    folder = tmp_path_factory.mktemp("archives") / "raw"
    ok(cluster.run("python", "-m", "pipelines", "demo-raw", str(folder), *DRAWING))
    ok(cluster.run("python", "-m", "pipelines", "demo-raw", RAW, *DRAWING))
    return folder


@pytest.fixture(scope="session")
def built(cluster: Machines, raw: Path) -> Job:
    """OUT, built by a job on the whole cluster."""
    said = ok(cluster.run(*submission(*BUILD, "--raw", RAW, "--out", OUT, name="build")))
    return Job("build", said)


@pytest.fixture(scope="session")
def built_here(cluster: Machines, raw: Path) -> Path:
    """The same set, built by the same command without a cluster, on this disk."""
    out = raw.parent / "shards"
    ok(off_cluster(cluster, *BUILD, "--raw", str(raw), "--out", str(out)))
    return out


@pytest.fixture(scope="session")
def trained(cluster: Machines, built: Job) -> Job:
    """The run "first", trained on OUT by a job on two nodes, and registered."""
    command = [*TRAIN, "--data", OUT, "--storage", RUNS, "--name", "first"]
    return Job("train", ok(cluster.run(*submission(*command, name="train"))))


@pytest.fixture
def as_user(cluster: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself has the keys of S3 and MLflow, as a shell has that has sourced the file."""
    for name, value in cluster.env.items():
        if name.startswith(("AWS_", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")):
            monkeypatch.setenv(name, value)


_SHOWN: pytest.StashKey[list[str]] = pytest.StashKey()


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes lines for the end of the log, where they are the evidence of what was tested."""
    return request.config.stash.setdefault(_SHOWN, []).append


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if lines := config.stash.get(_SHOWN, []):
        terminalreporter.section("what the cluster did")
        for line in lines:
            terminalreporter.write_line(line)
