"""Clocks that jump and memory that is not there, in builds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attacks import Attack
from build_lives import Lives
from build_set import Undisturbed
from drawn import ROOT

pytest_plugins = ["build_fixtures"]
MIB = 1 << 20
DAY = 86400


def test_build_without_memory_rejects_no_image_and_goes_on_with_more(
    lives: Lives, attack: Attack, folders: Undisturbed, tmp_path: Path
) -> None:
    hits = 0
    for number in range(4):
        out = tmp_path / f"out{number}"
        life = lives.start(*folders.argv(out), address_bytes=attack.draw.randrange(4, 48) * MIB)
        hits += life.end() != 0
        folders.check_published(out)
        lives.run(*folders.argv(out))
        folders.check_whole(out)
    attack.survived("out of memory", "build, address space of the process", faults=hits)


@pytest.mark.parametrize("place", ["build", "status"])
def test_clock_that_jumps_changes_no_byte_and_no_command_fails(
    place: str, lives: Lives, attack: Attack, folders: Undisturbed, tmp_path: Path
) -> None:
    draw, out = attack.draw, tmp_path / "out"
    jumps = [
        (draw.randint(1, 12), draw.choice([-1, 1]) * DAY * 10 ** draw.uniform(-4, 4))
        for _ in range(3)
    ]
    build = folders.argv(out)
    lives.run(*build, "--only", "0-3", **({"jumps": jumps} if place == "build" else {}))
    for argv in (["status", str(out)], build, ["status", str(out)], ["report", str(out)]):
        life = lives.run(*argv, jumps=jumps)
        assert life.errors == ""
        if argv[0] == "status":
            assert " -" not in life.out, "an age before its birth"
    for path in out.glob("report/*"):
        path.unlink()
    (out / "report").rmdir()
    folders.check_whole(out)
    attack.survived("clock jumps", f"build, status, report (since {place})", faults=len(jumps))


def test_good_image_that_finds_no_memory_is_not_rejected() -> None:
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
import os
import subprocess
import sys
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
