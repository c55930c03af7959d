"""Clocks that jump and memory that is not there, in builds."""

from pathlib import Path

import pytest
from attacks import Attack
from build_lives import Lives
from build_set import Undisturbed

pytest_plugins = ["build_fixtures"]
MIB = 1 << 20
DAY = 86400


def test_build_without_memory_rejects_no_picture_and_goes_on_with_more(
    lives: Lives, attack: Attack, folders: Undisturbed, tmp_path: Path
) -> None:
    hits = 0
    for number in range(4):
        out = tmp_path / f"out{number}"
        life = lives.start(*folders.argv(out), address_bytes=attack.draw.randrange(0, 96 * MIB))
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
