"""pipelines/storage.py on SeaweedFS: a server on disk, which checks signatures and checksums."""

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
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pytest
from drawn import ROOT

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


def test_the_same_bytes_again_are_fine_and_others_are_refused(seaweed_bucket: str) -> None:
    uri = f"{seaweed_bucket}/set/train-000000.tar"
    storage.write_new(uri, noise(5 * MIB))
    storage.write_new(uri, noise(5 * MIB))  # a retry
    with pytest.raises(UserError, match="already exists with different contents"):
        storage.write_new(uri, noise(5 * MIB, seed=1))
    assert storage.read(uri) == noise(5 * MIB)
    storage.write(uri, b"other")
    assert storage.read(uri) == b"other"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_of_eight_writers_of_one_name_one_wins_and_seven_are_told(seaweed_bucket: str) -> None:
    uri = f"{seaweed_bucket}/contested"
    start = threading.Barrier(8)

    def write(number: int) -> str:
        start.wait()
        try:
            storage.write_new(uri, noise(MIB, seed=number))
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(write, range(8)))
    (winner,) = [number for number, answer in enumerate(answers) if not answer]
    assert storage.read(uri) == noise(MIB, seed=winner)
    for answer in answers[:winner] + answers[winner + 1 :]:
        assert "already exists with different contents" in answer


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


def test_any_range_is_read_also_one_that_starts_or_ends_beyond_the_end(
    seaweed_bucket: str,
) -> None:
    data = noise(9 * MIB + 17)  # of several chunks of the server
    uri = f"{seaweed_bucket}/ranges"
    storage.write_new(uri, data)
    assert storage.size(uri) == len(data)
    for offset, length in (
        (0, None),
        (0, 1),
        (4 * MIB - 3, 10),
        (5, 6 * MIB),
        (len(data) - 4, 4),
        (len(data) - 4, 400),
        (len(data) - 4, None),
        (len(data), 4),
        (len(data), None),
        (len(data) + 9, 4),
        (7, 0),
    ):
        end = None if length is None else offset + length
        assert storage.read(uri, offset, length) == data[offset:end], (offset, length)


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
