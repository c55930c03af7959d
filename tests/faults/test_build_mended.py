"""What attacks on the build found, each once more without chance."""

import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from build_lives import Lives
from build_set import Undisturbed, check_fates, one_line
from drawn import A, B, archives, imagefolder, jpeg

from alexnet.errors import UserError
from pipelines import finish, plan, plan_files, sources
from pipelines.build import job_for
from pipelines.write_shard import write_shard

pytest_plugins = ["build_fixtures"]


def test_repair_that_was_stopped_is_continued_and_no_build_takes_the_damage_for_good(
    lives: Lives, folders: Undisturbed, tmp_path: Path
) -> None:
    """A tar, and a quarantined image of another shard, have one byte changed; the repair got as
    far as the manifest."""
    out = shutil.copytree(folders.out, tmp_path / "out")
    tar = out / "train-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    for gone in ("_meta/train-000002.parquet", "manifest.json"):
        (out / gone).unlink()
    life = lives.start(*folders.argv(out))
    assert life.end() == 1
    assert "train-000002.tar already exists with different contents; delete it" in life.errors
    lives.run("verify", str(out), "--full", "--repair")
    folders.check_whole(out)


def test_verify_does_not_end_a_build_that_was_never_finished(
    lives: Lives, folders: Undisturbed, tmp_path: Path
) -> None:
    """Only the build command knows how many rejected images are a success."""
    out = tmp_path / "out"
    lives.run(*folders.argv(out), "--only", "0-2")
    life = lives.start("verify", str(out), "--repair")
    assert life.end() == 2
    one_line(life, f"error: {out}: no finished shard set")


def test_set_that_lost_its_plan_before_it_was_finished_is_continued(
    lives: Lives, folders: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lives.run(*folders.argv(out), "--only", "0-3")
    (out / "_meta" / "plan.json").unlink()
    life = lives.start("build", "--raw", str(folders.raw), "--out", str(out), "--seed", "7")
    assert life.end() == 2
    one_line(life, f"error: {out} is not empty")
    assert not (out / "_meta" / "plan.json").exists()
    assert "4 of 7 shards are already there" in lives.run(*folders.argv(out)).out
    folders.check_whole(out)


def test_shards_of_somebody_else_are_no_lost_set(
    lives: Lives, folders: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"another program's")
    life = lives.start(*folders.argv(out))
    assert life.end() == 2
    one_line(life, f"error: {out} is not empty (train-000000.tar, …) and no shard set")
    assert [path.name for path in out.iterdir()] == ["train-000000.tar"]


def test_what_killed_writers_left_is_removed_when_a_command_starts(
    lives: Lives, folders: Undisturbed, tmp_path: Path
) -> None:
    """At its end would be too late: a disk that is nearly full would fill up with it."""
    out, raw = shutil.copytree(folders.out, tmp_path / "out"), tmp_path / "raw"
    drawing = ["demo-raw", str(raw), "--classes", "2", "--per-class", "2", "--val-per-class", "1"]
    ended = subprocess.Popen(["true"])
    ended.wait()
    for argv, folder in (
        (folders.argv(out), out),
        (["report", str(out)], out / "report"),
        (drawing, raw),
    ):
        folder.mkdir(exist_ok=True)
        dead = folder / f".{socket.gethostname()}~{ended.pid}~file.x.tmp"
        others = [
            folder / f".{socket.gethostname()}~{os.getpid()}~file.x.tmp",  # under way
            folder / f".elsewhere~{ended.pid}~file.x.tmp",
            folder / ".some~thing.tmp",
        ]
        for path in (dead, *others):
            path.write_bytes(b"half")
        lives.run(*argv)
        assert not dead.exists()
        assert all(path.exists() for path in others)


def test_archive_that_changed_behind_the_plan_gives_no_shard(tmp_path: Path) -> None:
    """Its size is the same: at the planned places now lie other images, or none."""
    raw, out = archives(tmp_path / "raw"), tmp_path / "out"
    made = plan.make(sources.scan(str(raw), ("train", "val")), plan.Recipe(samples_per_shard=2))
    plan_files.begin(str(out), str(raw), made)
    train = raw / "ILSVRC2012_img_train.tar"
    train.write_bytes(train.read_bytes()[512:] + bytes(512))
    job = job_for(made, str(raw), str(out))
    for number, shard in enumerate(made.shards):
        if shard.split == "train":
            with pytest.raises(UserError, match=r"train\.tar has changed since this build began"):
                write_shard(job, number, shard.name, shard.id)
    assert not list(out.glob("*.tar")) and not (out / "quarantine").exists()


def test_image_that_grew_behind_the_plan_gives_no_shard(tmp_path: Path) -> None:
    """Read to its planned end, it would be stored, or rejected, as a cut one."""
    files = {f"train/{wnid}/{wnid}_{n}.JPEG": jpeg(n) for wnid in (A, B) for n in range(2)}
    raw, out = imagefolder(tmp_path / "raw", files), str(tmp_path / "out")
    made = plan.make(sources.scan(str(raw), ("train",)), plan.Recipe(splits=("train",)))
    plan_files.begin(out, str(raw), made)
    imagefolder(raw, {f"train/{A}/{A}_0.JPEG": jpeg(0) + b"more"})
    with pytest.raises(UserError, match=r"0\.JPEG has changed: it is longer than"):
        write_shard(job_for(made, str(raw), out), 0, made.shards[0].name, made.shards[0].id)


def test_out_that_was_taken_away_does_not_come_back_with_a_part_of_the_set(
    folders: Undisturbed, tmp_path: Path
) -> None:
    out, away = tmp_path / "out", tmp_path / "away"
    source = sources.scan(str(folders.raw), ("train", "val"))
    made = plan.make(source, plan.Recipe(samples_per_shard=4))
    plan_files.begin(str(out), str(folders.raw), made)
    job = job_for(made, str(folders.raw), str(out))
    for number, shard in enumerate(made.shards):
        write_shard(job, number, shard.name, shard.id)
    done, _ = finish.finished_shards(str(out), made)
    out.rename(away)
    for number in (0, len(made.shards) - 1):
        with pytest.raises(UserError, match="not there"):
            write_shard(job, number, made.shards[number].name, made.shards[number].id)
    with pytest.raises(UserError, match="not there"):
        finish.finish(str(out), replace(made, table=None), done)
    assert not out.exists()
    away.rename(out)
    finish.finish(str(out), made, done)
    check_fates(folders.raw, out)
