"""Fixtures of the attacks on pipelines/: the parent of the attacked processes, and two raw sets."""

from collections.abc import Iterator

import pytest
from build_lives import Lives
from build_set import CUT, Undisturbed, images, undisturbed
from drawn import archives, imagefolder, jpeg


@pytest.fixture(scope="session")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    started = Lives(tmp_path_factory.mktemp("lives"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def folders(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Class folders: seven shards, three images in quarantine."""
    root = tmp_path_factory.mktemp("folders")
    raw = imagefolder(root / "raw", images())
    flags = ["--samples-per-shard", "4", "--max-rejected", "3"]
    return undisturbed(lives, raw, root / "out", flags)


@pytest.fixture(scope="session")
def mended(
    lives: Lives, folders: Undisturbed, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    """The same folders, the two cut images whole."""
    root = tmp_path_factory.mktemp("mended")
    raw = imagefolder(root / "raw", images() | dict.fromkeys(CUT, jpeg(999)))
    return undisturbed(lives, raw, root / "out", folders.flags)


@pytest.fixture(scope="session")
def tars(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """ILSVRC archives, of which the index is kept in $ALEXNET_HOME."""
    root = tmp_path_factory.mktemp("tars")
    raw = archives(root / "raw")
    return undisturbed(lives, raw, root / "out", ["--samples-per-shard", "2"])
