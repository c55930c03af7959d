"""Shards from S3, through a real HTTP server: downloaded once, kept within the bound, verified."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from shard_sets import write_shard_set
from test_loader import SIZES, assert_equal_to_tars, open_loader

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import Manifest, load_manifest
from training.loader import Loader


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def own_set(tmp_path: Path) -> Path:
    return Path(write_shard_set(tmp_path / "own", train=SIZES, val=(3,)))


@pytest.fixture
def s3_set(own_set: Path, s3: str) -> tuple[Path, str, Manifest]:
    """The local set, its copy in the bucket, and their manifest."""
    uri = f"{s3}/loader-set"
    for path in own_set.rglob("*"):
        if path.is_file():
            storage.write(f"{uri}/{path.relative_to(own_set)}", path.read_bytes())
    return own_set, uri, load_manifest(uri)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards fetched from the store, in order."""
    fetched: list[str] = []
    read = storage.read

    def counting(uri: str, *args: int) -> bytes:
        if uri.endswith(".tar"):
            fetched.append(uri.rsplit("/", 1)[1])
        return read(uri, *args)

    monkeypatch.setattr(storage, "read", counting)
    return fetched


def cached(home: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (home / "cache").glob("*/*.tar")}


def test_s3_shards_give_the_same_pixels_and_are_downloaded_once(s3_set, downloads, home):
    folder, uri, _ = s3_set
    for _ in range(2):
        with open_loader(uri) as loader:
            assert_equal_to_tars(folder, loader, "train", [14, 0, 5, 9, 2])
    assert sorted(downloads) == [f"train-00000{i}.tar" for i in range(3)]
    assert len(cached(home)) == 3
    assert not list((home / "cache").glob("*/*.partial"))


def test_eviction_drops_the_least_recently_used_and_keeps_the_bound(s3_set, downloads, home):
    folder, uri, manifest = s3_set
    sizes = [shard.num_bytes for shard in manifest.split_shards("train")]
    room = (sum(sizes) - 1) / 1e9  # one byte too few for all three
    for shard, ids in enumerate(([0], [5])):
        with open_loader(uri, cache_gb=room) as loader:
            loader.read(np.array(ids))
        assert len(cached(home)) == shard + 1
        time.sleep(0.02)  # file times tell which one is older
    with open_loader(uri, cache_gb=room) as loader:
        loader.read(np.array([0]))  # now train-000001 is the one not used for longest
        time.sleep(0.02)
        loader.read(np.array([14]))
        assert sum(cached(home).values()) <= room * 1e9
        assert set(cached(home)) == {"train-000000.tar", "train-000002.tar"}
        assert_equal_to_tars(folder, loader, "train", [5, 14, 0])
    assert downloads.count("train-000000.tar") <= 2 and downloads.count("train-000001.tar") == 2


def test_shards_that_arrive_together_keep_the_bound_too(s3_set, home, monkeypatch):
    _, uri, manifest = s3_set
    room = max(shard.num_bytes for shard in manifest.split_shards("train"))
    with open_loader(uri, threads=3, cache_gb=room / 1e9) as loader:
        make_room = loader._files._make_room

        def and_dawdle(num_bytes: int) -> None:
            make_room(num_bytes)
            time.sleep(0.1)  # the others arrive now

        monkeypatch.setattr(loader._files, "_make_room", and_dawdle)
        loader._files.fetch({"train-000000", "train-000001", "train-000002"}, loader._pool)
        assert 0 < sum(cached(home).values()) <= room


def test_shard_evicted_by_a_neighbour_before_it_is_open_is_fetched_again(s3_set, monkeypatch, home):
    folder, uri, _ = s3_set
    with open_loader(uri) as loader:
        download, evictions = loader._files._download, []

        def evicted_once(name: str) -> None:
            download(name)
            if len(evictions) < 2:  # the first is before the batch, the second before the map
                evictions.append(name)
                next((home / "cache").glob(f"*/{name}.tar")).unlink()

        monkeypatch.setattr(loader._files, "_download", evicted_once)
        assert_equal_to_tars(folder, loader, "train", [0])
        assert len(evictions) == 2


def test_a_cache_that_never_holds_what_is_in_use_is_told(s3_set, monkeypatch, home):
    _, uri, _ = s3_set
    with open_loader(uri, cache_gb=0.25) as loader:
        monkeypatch.setattr(loader._files, "_download", lambda name: None)
        with pytest.raises(UserError, match=r"--cache-gb 0.25 cannot hold"):
            loader.read(np.array([0]))


def test_s3_shard_with_another_sha256_is_refused_and_not_cached(s3_set, home):
    folder, uri, _ = s3_set
    data = bytearray((folder / "train-000001.tar").read_bytes())
    data[-1] ^= 1  # same length
    storage.write(f"{uri}/train-000001.tar", bytes(data))
    with open_loader(uri) as loader:
        loader.read(np.array([0]))
        with pytest.raises(UserError, match=r"train-000001.tar is not what its manifest"):
            loader.read(np.array([5]))
    assert set(cached(home)) == {"train-000000.tar"}


def test_workers_of_a_node_download_a_shard_once_between_them(s3_set, downloads):
    folder, uri, _ = s3_set
    loaders = [open_loader(uri) for _ in range(4)]
    start = threading.Barrier(4)

    def read(loader: Loader) -> None:
        start.wait()
        assert_equal_to_tars(folder, loader, "train", [0, 1])

    threads = [threading.Thread(target=read, args=(loader,)) for loader in loaders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loader in loaders:
        loader.__exit__()
    assert downloads == ["train-000000.tar"]
