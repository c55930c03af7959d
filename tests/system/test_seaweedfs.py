"""pipelines/storage.py on SeaweedFS, which checks signatures and checksums, as on a disk."""

import base64
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pytest
from drawn import ROOT
from promises import check_that_new_names_keep_their_bytes, check_that_one_writer_wins

from alexnet.errors import UserError
from pipelines import s3, storage

if TYPE_CHECKING:
    from seaweed import Seaweed


MIB = 2**20


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """Clients are kept by endpoint and key; a test that changes only the secret needs new ones."""
    s3._store_for.cache_clear()
    yield
    s3._store_for.cache_clear()


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture(params=["disk", "seaweed"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('seaweed_bucket')}/set"


def test_any_range_is_read_also_one_that_starts_or_ends_beyond_the_end(place: str) -> None:
    data = noise(9 * MIB + 17)  # of several chunks of the server
    uri = storage.join(place, "folder", "file.bin")
    storage.write_new(uri, data)
    assert storage.exists(uri) and storage.size(uri) == len(data)
    end = len(data)
    for offset in (0, 5, 4 * MIB - 3, end - 4, end, end + 9):
        for length in (None, 0, 1, 10, 6 * MIB):
            stop = None if length is None else offset + length
            assert storage.read(uri, offset, length) == data[offset:stop], (offset, length)


def test_a_new_name_is_never_given_other_bytes(place: str) -> None:
    check_that_new_names_keep_their_bytes(place)


def test_of_many_writers_of_one_name_one_wins_and_no_other_bytes_appear(place: str) -> None:
    check_that_one_writer_wins(place)


def test_listing_is_recursive_sorted_and_relative(place: str) -> None:
    for name in ("b/2", "a", "b/1", "b/c/3"):
        storage.write(storage.join(place, *name.split("/")), name.encode())
    assert storage.list_files(place) == [("a", 1), ("b/1", 3), ("b/2", 3), ("b/c/3", 5)]
    assert storage.list_files(storage.join(place, "b")) == [("1", 3), ("2", 3), ("c/3", 5)]
    assert storage.list_files(storage.join(place, "nothing")) == []


def test_what_is_not_there_is_told_by_its_name_and_deleting_it_is_no_news(place: str) -> None:
    uri = storage.join(place, "missing")
    storage.write(uri, b"x")
    for _ in range(2):
        storage.delete(uri)
        assert not storage.exists(uri)
    for function in (storage.read, storage.size):
        with pytest.raises(UserError, match=r"missing: not there$"):
            function(uri)


def test_an_object_is_stored_with_the_sha256_of_its_bytes(
    seaweed: "Seaweed", seaweed_bucket: str
) -> None:
    data, expected = noise(300_000), hashlib.sha256(noise(300_000)).digest()
    for name, write in (("new", storage.write_new), ("replaced", storage.write)):
        uri = f"{seaweed_bucket}/{name}"
        write(uri, data)
        bucket, key = s3.bucket_and_key(uri)
        head = seaweed.client().head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        assert base64.b64decode(head["ChecksumSHA256"]) == expected


def test_bytes_that_differ_from_their_announced_checksum_are_not_stored(
    seaweed_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{seaweed_bucket}/damaged-on-its-way"
    wrong = base64.b64encode(hashlib.sha256(b"what was meant").digest()).decode()
    monkeypatch.setattr(s3, "base64_sha256", lambda data: wrong)
    with pytest.raises(UserError) as refused:
        storage.write_new(uri, b"what arrived")
    assert "\n" not in str(refused.value)
    assert not storage.exists(uri)


def test_a_listing_of_more_than_a_page_is_whole_sorted_and_of_its_prefix_alone(
    seaweed: "Seaweed", seaweed_bucket: str
) -> None:
    names = [f"{number % 7}/{number:04d}" for number in range(1010)]
    with ThreadPoolExecutor(8) as pool:
        uris = [f"{seaweed_bucket}/many/{name}" for name in names]
        list(pool.map(storage.write, uris, [b"x" * (n % 5) for n in range(len(names))]))
    storage.write(f"{seaweed_bucket}/many-more", b"a neighbour")
    first = seaweed.client().list_objects_v2(Bucket=seaweed_bucket.removeprefix("s3://"))
    assert first["IsTruncated"]
    assert storage.list_files(f"{seaweed_bucket}/many") == sorted(
        (name, number % 5) for number, name in enumerate(names)
    )
    assert storage.list_files(f"{seaweed_bucket}/none") == []


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_one_line_without_the_secret(
    seaweed_bucket: str, wrong: str, monkeypatch: pytest.MonkeyPatch, fresh_clients: None
) -> None:
    uri = f"{seaweed_bucket}/private"
    storage.write_new(uri, b"private")
    monkeypatch.setenv(wrong, "not-what-the-server-knows")
    s3._store_for.cache_clear()
    for action in (
        lambda: storage.read(uri),
        lambda: storage.exists(uri),
        lambda: storage.list_files(seaweed_bucket),
        lambda: storage.write_new(f"{uri}-2", b"more"),
        lambda: storage.delete(uri),
    ):
        with pytest.raises(UserError) as refused:
            action()
        assert seaweed_bucket in str(refused.value)
        assert "\n" not in str(refused.value)
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(refused.value)


def test_a_missing_bucket_is_one_line_and_is_not_made(
    seaweed: "Seaweed", seaweed_bucket: str
) -> None:
    uri = f"{seaweed_bucket}-absent/set/file"
    for action in (
        lambda: storage.read(uri),
        lambda: storage.list_files(uri),
        lambda: storage.write_new(uri, b"x"),
        lambda: storage.write(uri, b"x"),
    ):
        with pytest.raises(UserError, match=r"no such bucket at .*; create it first"):
            action()
    assert not storage.exists(uri)
    buckets = [entry["Name"] for entry in seaweed.client().list_buckets()["Buckets"]]
    assert f"{seaweed_bucket}-absent".removeprefix("s3://") not in buckets


def test_a_writer_killed_amid_its_upload_leaves_nothing_and_the_next_one_succeeds(
    seaweed: "Seaweed", seaweed_bucket: str
) -> None:
    uri, size = f"{seaweed_bucket}/set/train-000000.tar", 16 * MIB
    code = (
        "import sys; from pipelines import storage; "
        "storage.write_new(sys.argv[1], bytes(int(sys.argv[2])))"
    )
    with Bottleneck(urlsplit(seaweed.endpoint).port, passes=size // 2) as road:
        environment = os.environ | seaweed.environment() | {"AWS_ENDPOINT_URL": road.url}
        command = [sys.executable, "-c", code, uri, str(size)]
        with subprocess.Popen(command, cwd=ROOT, env=environment) as writer:
            assert road.reached.wait(60)
            assert writer.poll() is None
            os.kill(writer.pid, signal.SIGKILL)
    bucket, _ = s3.bucket_and_key(uri)
    assert not storage.exists(uri)
    assert storage.list_files(seaweed_bucket) == []
    assert not seaweed.client().list_multipart_uploads(Bucket=bucket).get("Uploads")
    storage.write_new(uri, noise(size))
    assert storage.read(uri) == noise(size)


class Bottleneck:
    """A TCP proxy before the server that lets `passes` bytes of each request pass, and no more."""

    def __init__(self, port: int | None, passes: int) -> None:
        self.reached = threading.Event()
        self._passes = passes
        self._server = ("127.0.0.1", port)
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.url = f"http://127.0.0.1:{self._sockets[0].getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> "Bottleneck":
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            with each, contextlib.suppress(OSError):  # where the other side went first
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        try:
            near, _ = self._sockets[0].accept()
        except OSError:
            return  # closed: the test is over
        far = socket.create_connection(self._server)
        self._sockets += [near, far]
        answers = threading.Thread(target=self._carry, args=(far, near, None))
        self._threads.append(answers)
        answers.start()
        self._carry(near, far, self._passes)

    def _carry(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        passed = 0
        try:
            while data := source.recv(65536):
                target.sendall(data)
                passed += len(data)
                if limit is not None and passed >= limit:
                    self.reached.set()
                    return
        except OSError:
            return  # one side is gone
