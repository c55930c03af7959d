"""A training that is killed, or whose disks and shards fail: it stops with one line or not
at all, and the same command ends with the bits of one that nobody disturbed."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tmpfs import tmpfs
from trainings import Training

KILLS = 5
ROOM = 1 << 26


@pytest.mark.first
def test_killed_at_any_instant_a_training_ends_with_the_same_bits(attack, whole, training):
    # Later lives begin later in the training: they reach its end before those of the first do.
    longest = 0.7 * whole.lives[0].seconds
    while len(training.lives) < KILLS:
        if not training.live(after=attack.draw.uniform(0, longest)).killed:
            break
    check_finished(whole, training)


def test_killed_between_two_files_of_a_checkpoint_takes_nothing_half_written(
    attack, whole, training
):
    operations = whole.lives[0].operations
    assert operations > 50, "saving and uploading were not seen"
    while len(training.lives) < KILLS:
        instant = attack.draw.randint(1, operations // 2)
        if not training.live(watch="checkpoint-", at=instant).killed:
            break
    check_finished(whole, training)


def check_finished(whole: Training, training: Training) -> None:
    """After the same command once more, where the last life was killed."""
    if training.lives[-1].killed:
        training.finish()
    training.check_same_as(whole)


def test_nothing_is_left_of_what_was_killed_in_its_first_file(whole, training, tmp_path):
    left = Path(training.run) / "checkpoint-00000003-0a0a0a"
    left.mkdir(parents=True)
    (left / ".another-host~1~hashes.json.x.tmp").write_bytes(b"half")
    (tmp_path / "temporary").mkdir()
    how: dict[str, Any] = {"environment": {"TMPDIR": str(tmp_path / "temporary")}}
    assert training.live(watch="checkpoint-", at=3, **how).killed
    assert list(tmp_path.glob("temporary/checkpoint-*")), "it was killed while it saved"
    training.finish(**how)
    assert not list(tmp_path.glob("temporary/checkpoint-*"))
    training.check_same_as(whole)


@pytest.mark.parametrize("place", ["temporary folder", "checkpoints"])
def test_full_disk_is_told_and_with_room_the_same_command_finishes(
    place, attack, whole, training, tmp_path
):
    needed = sum(len(data) for data in whole.files.values())
    with tmpfs(tmp_path / "disk", 4096 * attack.draw.randint(1, needed // 4096)) as disk:
        how: dict[str, Any] = {"environment": {"TMPDIR": str(disk.path)}}
        if place == "checkpoints":
            training.run, how = str(disk.path / "run"), {}
        training.live(**how).check_refused()
        disk.resize(ROOM)
        training.finish(**how)
        training.check_same_as(whole)


@pytest.mark.parametrize("fault", ["removed", "moved away", "read-only"])
def test_checkpoints_that_vanish_or_are_protected_cost_their_steps_at_most(
    fault, attack, whole, training, tmp_path
):
    with tmpfs(tmp_path / "disk", ROOM) as disk:
        run = training.run = str(disk.path / "run")
        sabotage = {
            "removed": ["rm", "-rf", run],
            "moved away": ["mv", run, f"{run}-away"],
            "read-only": ["mount", "-o", "remount,ro", str(disk.path)],
        }[fault]
        at = attack.draw.randint(5, whole.lives[0].operations // (2 if fault == "read-only" else 1))
        life = training.live(watch="checkpoint-", at=at, sabotage=sabotage)
        if life.status != 0:
            life.check_refused()
        disk.write_protect(False)
        if life.status != 0 or not Path(run).exists():
            training.finish()
        training.check_learned_as(whole)


# Every shard by one with other bytes, as a copy of another set would.
REPLACED = """
for shard in sorted(pathlib.Path(sys.argv[1]).glob("*.tar")):
    data = bytearray(shard.read_bytes())
    data[-2000] ^= 1
    new = shard.with_suffix(".new")
    new.write_bytes(data)
    new.rename(shard)
"""


@pytest.mark.parametrize("fault", ["moved away", "replaced"])
def test_shards_that_vanish_or_change_are_told_and_back_again_it_finishes(
    fault, attack, whole, training, tmp_path
):
    uri = training.uri = str(shutil.copytree(whole.uri, tmp_path / "set"))
    sabotage = [sys.executable, "-c", f"import pathlib, sys{REPLACED}", uri]
    if fault == "moved away":
        sabotage = ["mv", uri, f"{uri}-away"]
    at = attack.draw.randint(1, whole.lives[0].operations)
    life = training.live(watch="checkpoint-", at=at, sabotage=sabotage)
    if life.status != 0:
        life.check_refused()
    shutil.rmtree(uri, ignore_errors=True)
    shutil.copytree(whole.uri, uri)
    training.finish()
    training.check_same_as(whole)
