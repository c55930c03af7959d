"""A store that errs, lies or stays away, and a disk that is full: retried, then told in a line."""

import errno
import hashlib
import resource
import time
from collections.abc import Iterator

import numpy as np
import pytest
from s3_shards import cached, info_of
from shard_sets import assert_equal_to_tars, open_loader
from waiting import wait_until

from alexnet.errors import UserError
from pipelines import storage
from training.loader import Loader

pytestmark = pytest.mark.usefixtures("home")


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


def test_shard_damaged_on_its_way_is_fetched_once_more(s3_set, home, monkeypatch, caplog):
    folder, uri, manifest = s3_set
    read, ways = storage.read, []

    def once_damaged(uri: str, *args: int) -> bytes:
        data = read(uri, *args)
        if uri.endswith(".tar"):
            ways.append(uri)
            return data[:-1] + b"x" if len(ways) == 1 else data
        return data

    monkeypatch.setattr(storage, "read", once_damaged)
    with open_loader(uri) as loader:
        assert_equal_to_tars(folder, loader, "train", [0])
    assert set(cached(home, manifest)) == {"train-000000"}
    assert "arrived with another sha256" in caplog.text


def test_reads_that_fail_are_repeated_with_longer_and_longer_pauses(
    s3_set, home, monkeypatch, caplog
):
    folder, uri, _ = s3_set
    waits = (0.01, 0.02, 0.04, 0.08)
    monkeypatch.setattr("training.shard_cache._WAITS", waits)
    read, times = storage.read, []

    def failing(uri: str, *args: int) -> bytes:
        if uri.endswith(".tar"):
            times.append(time.monotonic())
            if len(times) < 4:
                raise UserError(f"{uri}: the store answered SlowDown")
        return read(uri, *args)

    monkeypatch.setattr(storage, "read", failing)
    with open_loader(uri) as loader:
        assert_equal_to_tars(folder, loader, "train", [0])
    assert len(times) == 4
    assert all(b - a > wait for a, b, wait in zip(times, times[1:], waits, strict=False))
    assert caplog.text.count("SlowDown; reading again in") == 3


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
