"""The cache of S3 shards on a node: fetched once, kept within the bound, never stale; a store that
errs, lies or stays away, and a disk that is full, are retried, then told in a line."""

import contextlib
import errno
import fcntl
import hashlib
import os
import resource
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from drawn import ROOT
from s3_shards import cached, info_of, uploaded
from shard_sets import assert_equal_to_tars, open_loader
from waiting import wait_until

from alexnet.errors import UserError
from pipelines import command, storage
from training.loader import Loader

pytestmark = pytest.mark.usefixtures("home")


def test_s3_shards_give_the_same_pixels_and_are_downloaded_once(
    s3_set, downloads, home, monkeypatch
):
    folder, uri, manifest = s3_set
    monkeypatch.setattr("training.shard_cache._CHUNK", 10_000)  # so that they take several requests
    for _ in range(2):
        with open_loader(uri) as loader:
            assert_equal_to_tars(folder, loader, "train", [14, 0, 5, 9, 2])
    assert len(cached(home, manifest)) == 3
    for name, size in cached(home, manifest).items():
        assert downloads.count(f"{name}.tar") == -(-size // 10_000) > 3
    assert not list((home / "cache").glob("*.partial"))


def read_one(uri: str, sample: int, cache_gb: float = 1.0) -> None:
    with open_loader(uri, cache_gb=cache_gb) as loader:
        loader.read(np.array([sample]))


def test_eviction_drops_the_least_recently_used_and_keeps_the_bound(s3_set, downloads, home):
    folder, uri, manifest = s3_set
    sizes = [shard.num_bytes for shard in manifest.split_shards("train")]
    room = (sum(sizes) - 1) / 1e9  # one byte too few for all three
    for sample in (0, 5, 0, 14):  # of shards 0, 1, 0, 2
        read_one(uri, sample, room)
        assert sum(cached(home, manifest).values()) <= room * 1e9
        time.sleep(0.02)  # file times tell which one is older
    assert set(cached(home, manifest)) == {"train-000000", "train-000002"}
    with open_loader(uri, cache_gb=room) as loader:
        assert_equal_to_tars(folder, loader, "train", [5, 14, 0])
    assert downloads.count("train-000000.tar") <= 2 and downloads.count("train-000001.tar") == 2


def test_what_is_open_is_not_evicted_and_all_that_goes_beyond_the_bound(s3_set, home, downloads):
    folder, uri, manifest = s3_set
    with open_loader(uri, cache_gb=0) as first, open_loader(uri, cache_gb=0) as second:
        first.read(np.array([0]))
        second.read(np.array([5]))  # evicts whatever nobody has open
        assert set(cached(home, manifest)) == {"train-000000", "train-000001"}
        assert_equal_to_tars(folder, first, "train", [0])
        first.read(np.array([14]))  # and lets go of train-000000
        second.read(np.array([14]))
        assert "train-000002" in cached(home, manifest)
    assert downloads == [f"train-00000{i}.tar" for i in range(3)]
    read_one(uri, 6, cache_gb=0)
    with open_loader(uri, "val", cache_gb=0) as loader:
        loader.read(np.array([0]))
        assert set(cached(home, manifest)) == {"val-000000"}, "nothing else is open any more"
    assert cached(home, manifest) == {}, "the bound holds again"


def together(count: int, work: Callable[[int], object]) -> None:
    """`work(0)`, `work(1)`, … at the same time."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def test_shards_that_arrive_together_keep_the_bound_too(s3_set, home):
    _, uri, manifest = s3_set
    room = max(shard.num_bytes for shard in manifest.split_shards("train"))
    meeting = threading.Barrier(3, timeout=120)

    def read(number: int) -> None:
        with open_loader(uri, cache_gb=room / 1e9) as loader:
            meeting.wait()
            loader.read(np.array([(0, 5, 14)[number]]))
            meeting.wait()

    together(3, read)
    assert 0 < sum(cached(home, manifest).values()) <= room


def test_workers_of_a_node_download_a_shard_once_between_them(s3_set, downloads):
    folder, uri, _ = s3_set
    with contextlib.ExitStack() as stack:
        loaders = [stack.enter_context(open_loader(uri)) for _ in range(4)]
        meeting = threading.Barrier(4, timeout=120)

        def read(number: int) -> None:
            meeting.wait()
            assert_equal_to_tars(folder, loaders[number], "train", [0, 1])

        together(4, read)
    assert downloads == ["train-000000.tar"]


def test_shard_evicted_by_a_neighbour_before_it_is_open_is_fetched_again(s3_set, monkeypatch, home):
    folder, uri, _ = s3_set
    with open_loader(uri) as loader:
        cache = loader._files._cache
        fetch, evictions = cache._fetch, []

        def evicted_once(uri: str, info) -> None:
            fetch(uri, info)
            if len(evictions) < 2:
                evictions.append(info.name)
                (home / "cache" / f"{info.sha256}.tar").unlink()

        monkeypatch.setattr(cache, "_fetch", evicted_once)
        assert_equal_to_tars(folder, loader, "train", [0])
        assert len(evictions) == 2


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_cache_file_feeds_nothing_and_is_replaced(s3_set, home, downloads, damage):
    folder, uri, manifest = s3_set
    read_one(uri, 0)
    (path,) = (home / "cache").glob("*.tar")
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data if damage == "flip" else data[:2000])
    with open_loader(uri) as loader:
        assert_equal_to_tars(folder, loader, "train", [0, 1, 2, 3, 4])
    assert downloads == ["train-000000.tar"] * 2
    assert set(cached(home, manifest)) == {"train-000000"}


def test_cache_of_another_set_at_the_same_address_is_not_used(s3_set, tmp_path):
    _, uri, _ = s3_set
    read_one(uri, 0)
    other, _, _ = uploaded(tmp_path / "other", uri, seed=9)
    with open_loader(uri) as loader:
        assert_equal_to_tars(other, loader, "train", [0, 1, 14])


KILLED = """
import os, signal, sys, threading
from pipelines import storage
from pipelines.shards import ShardInfo
from training.shard_cache import NodeCache
def read(uri, offset, length):
    if offset:
        print("half way", flush=True)
        signal.pause()
    return b"x" * length
storage.read = read
info = ShardInfo("train-000000", "train", 1, 40_000_000, sys.argv[1])
NodeCache(10**9, threading.Event()).open("s3://bucket/train-000000.tar", info)
"""


@pytest.fixture
def half_a_shard(s3_set, home: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process in the middle of a download, and its partial file. Killed in the end."""
    sha256 = info_of(s3_set[2], "train-000000").sha256
    command = [sys.executable, "-c", KILLED, sha256]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half way\n"
        yield process, home / "cache" / f"{sha256}.partial"
        process.kill()


def test_what_a_killed_download_left_goes_with_the_next_one(s3_set, home, half_a_shard):
    folder, uri, manifest = s3_set
    process, partial = half_a_shard
    with open_loader(uri) as loader:
        loader.read(np.array([5]))
        assert partial.stat().st_size == 40_000_000, "in progress: neither removed nor in the way"
        process.kill()
        process.wait()
        loader.read(np.array([14]))
        assert not partial.exists()
        assert_equal_to_tars(folder, loader, "train", [0, 5])
    assert len(cached(home, manifest)) == 3


def test_the_shard_of_a_killed_download_is_fetched_by_its_neighbour(s3_set, half_a_shard):
    folder, uri, _ = s3_set
    process, _ = half_a_shard
    with open_loader(uri) as loader:
        waiting = loader._begin(np.array([0, 1]), False, [], [])
        time.sleep(0.2)
        assert not waiting.parts[0].done(), "one download per node"
        process.kill()
        process.wait()
        assert loader._finish(waiting).sample_ids.tolist() == [0, 1]
        assert_equal_to_tars(folder, loader, "train", [0, 1])


def test_a_home_without_locks_is_noted_and_the_nodes_own_disk_holds_the_shards(
    s3_set, downloads, home, tmp_path, monkeypatch, capsys
):
    """A disk that keeps no times, which is noted too."""
    folder, uri, manifest = s3_set
    monkeypatch.setattr(command, "_noted", set())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock = fcntl.flock

    def refused(file, how):
        handle = file if isinstance(file, int) else file.fileno()
        if Path(f"/proc/self/fd/{handle}").resolve().is_relative_to(home):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        lock(file, how)

    def not_kept(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(os, "utime", not_kept)
    for _ in range(2):
        with open_loader(uri) as loader:
            assert_equal_to_tars(folder, loader, "train", [14, 0, 5])
    assert len(downloads) == 3, "they are kept"
    own = tmp_path / f"alexnet-cache-{os.getuid()}"
    assert len([*own.glob("*.tar")]) == 3 and stat.S_IMODE(own.stat().st_mode) == 0o700
    assert cached(home, manifest) == {}
    locks, times = capsys.readouterr().err.splitlines()
    assert locks.startswith(f"note: {home}/cache refuses file locks (") and str(own) in locks
    assert times.startswith(f"note: {own} refuses utime")


def test_a_folder_of_another_user_is_no_place_for_shards(s3_set, home, tmp_path, monkeypatch):
    _, uri, _ = s3_set
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(storage, "offers", lambda *_: False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"alexnet-cache-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with open_loader(uri) as loader, pytest.raises(UserError, match="belongs to another user"):
        loader.read(np.array([0]))
    assert not [*(tmp_path / "theirs").iterdir()]


def test_s3_shard_with_another_sha256_is_fetched_twice_and_then_named(s3_set, home, downloads):
    folder, uri, manifest = s3_set
    data = bytearray((folder / "train-000001.tar").read_bytes())
    data[-1] ^= 1  # same length
    storage.write(f"{uri}/train-000001.tar", bytes(data))
    with open_loader(uri) as loader:
        loader.read(np.array([0]))
        with pytest.raises(UserError) as told:
            loader.read(np.array([5]))
    for known in (hashlib.sha256(data).hexdigest(), info_of(manifest, "train-000001").sha256, uri):
        assert known in str(told.value)
    assert "verify --repair" in str(told.value) and "\n" not in str(told.value)
    assert downloads.count("train-000001.tar") == 2
    assert set(cached(home, manifest)) == {"train-000000"}
    assert not list((home / "cache").glob("*.partial"))


def slow_down(_: bytes) -> bytes:
    raise UserError("the store answered SlowDown")


@pytest.mark.parametrize(
    ("fault", "times", "told"),
    [
        (lambda data: data[:-1] + b"x", 1, "arrived with another sha256"),
        (slow_down, 3, "SlowDown; reading again in"),
    ],
    ids=["damaged on its way", "busy"],
)
def test_read_that_fails_is_repeated_with_longer_and_longer_pauses(
    s3_set, home, monkeypatch, caplog, fault, times, told
):
    folder, uri, manifest = s3_set
    waits = (0.01, 0.02, 0.04, 0.08)
    monkeypatch.setattr("training.shard_cache._WAITS", waits)
    read, asked = storage.read, []

    def faulty(uri: str, *args: int) -> bytes:
        if uri.endswith(".tar"):
            asked.append(time.monotonic())
            if len(asked) <= times:
                return fault(read(uri, *args))
        return read(uri, *args)

    monkeypatch.setattr(storage, "read", faulty)
    with open_loader(uri) as loader:
        assert_equal_to_tars(folder, loader, "train", [0])
    assert set(cached(home, manifest)) == {"train-000000"}
    assert len(asked) == times + 1 and caplog.text.count(told) == times
    if fault is slow_down:
        assert all(b - a > wait for a, b, wait in zip(asked, asked[1:], waits, strict=False))


@pytest.fixture
def away(s3_set, monkeypatch) -> Iterator[Loader]:
    """A loader whose store went away after the manifest was read."""

    def failing(uri: str, *args: int) -> bytes:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    with open_loader(s3_set[1]) as loader:
        monkeypatch.setattr(storage, "read", failing)
        yield loader


def test_store_that_stays_away_ends_with_one_line_and_leaves_nothing_half(away, home, monkeypatch):
    monkeypatch.setattr("training.shard_cache._WAITS", (0.01, 0.01))
    with pytest.raises(UserError, match=r"gave up after 0 s: start the same --name"):
        away.read(np.array([0]))
    assert [path.name for path in (home / "cache").iterdir()] == ["room.lock"]


def test_closing_does_not_wait_for_a_store_that_is_away(away, monkeypatch, caplog):
    monkeypatch.setattr("training.shard_cache._WAITS", (1e6,))
    away._begin(np.array([0]), False, [], [])
    wait_until(lambda: "reading again in 1e+06 s" in caplog.text)
    away.__exit__()
    assert caplog.text.count("reading again") == 1


def test_object_that_vanished_is_told_at_once(s3_set, caplog):
    _, uri, _ = s3_set
    storage.delete(f"{uri}/train-000001.tar")
    told = pytest.raises(UserError, match=r"train-000001.tar: not there any more; run `.*repair")
    with open_loader(uri) as loader, told:
        loader.read(np.array([5]))
    assert "reading again" not in caplog.text


def test_full_disk_is_one_line_and_the_cache_lets_go_of_what_it_can(s3_set, home):
    _, uri, manifest = s3_set
    with open_loader(uri, "val") as loader:
        loader.read(np.array([0]))
    assert set(cached(home, manifest)) == {"val-000000"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_loader(uri) as loader:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a real failure to write
        try:
            with pytest.raises(UserError) as told:
                loader.read(np.array([0]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(told.value) and "ALEXNET_HOME" in str(told.value)
    assert "--cache-gb" in str(told.value) and "\n" not in str(told.value)
    assert [path.name for path in (home / "cache").iterdir()] == ["room.lock"]
