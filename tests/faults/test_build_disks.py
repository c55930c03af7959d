"""Disks and folders that fail under pipelines/: full, read-only, taken away, changed."""

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import Attack
from build_lives import Life, Lives
from build_set import Undisturbed, unfinished
from made import contents

pytest_plugins = ["build_fixtures"]
PAGE = 4096


def mounted(*arguments: str) -> None:
    if subprocess.run(["mount", *arguments], capture_output=True).returncode != 0:
        pytest.skip("this machine mounts nothing, or only for root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place))
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, left: int) -> None:
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(b"\0" * max(0, free - left))


def refused(life: Life, code: int) -> None:
    """In one line."""
    assert code in (1, 2), life.errors
    lines = life.errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith(("error: ", "failed: ")), life.errors


def test_build_on_a_disk_that_somebody_fills_goes_on_once_there_is_room(
    lives: Lives, attack: Attack, folders: Undisturbed, disk: Path
) -> None:
    size = sum(-(-len(data) // PAGE) * PAGE for data in folders.files.values())
    full = 0
    for number in range(4):
        out = disk / f"out{number}"
        left = attack.draw.randrange(0, size, PAGE)
        life = lives.start(*folders.argv(out), ballast=[str(disk / "ballast"), left])
        code = life.end()
        folders.check_published(out)
        assert unfinished(disk) == []
        if code != 0:
            refused(life, code)
            assert "make room" in life.errors
            full += 1
        (disk / "ballast").unlink()
        lives.run(*folders.argv(out))
        folders.check_whole(out)
        shutil.rmtree(out)
    attack.survived("disk full", "build: shards, index, manifest", faults=full)


def test_other_commands_on_a_full_disk_are_told_and_go_on_once_there_is_room(
    lives: Lives, attack: Attack, folders: Undisturbed, mended: Undisturbed, disk: Path
) -> None:
    out, raw = disk / "out", disk / "drawn"
    drawing = ["demo-raw", str(raw), "--classes", "2", "--per-class", "3", "--val-per-class", "2"]
    for place, argv, largest, made in (
        ("build: plan", folders.argv(out), 12 * PAGE, folders),
        ("build --retry-quarantined", [*mended.argv(out), "--retry-quarantined"], 60_000, mended),
        ("verify --repair", ["verify", str(out), "--full", "--repair"], 120_000, mended),
        ("report", ["report", str(out)], 60_000, mended),
        ("demo-raw", drawing, 100_000, mended),
    ):
        if place == "verify --repair":
            for name in attack.draw.sample(sorted(mended.files), 3):
                (out / name).write_bytes(b"damaged")
            shutil.copyfile(mended.out / "_meta/plan.json", out / "_meta/plan.json")
            shutil.copyfile(mended.out / "_meta/plan.parquet", out / "_meta/plan.parquet")
        fill(disk, attack.draw.randrange(0, largest, PAGE))
        life = lives.start(*argv)
        full = 0
        if (code := life.end()) != 0 and not (place == "verify --repair" and code == 1):
            refused(life, code)
            full = 1
        assert unfinished(disk) == []
        (disk / "ballast").unlink()
        lives.run(*argv)
        if place != "demo-raw":
            report = out / "report"
            shutil.rmtree(report, ignore_errors=True)
            made.check_whole(out)
        attack.survived("disk full", place, faults=full)


def test_index_that_finds_no_room_in_the_home_costs_no_build(
    lives: Lives, tars: Undisturbed, disk: Path, tmp_path: Path
) -> None:
    fill(disk, 0)
    life = lives.run(*tars.argv(tmp_path / "out"), environment={"ALEXNET_HOME": f"{disk}/home"})
    assert "is not kept" in life.errors
    tars.check_whole(tmp_path / "out")


def test_build_on_a_disk_that_becomes_read_only_goes_on_afterwards(
    lives: Lives, attack: Attack, folders: Undisturbed, disk: Path
) -> None:
    hits = 0
    for number in range(3):
        out = disk / f"out{number}"
        life = lives.start(*folders.argv(out))

        def only_read() -> None:
            while subprocess.run(  # refused while a file is being written
                ["mount", "-o", "remount,ro", str(disk)], capture_output=True
            ).returncode:
                time.sleep(0.001)

        life.after(attack.draw.uniform(0, folders.seconds), only_read)
        if (code := life.end()) != 0:
            refused(life, code)
            hits += 1
        mounted("-o", "remount,rw", str(disk))
        folders.check_published(out)
        lives.run(*folders.argv(out))
        folders.check_whole(out)
    attack.survived("read-only OUT", "build", faults=hits)


@pytest.mark.parametrize("how", ["renamed", "removed", "unmounted"])
def test_build_whose_out_vanishes_ends_and_the_same_command_makes_it(
    how: str, lives: Lives, attack: Attack, folders: Undisturbed, tmp_path: Path
) -> None:
    hits = 0
    for number in range(3):
        out, away = tmp_path / f"out{number}", tmp_path / f"away{number}"
        if how == "unmounted":
            away.mkdir()
            out.mkdir()
            mounted("--bind", str(away), str(out))
        life = lives.start(*folders.argv(out))

        def vanish(out: Path = out, away: Path = away) -> None:
            if how == "unmounted":
                subprocess.run(["umount", "--lazy", str(out)], check=True)
            elif how == "renamed" and out.exists():
                out.rename(away)
            while how == "removed" and out.exists():  # what came meanwhile keeps the folder
                shutil.rmtree(out, ignore_errors=True)

        life.after(attack.draw.uniform(0, folders.seconds), vanish)
        if (code := life.end()) != 0:
            refused(life, code)
            hits += 1
        assert not (out / "manifest.json").exists() or contents(str(out)) == folders.files
        folders.check_published(out)
        if how == "unmounted":
            folders.check_published(away)
            mounted("--bind", str(away), str(out))
        lives.run(*folders.argv(out))
        folders.check_whole(out)
        if how == "unmounted":
            subprocess.run(["umount", str(out)], check=True)
    attack.survived(f"OUT {how}", "build", faults=hits)


@pytest.mark.parametrize("layout", ["folders", "tars"])
def test_build_whose_raw_vanishes_for_a_while_goes_on_afterwards(
    layout: str, lives: Lives, attack: Attack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole: Undisturbed = request.getfixturevalue(layout)
    raw, out, hits = shutil.copytree(whole.raw, tmp_path / "raw"), tmp_path / "out", 0
    for _ in range(3):
        life = lives.start(*whole.argv(out, raw))
        life.after(attack.draw.uniform(0, whole.seconds), lambda: raw.rename(tmp_path / "away"))
        if (code := life.end()) != 0:
            refused(life, code)
            hits += 1
        (tmp_path / "away").rename(raw)
        whole.check_published(out)
    lives.run(*whole.argv(out, raw))
    whole.check_whole(out)
    attack.survived("RAW vanished", f"build ({layout})", faults=hits)


def change(raw: Path, draw: random.Random) -> None:
    """An image cut, or exchanged for a longer one; an archive cut, or its members in another
    order and at other places."""
    file = draw.choice(sorted(path for path in raw.rglob("*") if path.suffix in (".JPEG", ".tar")))
    data = file.read_bytes()
    beside = file.with_name("new")
    if file.suffix == ".tar" and draw.random() < 0.7:
        beside.write_bytes(data[1024:-10240].ljust(len(data), b"\0"))
    else:
        beside.write_bytes(
            data[: len(data) // 2] if data and draw.random() < 0.5 else data + b"more"
        )
    beside.replace(file)


@pytest.mark.parametrize("layout", ["folders", "tars"])
def test_build_whose_raw_changes_refuses_it_and_goes_on_with_the_old_one(
    layout: str, lives: Lives, attack: Attack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole: Undisturbed = request.getfixturevalue(layout)
    out, hits = tmp_path / "out", 0
    for number in range(3):
        raw = shutil.copytree(whole.raw, tmp_path / f"raw{number}")
        life = lives.start(*whole.argv(out, raw))
        life.after(attack.draw.uniform(0, whole.seconds), lambda raw=raw: change(raw, attack.draw))
        if (code := life.end()) != 0:
            refused(life, code)
            hits += 1
        if (out / "_meta/plan.json").exists() and (out / "_meta/plan.json").read_bytes() != (
            whole.files["_meta/plan.json"]
        ):
            shutil.rmtree(out)  # it was changed before it was looked at: another set
        whole.check_published(out)
    lives.run(*whole.argv(out))
    whole.check_whole(out)
    attack.survived("RAW changed", f"build ({layout})", faults=hits)
