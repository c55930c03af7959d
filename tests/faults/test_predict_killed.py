"""SIGKILL at any instant of predictions, Ctrl-C, full disks: each part is there whole or not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mortal import Life, Mortals
from shard_sets import write_shard_set
from tmpfs import tmpfs

VAL = (7, 6, 5, 4)
KILLS = 4


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    with Mortals("mortal_training") as running:
        yield running


@pytest.fixture(scope="module")
def trained(mortals: Mortals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shard set and the checkpoints of a run."""
    folder = tmp_path_factory.mktemp("predict")
    write_shard_set(folder / "set", train=(8,), val=VAL)
    where = {"uri": str(folder / "set"), "run": str(folder / "run"), "log": str(folder / "log")}
    life = mortals.live("train", **where, changes={"optim_epochs": 1})
    assert life.status == 0, life.said
    return folder


def argv(trained: Path, out: Path) -> list[str]:
    return ["--data", str(trained / "set"), "--model", str(trained / "run"), "--out", str(out)]


@pytest.fixture(scope="module")
def whole(
    mortals: Mortals, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Life, dict[str, bytes]]:
    """Undisturbed predictions, by file."""
    out = tmp_path_factory.mktemp("whole") / "out"
    life = mortals.live("predict", argv=argv(trained, out), watch="whole")
    assert life.status == 0 and life.operations > 10, life.said
    return life, files(out)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def check_parts(out: Path, expected: dict[str, bytes]) -> None:
    """What others see in the folder, which pass over hidden files."""
    found = {name: data for name, data in files(out).items() if not name.startswith(".")}
    assert found.items() <= expected.items()


def test_killed_predictions_are_finished_by_the_same_command(
    attack, mortals, trained, whole, tmp_path
):
    out, lives = tmp_path / "whole-again", []
    longest, operations = whole[0].seconds, whole[0].operations
    for number in range(KILLS):
        how = {"after": attack.draw.uniform(0, longest)}
        if number % 2:
            how = {"watch": "whole", "at": attack.draw.randint(1, operations)}
        lives.append(mortals.live("predict", argv=argv(trained, out), **how))
        check_parts(out, whole[1])
    lives.append(mortals.live("predict", argv=argv(trained, out)))
    assert lives[-1].status == 0, lives[-1].said
    assert files(out) == whole[1] and lives[-1].said.count("\n") == 1
    kills, lost = sum(life.killed for life in lives), sum(life.seconds for life in lives) - longest
    attack.survived("SIGKILL", "predict", faults=kills, seconds_lost=max(0.0, lost))


def test_full_disk_is_one_line_and_with_room_the_same_command_finishes(
    attack, mortals, trained, whole, tmp_path
):
    needed = sum(len(data) for data in whole[1].values())
    with tmpfs(tmp_path / "disk", 4096 * attack.draw.randint(1, needed // 4096)) as disk:
        out = disk.path / "out"
        life = mortals.live("predict", argv=argv(trained, out))
        assert life.status == 2 and life.said.count("\n") == 1, life.said
        assert "make room there" in life.said
        check_parts(out, whole[1])
        disk.resize(1 << 24)
        assert mortals.live("predict", argv=argv(trained, out)).status == 0
        assert files(out) == whole[1]
    attack.survived("full disk", "predict")


def test_folder_that_vanishes_or_cannot_be_written_is_one_line(
    attack, mortals, trained, whole, tmp_path
):
    with tmpfs(tmp_path / "disk", 1 << 24) as disk:
        out = disk.path / "out"
        disk.write_protect()
        life = mortals.live("predict", argv=argv(trained, out))
        assert life.status == 2 and life.said.count("\n") == 1, life.said
        disk.write_protect(False)
        assert mortals.live("predict", argv=argv(trained, out)).status == 0
        assert files(out) == whole[1]
    attack.survived("read-only folder", "predict")
