"""pipelines/storage.py on a local disk and on an S3 server: the same promises on both."""

import ctypes
import errno
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alexnet.errors import UserError
from pipelines import command, storage


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3')}/{request.node.name}"


def test_what_is_written_is_read_whole_or_by_range(place: str) -> None:
    uri = storage.join(place, "folder", "file.bin")
    storage.write_new(uri, b"0123456789")
    assert storage.read(uri) == b"0123456789"
    assert storage.read(uri, 3) == b"3456789"
    assert storage.read(uri, 3, 4) == b"3456"
    assert storage.read(uri, 8, 40) == b"89"
    assert storage.read(uri, 10, 4) == b""
    assert storage.read(uri, 3, 0) == b""
    assert storage.size(uri) == 10


def test_a_new_name_is_never_given_other_bytes(place: str) -> None:
    uri = storage.join(place, "file")
    storage.write_new(uri, b"first")
    storage.write_new(uri, b"first")  # a retry
    with pytest.raises(UserError, match="already exists with different contents"):
        storage.write_new(uri, b"other")
    assert storage.read(uri) == b"first"
    storage.write(uri, b"other")
    assert storage.read(uri) == b"other"


def test_of_many_writers_of_one_name_one_wins_and_no_other_bytes_appear(place: str) -> None:
    uri = storage.join(place, "file")
    refused: list[UserError] = []

    def write(content: bytes) -> None:
        try:
            storage.write_new(uri, content)
        except UserError as error:
            refused.append(error)

    contents = [bytes([65 + number]) * 5000 for number in range(6)]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read(uri) in contents
    assert len(refused) == 5
    assert storage.list_files(place) == [("file", 5000)]


def test_listing_is_recursive_sorted_and_relative(place: str) -> None:
    for name in ("b/2", "a", "b/1", "b/c/3"):
        storage.write(storage.join(place, *name.split("/")), name.encode())
    assert storage.list_files(place) == [("a", 1), ("b/1", 3), ("b/2", 3), ("b/c/3", 5)]
    assert storage.list_files(storage.join(place, "b")) == [("1", 3), ("2", 3), ("c/3", 5)]
    assert storage.list_files(storage.join(place, "nothing")) == []


def test_deleting_twice_is_deleting_once(place: str) -> None:
    uri = storage.join(place, "file")
    storage.write(uri, b"x")
    assert storage.exists(uri)
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_missing_file_is_told_by_its_name(place: str) -> None:
    uri = storage.join(place, "missing")
    for function in (storage.read, storage.size):
        with pytest.raises(UserError, match=r"missing: not there$"):
            function(uri)


def test_a_failed_write_leaves_no_file_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        storage.write_new(str(tmp_path / "file"), b"data")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_leaves_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".train-000000.tar.x1y2.tmp").write_bytes(b"half")
    assert storage.list_files(str(tmp_path)) == []


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file"):
        storage.write_new(str(tmp_path / "file" / "shard.tar"), b"data")


def test_a_missing_bucket_is_told(s3: str) -> None:
    with pytest.raises(UserError, match=r"no such bucket at http://127"):
        storage.write_new("s3://nowhere/file", b"data")
    with pytest.raises(UserError, match="no such bucket"):
        storage.list_files("s3://nowhere/folder")


def test_an_unreachable_store_is_told_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached"):
        storage.list_files("s3://bucket/folder")


def test_missing_credentials_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        storage.read("s3://bucket/key")


@pytest.mark.parametrize("uri", ["gs://bucket/key", "http://host/file", "s3://", "s3:///key"])
def test_other_places_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match="s3://bucket"):
        storage.absolute(uri)


def test_local_places_become_independent_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("out") == f"{tmp_path}/out"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"


def test_the_newest_finished_set_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path))
    assert storage.newest_shards() is None
    for age, name in enumerate(("new", "old", "unfinished")):
        (tmp_path / "shards" / name).mkdir(parents=True)
        if name != "unfinished":
            manifest = tmp_path / "shards" / name / "manifest.json"
            manifest.write_text("{}")
            os.utime(manifest, (1000 - age, 1000 - age))
    assert storage.newest_shards() == str(tmp_path / "shards" / "new")


