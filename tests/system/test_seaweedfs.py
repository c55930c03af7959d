"""pipelines/storage.py on SeaweedFS, which checks signatures and checksums, as on a disk."""

import base64
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from drawn import ROOT
from promises import check_that_new_names_keep_their_bytes, check_that_one_writer_wins

from alexnet.errors import UserError
from pipelines import s3, storage

MIB = 2**20


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """Clients are kept by endpoint and key; a test that changes only the secret needs new ones."""
    s3._store_for.cache_clear()
    yield
    s3._store_for.cache_clear()


def noise(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


@pytest.fixture(params=["disk", "seaweed"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('seaweed_bucket')}/set"


def test_any_range_is_read_also_one_that_starts_or_ends_beyond_the_end(place):
    data = noise(9 * MIB + 17)  # of several chunks of the server
    uri = storage.join(place, "folder", "file.bin")
    storage.write_new(uri, data)
    assert storage.exists(uri) and storage.size(uri) == len(data)
    end = len(data)
    for offset in (0, 5, 4 * MIB - 3, end - 4, end, end + 9):
        for length in (None, 0, 1, 10, 6 * MIB):
            stop = None if length is None else offset + length
            assert storage.read(uri, offset, length) == data[offset:stop], (offset, length)


def test_a_new_name_is_never_given_other_bytes_and_of_many_writers_one_wins(place):
    check_that_new_names_keep_their_bytes(storage.join(place, "one"))
    check_that_one_writer_wins(storage.join(place, "many"))


def test_listing_is_recursive_sorted_and_relative(place):
    for name in ("b/2", "a", "b/1", "b/c/3"):
        storage.write(storage.join(place, *name.split("/")), name.encode())
    assert storage.list_files(place) == [("a", 1), ("b/1", 3), ("b/2", 3), ("b/c/3", 5)]
    assert storage.list_files(storage.join(place, "b")) == [("1", 3), ("2", 3), ("c/3", 5)]
    assert storage.list_files(storage.join(place, "nothing")) == []


def test_what_is_not_there_is_told_by_its_name_and_deleting_it_is_no_news(place):
    uri = storage.join(place, "missing")
    storage.write(uri, b"x")
    for _ in range(2):
        storage.delete(uri)
        assert not storage.exists(uri)
    for function in (storage.read, storage.size):
        with pytest.raises(UserError, match=r"missing: not there$"):
            function(uri)


def test_an_object_is_stored_with_the_sha256_of_its_bytes_or_not_at_all(
    seaweed, seaweed_bucket, monkeypatch
):
    data, expected = noise(300_000), hashlib.sha256(noise(300_000)).digest()
    for name, write in (("new", storage.write_new), ("replaced", storage.write)):
        write(f"{seaweed_bucket}/{name}", data)
        place = {"Bucket": seaweed_bucket.removeprefix("s3://"), "Key": name}
        head = seaweed.client().head_object(**place, ChecksumMode="ENABLED")
        assert base64.b64decode(head["ChecksumSHA256"]) == expected
    wrong = base64.b64encode(hashlib.sha256(b"what was meant").digest()).decode()
    monkeypatch.setattr(s3, "base64_sha256", lambda data: wrong)
    with pytest.raises(UserError) as refused:
        storage.write_new(f"{seaweed_bucket}/damaged", b"what arrived")
    assert "\n" not in str(refused.value)
    assert not storage.exists(f"{seaweed_bucket}/damaged")


def test_a_listing_of_more_than_a_page_is_whole_sorted_and_of_its_prefix_alone(
    seaweed, seaweed_bucket
):
    names = [f"{number % 7}/{number % 3}/{number:04d}" for number in range(1010)]
    names += ["0", "0.jpg", "3/at the side", "3/0.1/x"]
    with ThreadPoolExecutor(8) as pool:
        uris = [f"{seaweed_bucket}/many/{name}" for name in names]
        list(pool.map(storage.write, uris, [b"x"] * len(uris)))
    storage.write(f"{seaweed_bucket}/many-more", b"a neighbour")
    first = seaweed.client().list_objects_v2(Bucket=seaweed_bucket.removeprefix("s3://"))
    assert first["IsTruncated"]
    assert storage.list_files(f"{seaweed_bucket}/many") == [(name, 1) for name in sorted(names)]


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_one_line_without_the_secret(
    seaweed_bucket, wrong, monkeypatch, fresh_clients
):
    uri = f"{seaweed_bucket}/private"
    storage.write_new(uri, b"private")
    monkeypatch.setenv(wrong, "not-what-the-server-knows")
    s3._store_for.cache_clear()
    for action in (storage.read, storage.exists, storage.list_files, storage.delete, write_new):
        with pytest.raises(UserError) as refused:
            action(uri)
        assert seaweed_bucket in str(refused.value) and "\n" not in str(refused.value)
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(refused.value)


def write_new(uri: str) -> None:
    storage.write_new(uri, b"more")


def test_a_missing_bucket_is_one_line_and_is_not_made(seaweed, seaweed_bucket):
    uri = f"{seaweed_bucket}-absent/set/file"
    for action in (storage.read, storage.list_files, write_new):
        with pytest.raises(UserError, match=r"no such bucket at .*; create it first"):
            action(uri)
    assert not storage.exists(uri)
    buckets = [entry["Name"] for entry in seaweed.client().list_buckets()["Buckets"]]
    assert f"{seaweed_bucket}-absent".removeprefix("s3://") not in buckets


UPLOAD = """
import http.client, signal, sys
from pipelines import storage

send, sent = http.client.HTTPConnection.send, []
def half(self, data):
    send(self, data)
    sent.append(len(data))
    if sum(sent) > 8 * 2**20:
        print("half way", flush=True)
        signal.pause()
http.client.HTTPConnection.send = half
storage.write_new(sys.argv[1], bytes(16 * 2**20))
"""


def test_a_writer_killed_amid_its_upload_leaves_nothing_and_the_next_one_succeeds(
    seaweed, seaweed_bucket
):
    uri = f"{seaweed_bucket}/set/train-000000.tar"
    command = [sys.executable, "-c", UPLOAD, uri]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "half way\n"
        writer.kill()
    bucket, _ = s3.bucket_and_key(uri)
    assert not storage.exists(uri)
    assert storage.list_files(seaweed_bucket) == []
    assert not seaweed.client().list_multipart_uploads(Bucket=bucket).get("Uploads")
    storage.write_new(uri, noise(16 * MIB))
    assert storage.read(uri) == noise(16 * MIB)
