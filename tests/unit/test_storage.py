"""pipelines/storage.py on a local disk, and on file systems that do not offer everything.

And s3.py: how long a store is waited for, with a clock that nobody waits for.
"""

import ctypes
import errno
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore import exceptions as boto
from promises import check_that_new_names_keep_their_bytes, check_that_one_writer_wins

from alexnet.errors import UserError
from pipelines import command, s3, storage


@pytest.mark.parametrize("write", [storage.write_new, storage.write])
def test_the_bytes_are_on_disk_before_their_name_is(write, tmp_path, monkeypatch):
    synced: list[tuple[bool, bool, bytes]] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        folder = os.path.sameopenfile(handle, here)
        content = b"" if folder else Path(f"/proc/self/fd/{handle}").read_bytes()
        synced.append((folder, (tmp_path / "file").exists(), content))
        sync(handle)

    here = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(os, "fsync", noted)
    write(str(tmp_path / "file"), b"data")
    os.close(here)
    assert synced == [(False, False, b"data"), (True, True, b"")]


@pytest.mark.parametrize("write", [storage.write_new, storage.write])
def test_folders_are_made_below_the_place_that_was_named_and_never_that_place(write, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not there"):
        write(str(out / "deep" / "er" / "file"), b"data", below=str(out))
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    write(str(out / "deep" / "er" / "file"), b"data", below=str(out))
    assert storage.list_files(str(out)) == [("deep/er/file", 4)]


def test_a_part_of_a_file_reads_as_a_file_that_ends_where_the_part_does(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    part = storage.RangeFile(str(tmp_path / "file"), 10, 20)
    assert part.read() == bytes(range(10, 30)) and part.read(5) == b""
    for start, whence, length in ((0, 0, 3), (-4, 2, 99), (18, 0, 4), (25, 0, 1), (-20, 2, 20)):
        at = part.seek(start, whence)
        assert part.read(length) == bytes(range(100))[10:30][at : at + length]


def test_files_that_are_deleted_during_a_listing_are_left_out_of_it(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(b"data")
    listing = storage._list_folder(tmp_path, "")
    first, size = next(listing)
    for name in {*"abc"} - {first}:
        (tmp_path / name).unlink()
    assert size == 4 and list(listing) == []


def test_an_unreachable_store_is_told_with_its_address(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached"):
        storage.list_files("s3://bucket/folder")


def test_missing_credentials_are_told(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        storage.read("s3://bucket/key")


def test_local_places_become_independent_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("out") == f"{tmp_path}/out"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    for uri in ("gs://bucket/key", "http://host/file", "s3://", "s3:///key"):
        with pytest.raises(UserError, match="s3://bucket"):
            storage.absolute(uri)


def test_the_newest_finished_set_is_found(home):
    assert storage.newest_shards() is None
    for age, name in enumerate(("new", "old")):
        (home / "shards" / name).mkdir(parents=True)
        manifest = home / "shards" / name / "manifest.json"
        manifest.write_text("{}")
        os.utime(manifest, (1000 - age, 1000 - age))
    (home / "shards" / "unfinished").mkdir()
    assert storage.newest_shards() == str(home / "shards" / "new")


# File systems that do not offer everything


def refuse(
    patch: pytest.MonkeyPatch,
    error: int,
    call: str,
    applies: Callable[..., bool] = lambda *_, **__: True,
) -> None:
    """A file system that refuses a call of the module os, which Path uses as well."""
    real = getattr(os, call)

    def refused(*args: Any, **keywords: Any) -> Any:
        if applies(*args):
            raise OSError(error, os.strerror(error))
        return real(*args, **keywords)

    patch.setattr(os, call, refused)


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
def test_what_is_not_offered_is_noted_once_and_done_without(
    what, error, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "_noted", set())
    refuse(monkeypatch, error, *OPTIONAL[what])
    for name in ("first", "second"):
        check_that_new_names_keep_their_bytes(str(tmp_path / name))
    files = [f"{name}/file" for name in ("first", "second")]
    assert storage.list_files(str(tmp_path)) == [(name, 5) for name in files]
    noted = "fsync of folders" if what == "opening a folder" else what
    line = f"note: {tmp_path / 'first'} refuses {noted} ({os.strerror(error)}); "
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(line)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("what", [what for what in OPTIONAL if what != "deletion"])
def test_a_disk_that_is_full_or_broken_is_an_error(what, error, tmp_path, monkeypatch):
    refuse(monkeypatch, error, *OPTIONAL[what])
    with pytest.raises(UserError, match=os.strerror(error)):
        storage.write_new(str(tmp_path / "file"), b"data")
    assert list(tmp_path.iterdir()) == [] or what in ("fsync of folders", "opening a folder")


@pytest.mark.parametrize("can_tell", [True, False])
def test_of_many_writers_one_wins_also_without_hard_links(can_tell, tmp_path, monkeypatch):
    refuse(monkeypatch, errno.EPERM, "link")
    if can_tell:  # by the kernel: renames that replace nothing
        check_that_one_writer_wins(str(tmp_path))
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


def test_a_file_system_that_tells_no_free_space_is_taken_as_it_is(tmp_path, monkeypatch):
    nothing = shutil.disk_usage(tmp_path)._replace(total=0, used=0, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nothing)
    assert storage.free_bytes(str(tmp_path)) is None
    monkeypatch.undo()
    refuse(monkeypatch, errno.ENOSYS, "statvfs")
    assert storage.free_bytes(str(tmp_path)) is None


def test_what_another_users_killed_writer_left_stays_and_ends_nothing(tmp_path, monkeypatch):
    left = tmp_path / f".{socket.gethostname()}~{2**22 + 1}~train-000000.tar.x1y2.tmp"
    left.write_bytes(b"half")
    with monkeypatch.context() as patch:
        refuse(patch, errno.EPERM, "unlink")
        storage.sweep(str(tmp_path))
    assert left.exists() and storage.list_files(str(tmp_path)) == []
    storage.sweep(str(tmp_path))
    assert not left.exists()


# How long a store is waited for

GONE = boto.EndpointConnectionError(endpoint_url="http://store")
CUT = boto.IncompleteReadError(actual_bytes=1, expected_bytes=2)


def answer(status: int, code: str) -> boto.ClientError:
    metadata = {"HTTPStatusCode": status}
    return boto.ClientError({"Error": {"Code": code}, "ResponseMetadata": metadata}, "GetObject")


BUSY, FORBIDDEN = answer(503, "SlowDown"), answer(403, "AccessDenied")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited, in seconds."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        assert len(waited) < 1000, "it is waited for ever"
        waited.append(seconds)

    clock = SimpleNamespace(monotonic=lambda: sum(waited), sleep=sleep)
    monkeypatch.setattr(s3, "time", clock)
    return waited


class Store(s3._Store):
    """Whose requests end in these errors one after the other, the last one for ever, and then, for
    None, in an answer."""

    def __init__(self) -> None:
        super().__init__(None, {frozenset(): None})
        self.asked = 0

    def answers(self, *ends: Exception | None) -> int:
        """How often it was asked. Raises the last error."""
        before = self.asked

        def request(_: object) -> str:
            self.asked += 1
            error = ends[min(self.asked - before, len(ends)) - 1]
            if error is not None:
                raise error
            return "answer"

        try:
            assert self.ask(request) == "answer"
        finally:
            self.last = self.asked - before
        return self.last


@pytest.mark.parametrize("error", [GONE, BUSY])
def test_a_store_that_has_answered_is_waited_for_as_long_as_a_restart_takes(error, pauses):
    store = Store()
    for _ in range(2):  # one that never answered is not waited for
        with pytest.raises(type(error)):
            store.answers(error)
        assert (store.last, pauses) == (1, [])
    assert store.answers(None) == 1
    assert store.answers(*[error] * 9, None) == 10
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3, 3, 3, 3])
    pauses.clear()
    with pytest.raises(type(error)):
        store.answers(error)
    assert s3._PATIENCE - 3 <= sum(pauses) < s3._PATIENCE


def test_a_refusal_is_told_at_once_and_shows_that_there_is_a_store(pauses):
    store = Store()
    with pytest.raises(boto.ClientError):
        store.answers(FORBIDDEN)
    assert (store.last, pauses) == (1, [])
    assert store.answers(GONE, None) == 2
    assert pauses == [0.1]


def test_what_arrives_damaged_is_asked_for_again_a_few_times(pauses):
    store = Store()
    assert store.answers(CUT, CUT, None) == 3
    with pytest.raises(boto.IncompleteReadError):
        store.answers(CUT)
    assert store.last == s3._TRIES