# File systems that do not offer everything


@dataclass
class Refusing:
    """A file system that refuses calls with `error`."""

    patch: pytest.MonkeyPatch
    error: int

    def now(self, call: str, applies: Callable[..., bool] = lambda *_: True) -> None:
        """call: of the module os, which Path uses as well."""
        real = getattr(os, call)

        def refused(*args: Any, **keywords: Any) -> Any:
            if applies(*args):
                raise OSError(self.error, os.strerror(self.error))
            return real(*args, **keywords)

        self.patch.setattr(os, call, refused)


def is_folder(handle: int) -> bool:
    return stat.S_ISDIR(os.fstat(handle).st_mode)


# What is refused: the call, and for which arguments.
OPTIONAL = {
    "fsync of folders": ("fsync", is_folder),
    "opening a folder": ("open", lambda path, *_: Path(path).is_dir()),
    "fsync of files": ("fsync", lambda handle: not is_folder(handle)),
    "chmod": ("chmod", lambda *_: True),
    "hard links": ("link", lambda *_: True),
    "deletion": ("unlink", lambda path, *_: str(path).endswith(".tmp")),
}


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("what", OPTIONAL)
def test_what_a_file_system_does_not_offer_is_noted_once_and_done_without(
    what: str,
    error: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "_noted", set())
    Refusing(monkeypatch, error).now(*OPTIONAL[what])
    for name in ("first", "second"):
        test_a_new_name_is_never_given_other_bytes(str(tmp_path / name))
    files = [f"{name}/file" for name in ("first", "second")]
    assert storage.list_files(str(tmp_path)) == [(name, 5) for name in files]
    noted = "fsync of folders" if what == "opening a folder" else what
    line = f"note: {tmp_path / 'first'} refuses {noted} ({os.strerror(error)}); "
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(line)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("what", set(OPTIONAL) - {"deletion"})
def test_a_disk_that_is_full_or_broken_is_not_taken_for_one_that_offers_less(
    what: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Refusing(monkeypatch, error).now(*OPTIONAL[what])
    with pytest.raises(UserError, match=os.strerror(error)):
        storage.write_new(str(tmp_path / "file"), b"data")


@pytest.mark.parametrize("can_tell", [True, False])
def test_of_many_writers_one_wins_also_without_hard_links(
    can_tell: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Refusing(monkeypatch, errno.EPERM).now("link")
    if can_tell:  # by the kernel: renames that replace nothing
        test_of_many_writers_of_one_name_one_wins_and_no_other_bytes_appear(str(tmp_path))
        return
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    sync = os.fsync

    def faster(handle: int) -> None:  # another builder, between the look and the link
        sync(handle)
        (tmp_path / "file").write_bytes(b"theirs")

    monkeypatch.setattr(os, "fsync", faster)
    with pytest.raises(UserError, match="already exists with different contents"):
        storage.write_new(str(tmp_path / "file"), b"ours")
    assert (tmp_path / "file").read_bytes() == b"theirs"


def test_a_file_system_that_tells_no_free_space_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = shutil.disk_usage(tmp_path)._replace(total=0, used=0, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nothing)
    assert storage.free_bytes(str(tmp_path)) is None
    monkeypatch.undo()
    Refusing(monkeypatch, errno.ENOSYS).now("statvfs")
    assert storage.free_bytes(str(tmp_path)) is None


def test_what_another_users_killed_writer_left_stays_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f".{socket.gethostname()}~{2**22 + 1}~train-000000.tar.x1y2.tmp"
    left.write_bytes(b"half")
    with monkeypatch.context() as patch:
        Refusing(patch, errno.EPERM).now("unlink")
        storage.sweep(str(tmp_path))
    assert left.exists()
    storage.sweep(str(tmp_path))
    assert not left.exists()
