"""up.sh and down.sh themselves: what cannot start is told, and nothing is left of it."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import LACKING, LOCAL, Machines, until
from remains import left_of, orphaned_networks

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """None of them is up yet."""
    folder = Path(tempfile.mkdtemp(prefix="ax-", dir="/tmp"))
    folder.rmdir()
    machines = Machines(folder, tmp_path)
    before = {*orphaned_networks()}  # the nodes that other tests have killed
    yield machines
    machines.down()
    assert left_of(folder) == []
    until(lambda: {*orphaned_networks()} <= before, 60)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--nodes", "0"], "--nodes 0: pass 1 to 9"),
        (["--cpus", "many"], "--cpus many: pass 1 or more"),
        (["--nodes"], "--nodes needs a value"),
        (["--node", "2"], "--node is no option"),
        (["--dir", "/tmp/" + "x" * 40], "pass one of at most 28"),
        (["--dir", "/tmp"], "/tmp is there already"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_2(
    machines: Machines, flags: list[str], told: str
) -> None:
    done = machines.up(*flags)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert told in done.stderr


def test_a_program_that_the_host_lacks_is_named(machines: Machines) -> None:
    machines.env = machines.env | {"PATH": "/usr/bin:/bin"}
    if shutil.which("ray", path="/usr/bin:/bin"):
        pytest.skip("this system has a Ray of its own")
    done = machines.up()
    assert done.returncode == LACKING
    assert done.stderr.startswith("error: no program ray ") and done.stderr.count("\n") == 1


def test_of_an_up_that_fails_half_way_nothing_is_left(machines: Machines, tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "weed"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho the disk is on fire\nexit 3\n")
    broken.chmod(0o755)
    machines.env = machines.env | {"PATH": f"{broken.parent}:{machines.env['PATH']}"}
    done = machines.up()
    if done.returncode == LACKING:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 1
    assert "the disk is on fire\nerror: store did not get ready" in done.stderr
    assert left_of(machines.folder) == []


def test_down_clears_what_a_killed_up_has_left(machines: Machines) -> None:
    up = subprocess.Popen(
        ["bash", str(LOCAL / "up.sh"), "--dir", str(machines.folder)],
        env=machines.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    until(lambda: (machines.folder / "pids" / "head").exists() or up.poll() is not None, 60)
    if up.poll() == LACKING:
        pytest.skip("this host lacks a program, as up.sh says")
    os.killpg(up.pid, signal.SIGKILL)
    up.communicate()
    assert left_of(machines.folder), "there was nothing to clear"
