"""Builds on a Ray of their own, whose processes are killed: none stays behind, nothing is lost."""

import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from attacks import Attack
from build_lives import Lives
from build_set import Undisturbed, undisturbed
from made import started
from scripts import only_in_long_runs
from waiting import wait_until

pytest_plugins = ["build_fixtures"]
HITS = [
    ("driver", signal.SIGKILL),
    ("worker", signal.SIGKILL),
    ("raylet", signal.SIGKILL),
    ("all processes", signal.SIGKILL),
    ("driver", signal.SIGTERM),
    ("driver", signal.SIGINT),
]
STOPPED = "stopped; what is finished is kept, the same command continues"


@pytest.fixture(scope="module")
def singles(
    lives: Lives, folders: Undisturbed, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """A shard for each image."""
    flags = ["--samples-per-shard", "1", "--max-rejected", "3"]
    return undisturbed(lives, folders.raw, tmp_path_factory.mktemp("singles") / "out", flags)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Short, since sockets lie in it; each process of the Ray there names it."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
        for process in processes(folder):
            process.kill()


def processes(folder: Path | str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == str(folder) and process.status() != "zombie":
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def victims(name: str, run: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    if name == "driver":
        return [psutil.Process(run.pid)]
    found = processes(folder)
    if name == "worker":
        return [process for process in found if titled(process, "ray::")]
    if name == "raylet":
        return [process for process in found if titled(process, "raylet")]
    return found


def listens(pid: int) -> bool:
    """Whether it has a handler for SIGTERM: not so in the first instants of Python."""
    caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def titled(process: psutil.Process, word: str) -> bool:
    try:
        return word in " ".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return False


def test_build_whose_ray_is_killed_leaves_no_process_and_is_ended_by_the_same_command(
    attack: Attack,
    singles: Undisturbed,
    ray_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    only_in_long_runs(request)
    out = tmp_path / "out"
    environment = {"RAY_TMPDIR": str(ray_folder)}
    for place, number in attack.draw.sample(HITS, 2):
        begun = time.monotonic()
        run = started(singles.argv(out), tmp_path, environment)
        seen = "worker" if place != "driver" else place
        wait_until(lambda run=run, seen=seen: victims(seen, run, ray_folder) or run.poll() == 0)
        if number != signal.SIGKILL:
            wait_until(lambda run=run: listens(run.pid))
        time.sleep(attack.draw.uniform(0, 7 if place == "driver" else 1))
        for process in victims(place, run, ray_folder):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        _, errors = run.communicate(timeout=120)
        if run.returncode != 0:
            check_end(place, number, run.returncode, errors)
        singles.check_published(out)
        none_stays(ray_folder, place)
        lost = time.monotonic() - begun
        attack.survived(number.name, f"build on Ray: {place}", seconds_lost=lost)
    run = started(singles.argv(out), tmp_path, environment)
    assert run.communicate(timeout=120)[1] == ""
    assert run.returncode == 0
    singles.check_whole(out)
    none_stays(ray_folder, "nothing")


def none_stays(folder: Path, hit: str) -> None:
    deadline = time.monotonic() + 60
    while (left := processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"{hit} was hit, {[process.cmdline()[:1] for process in left]} stay"


def check_end(place: str, number: signal.Signals, code: int, errors: str) -> None:
    if number == signal.SIGKILL:
        assert place != "worker", f"Ray does the work of a lost worker again: {errors}"
        if place != "raylet":
            assert code == -signal.SIGKILL
    else:
        assert code == 130, errors
        assert errors.splitlines()[-1] == STOPPED
