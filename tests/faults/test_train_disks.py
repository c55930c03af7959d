"""Disks that are full, write-protected or gone, memory that ends, clocks that jump: a training
stops with one line or not at all, and the same command ends with the bits of one undisturbed."""

import math
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mortal import Life, Mortals
from shard_sets import write_shard_set
from tmpfs import tmpfs
from trainings import Training, check_same_as, learned

ROOM = 1 << 26


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    with Mortals("mortal_training") as running:
        yield running


@pytest.fixture(scope="module")
def whole(mortals: Mortals, tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("whole")
    uri = write_shard_set(folder / "set", train=(10, 9, 9), val=(7, 6))
    training = Training(mortals, uri, folder / "training")
    assert training.live(watch="checkpoint-").status == 0
    return training


@pytest.fixture
def uri(whole: Training, tmp_path: Path) -> str:
    """Shards that a test may take away."""
    return str(shutil.copytree(whole.uri, tmp_path / "set"))


def check_told(life: Life) -> None:
    """Stopped with one line that says what to do, below warnings at most."""
    assert life.status == 2, life.said
    assert "Traceback" not in life.said and life.said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("place", ["temporary folder", "checkpoints"])
def test_full_disk_is_told_and_with_room_the_same_command_finishes(
    attack, mortals, whole, tmp_path, place
):
    needed = sum(len(data) for data in whole.files.values())
    with tmpfs(tmp_path / "disk", 4096 * attack.draw.randint(1, needed // 4096)) as disk:
        training = Training(mortals, whole.uri, tmp_path / "training")
        how: dict[str, Any] = {"temporary": str(disk.path)}
        if place == "checkpoints":
            training.run, how = disk.path / "run", {}
        check_told(training.live(**how))
        disk.resize(ROOM)
        assert training.live(**how).status == 0, training.lives[-1].said
        check_same_as(whole, training)
    lost = max(0.0, training.seconds - whole.seconds)
    attack.survived("full disk", f"training, {place}", seconds_lost=lost)


# What somebody does to the folders of a running training, and whether it may go on.
def removed(path: str) -> list[str]:
    return ["rm", "-rf", path]


def moved(path: str) -> list[str]:
    return ["mv", path, f"{path}-away"]


def replaced(path: str) -> list[str]:
    """Every shard by one with other bytes, as a copy of another set would."""
    code = "import pathlib, sys\n"
    code += "for shard in sorted(pathlib.Path(sys.argv[1]).glob('*.tar')):\n"
    code += "    data = bytearray(shard.read_bytes()); data[-2000] ^= 1\n"
    code += "    new = shard.with_suffix('.new'); new.write_bytes(data); new.rename(shard)\n"
    return [sys.executable, "-c", code, path]


@pytest.mark.parametrize("sabotage", [removed, moved], ids=["removed", "moved away"])
def test_checkpoints_that_vanish_cost_their_steps_at_most(
    attack, mortals, whole, tmp_path, sabotage
):
    training = Training(mortals, whole.uri, tmp_path / "training")
    done = sabotage(str(training.run))
    at = attack.draw.randint(5, whole.lives[0].operations)
    life = training.live(watch="checkpoint-", at=at, sent=signal.SIGUSR1, signalled=done)
    if life.status != 0:
        check_told(life)
    if life.status != 0 or not training.run.exists():
        assert training.live().status == 0, training.lives[-1].said
    assert training.files == whole.files and learned(training) == learned(whole)
    lost = max(0.0, training.seconds - whole.seconds)
    attack.survived("folder vanishes", "checkpoints", seconds_lost=lost)


@pytest.mark.parametrize("sabotage", [moved, replaced], ids=["moved away", "replaced"])
def test_shards_that_vanish_or_change_are_told_and_back_again_it_finishes(
    attack, mortals, whole, uri, tmp_path, sabotage
):
    training = Training(mortals, uri, tmp_path / "training")
    after = attack.draw.uniform(0.2, whole.lives[0].seconds)
    life = training.live(after=after, sent=signal.SIGUSR1, signalled=sabotage(uri))
    if life.status not in (0, -signal.SIGUSR1):  # the signal came before it could be answered
        check_told(life)
    shutil.rmtree(f"{uri}-away", ignore_errors=True)
    shutil.rmtree(uri, ignore_errors=True)
    shutil.copytree(whole.uri, uri)
    assert training.live().status == 0, training.lives[-1].said
    check_same_as(whole, training)
    attack.survived("shards vanish or change", "training")


def test_disk_that_becomes_read_only_is_told_and_the_same_command_finishes(
    attack, mortals, whole, tmp_path
):
    with tmpfs(tmp_path / "disk", ROOM) as disk:
        training = Training(mortals, whole.uri, tmp_path / "training")
        training.run = disk.path / "run"
        protect = ["mount", "-o", "remount,ro", str(disk.path)]
        at = attack.draw.randint(1, whole.lives[0].operations // 2)
        how: dict[str, Any] = {"sent": signal.SIGUSR1, "signalled": protect}
        life = training.live(watch="checkpoint-", at=at, **how)
        if life.status != 0:
            check_told(life)
        disk.write_protect(False)
        assert training.live().status == 0, training.lives[-1].said
        check_same_as(whole, training)
    attack.survived("read-only folder", "checkpoints")


def test_clock_that_jumps_changes_nothing(attack, mortals, whole, tmp_path):
    training = Training(mortals, whole.uri, tmp_path / "training")
    life = training.live(clock=attack.draw.randrange(1 << 30))
    assert life.status == 0, life.said
    check_same_as(whole, training)
    for line in training.lines:
        if "eta_seconds" in line:
            assert 0 <= line["eta_seconds"] < 1000 and line["images_per_second"] > 0
            assert 0 < line["seconds"] < 1000 and math.isfinite(line["images_per_second"])
    attack.survived("clock jumps", "training")
