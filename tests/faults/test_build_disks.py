"""Disks, folders and memory that fail under pipelines/: the same command ends the work."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from build_set import Undisturbed, check_refused, unfinished
from drawn import ROOT
from made import contents
from mortal import lived
from tmpfs import Disk, tmpfs

PAGE = 4096
RUNS = 3


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with tmpfs(tmp_path / "disk", 16 << 20) as disk:
        yield disk


# Full


def test_build_on_a_disk_that_somebody_fills_goes_on_once_there_is_room(
    attack, folders: Undisturbed, disk
):
    """It is filled when the build has looked and begins to write."""
    size = sum(-(-len(data) // PAGE) * PAGE for data in folders.files.values())
    ballast = disk.path / "ballast"
    for number in range(RUNS):
        out = disk.path / f"out{number}"
        taken = (16 << 20) - attack.draw.randrange(0, size, PAGE)
        filling = ["sh", "-c", f"head -c {taken} /dev/zero > {ballast}"]
        life = folders.start(out, watch=str(out), at=2, sabotage=filling)
        assert life.end() != 0, "there was room"
        check_refused(life)
        assert "make room" in life.errors
        folders.check_published(out)
        assert unfinished(disk.path) == []
        ballast.unlink()
        folders.finish(out)
        shutil.rmtree(out)


@pytest.mark.parametrize("command", ["build", "verify --repair", "build --retry-quarantined"])
def test_command_on_a_full_disk_is_refused_and_goes_on_once_there_is_room(
    command, attack, folders: Undisturbed, mended: Undisturbed, disk
):
    out = disk.path / "out"
    argv, after, largest = folders.argv(out), folders, 12 * PAGE
    if command == "build --retry-quarantined":
        shutil.copytree(folders.out, out)
        argv, after, largest = [*mended.argv(out), "--retry-quarantined"], mended, 60_000
    elif command == "verify --repair":
        shutil.copytree(folders.out, out)
        for name in attack.draw.sample([n for n in folders.files if "/plan" not in n], 3):
            (out / name).write_bytes(b"damaged")
        argv, largest = ["verify", str(out), "--full", "--repair"], 120_000
    filler = disk.fill(attack.draw.randrange(0, largest, PAGE))
    life = lived("pipelines", argv=argv)
    if not (life.status == 1 and command == "verify --repair"):  # which reports what is wrong
        assert life.status == 0 or check_refused(life) is None
    assert unfinished(disk.path) == []
    filler.unlink()
    again = lived("pipelines", argv=argv)
    assert again.status == 0, again.errors
    after.check_whole(out)


# Taken away, write-protected, changed


@dataclass
class Place:
    """OUT is a folder on a disk of its own, mounted once more at `out` where that is unmounted."""

    disk: Disk
    raw: Path
    out: Path
    away: Path
    draw: random.Random


def protected(place: Place) -> None:
    remount = ["mount", "-o", "remount,ro", str(place.disk.path)]
    while subprocess.run(remount, capture_output=True).returncode:  # while a file is being written
        time.sleep(0.001)


def out_renamed(place: Place) -> None:
    if place.out.exists():
        place.out.rename(place.away)


def out_removed(place: Place) -> None:
    while place.out.exists():  # what came meanwhile keeps the folder
        shutil.rmtree(place.out, ignore_errors=True)


def out_unmounted(place: Place) -> None:
    subprocess.run(["umount", "--lazy", str(place.out)], check=True)


def raw_renamed(place: Place) -> None:
    place.raw.rename(place.away)


def raw_changed(place: Place) -> None:
    """An image cut, or exchanged for a longer one; an archive cut, or its members in another order
    and at other places."""
    images = [path for path in place.raw.rglob("*") if path.suffix in (".JPEG", ".tar")]
    file = place.draw.choice(sorted(images))
    data, beside = file.read_bytes(), file.with_name("new")
    if file.suffix == ".tar" and place.draw.random() < 0.7:
        beside.write_bytes(data[1024:-10240].ljust(len(data), b"\0"))
    else:
        half = data[: len(data) // 2] if place.draw.random() < 0.5 else b""
        beside.write_bytes(half or data + b"more")
    beside.replace(file)


@pytest.mark.parametrize(
    ("layout", "fault"),
    [("folders", fault) for fault in (protected, out_renamed, out_removed, out_unmounted)]
    + [(layout, fault) for layout in ("folders", "tars") for fault in (raw_renamed, raw_changed)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_build_whose_folder_fails_ends_in_a_line_and_is_done_again(
    layout, fault, attack, request, disk, tmp_path
):
    whole: Undisturbed = request.getfixturevalue(layout)
    for number in range(RUNS):
        raw = shutil.copytree(whole.raw, tmp_path / f"raw{number}")
        out, away = disk.path / f"out{number}", disk.path / f"away{number}"
        place = Place(disk, raw, out, raw.with_suffix(".away"), attack.draw)
        if fault is out_renamed:
            place.away = away
        elif fault is out_unmounted:
            away.mkdir()
            out.mkdir()
            subprocess.run(["mount", "--bind", str(away), str(out)], check=True)
        life = whole.start(out, raw=raw)
        life.after(attack.draw.uniform(0, whole.seconds), lambda place=place: fault(place))
        if life.end() != 0:
            check_refused(life)
        if fault is protected:
            disk.write_protect(False)
        elif fault is raw_changed and of_another_plan(whole, out):
            shutil.rmtree(out)  # it was changed before it was looked at
        assert not (out / "manifest.json").exists() or contents(str(out)) == whole.files
        whole.check_published(out)
        if fault is out_unmounted:
            whole.check_published(away)
            subprocess.run(["mount", "--bind", str(away), str(out)], check=True)
        whole.finish(out)
        if fault is out_unmounted:
            subprocess.run(["umount", str(out)], check=True)


def of_another_plan(whole: Undisturbed, out: Path) -> bool:
    plan = out / "_meta/plan.json"
    return plan.exists() and plan.read_bytes() != whole.files["_meta/plan.json"]


# Memory


def test_build_without_memory_rejects_no_image_and_goes_on_with_more(
    attack, folders: Undisturbed, tmp_path
):
    for number in range(RUNS):
        out = tmp_path / f"out{number}"
        life = folders.start(out, memory=attack.draw.randrange(4, 48) << 20)
        life.end()
        folders.check_published(out)
        folders.finish(out)


@pytest.mark.first
def test_good_image_that_finds_no_memory_is_not_rejected():
    """A progressive JPEG needs several times its pixels; libjpeg says so like of any damage."""
    said = subprocess.run(
        [sys.executable, "-c", _DECODE],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "MemoryError Insufficient memory (case 4)\n"


_DECODE = """
import io, re, resource
from pathlib import Path
from PIL import Image
from pipelines.transform import to_stored

def encoded(side):
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "JPEG", progressive=True)
    return file.getvalue()

large = encoded(3000)
to_stored(encoded(300), 256, 227, 90)  # what is loaded once
used = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)
try:
    print(to_stored(large, 256, 227, 90))
except MemoryError as error:
    print("MemoryError", error)
"""
