"""The cache of S3 shards: killed downloads, full and vanishing disks feed nothing wrong."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mortal import Mortals
from s3_shards import cached, uploaded
from shard_sets import assert_equal_to_tars, open_loader
from tmpfs import tmpfs

from pipelines.shards import Manifest

KILLS = 4


@pytest.fixture(scope="module")
def stored(s3: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Manifest]:
    """A local set, its copy in the bucket, and their manifest."""
    return uploaded(tmp_path_factory.mktemp("stored") / "own", f"{s3}/faults-set")


@pytest.fixture(scope="module")
def mortals(s3: str) -> Iterator[Mortals]:
    with Mortals("mortal_training") as running:
        yield running


@pytest.fixture(scope="module")
def whole(mortals: Mortals, stored, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, float]:
    """Operations on files and seconds of an undisturbed life."""
    home = tmp_path_factory.mktemp("whole")
    life = mortals.live("fetch", uri=stored[1], home=home, watch="/cache/")
    assert life.status == 0 and life.operations > 5, life.said
    return life.operations, life.seconds


def check_fed(stored: tuple[Path, str, Manifest], home: Path) -> None:
    """Each cached shard is what its name says, and a reader gets the images of the local set."""
    folder, uri, manifest = stored
    cached(home, manifest)
    with open_loader(uri) as loader:
        assert_equal_to_tars(folder, loader, "train", list(range(15)))
        loader.read(np.arange(15))
    assert len(cached(home, manifest)) == 3
    assert not list((home / "cache").glob("*.partial"))


def test_killed_downloads_leave_nothing_that_is_taken_for_a_shard(
    attack, mortals, stored, whole, home
):
    kills = 0
    for number in range(KILLS):
        shutil.rmtree(home / "cache", ignore_errors=True)
        how = {"after": attack.draw.uniform(0, whole[1])}
        if number % 2:
            how = {"watch": "/cache/", "at": attack.draw.randint(1, whole[0])}
        kills += mortals.live("fetch", uri=stored[1], home=home, **how).killed
        cached(home, stored[2])
        check_fed(stored, home)
    attack.survived("SIGKILL", "cache of S3 shards", faults=kills)


def test_full_disk_of_the_cache_is_told_and_with_room_all_is_read(
    attack, mortals, stored, tmp_path, monkeypatch
):
    largest = max(shard.num_bytes for shard in stored[2].split_shards("train"))
    with tmpfs(tmp_path / "disk", 4096 * attack.draw.randint(1, largest // 4096)) as disk:
        monkeypatch.setenv("ALEXNET_HOME", str(disk.path))
        life = mortals.live("fetch", uri=stored[1], home=disk.path)
        assert life.status == 2 and "Traceback" not in life.said, life.said
        assert "free that disk, set ALEXNET_HOME" in life.said.splitlines()[-1]
        disk.resize(1 << 26)
        check_fed(stored, disk.path)
    attack.survived("full disk", "cache of S3 shards")


def test_cache_that_vanishes_is_fetched_again_or_told(attack, mortals, stored, whole, home):
    gone, at = ["rm", "-rf", str(home)], attack.draw.randint(1, whole[0])
    how = {"sent": signal.SIGUSR1, "signalled": gone, "watch": "/cache/", "at": at}
    life = mortals.live("fetch", uri=stored[1], home=home, **how)
    assert life.status in (0, 2) and "Traceback" not in life.said, life.said
    check_fed(stored, home)
    attack.survived("folder vanishes", "cache of S3 shards")
