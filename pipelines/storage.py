"""Bytes under a name: a local path or `s3://bucket/key`.

Whatever is published is published once and whole: a reader sees all bytes of a name or none, and
a name that exists is never replaced with other bytes behind somebody's back (`write_new`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import itertools
import os
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import psutil

from alexnet.errors import UserError
from pipelines import s3
from pipelines.command import note
from pipelines.s3 import patiently as patiently

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")
_TEMPORARY = ".tmp"
_BUFFER = 1 << 16  # bytes of the least read of a part: the end of most parquet files
# With these a file system, or who mounted it, refuses what it does not offer. A disk that is full,
# broken or write-protected has others.
_NOT_OFFERED = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_NOT_OFFERED |= {errno.EOPNOTSUPP, errno.EPERM}
_POWER = "a power cut could lose the newest files"
_HERE, _NO_REPLACE = -100, 1  # AT_FDCWD and RENAME_NOREPLACE of Linux
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def absolute(uri: str) -> str:
    """The same place, independent of the current folder. Raises UserError for other schemes."""
    if is_s3(uri):
        s3.bucket_and_key(uri)
        return uri.rstrip("/")
    if "://" in uri:
        raise UserError(f"{uri}: only local paths and s3://bucket/key are supported")
    return str(_expanded(uri))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/") or "/", *parts])


def _mendable(
    function: Callable[Concatenate[str, _Rest], _Result],
) -> Callable[Concatenate[str, _Rest], _Result]:
    """Raises UserError for what the user can mend at the URI: missing, forbidden, full, away."""

    @wraps(function)
    def wrapped(uri: str, /, *args: _Rest.args, **keywords: _Rest.kwargs) -> _Result:
        try:
            return function(uri, *args, **keywords)
        except Exception as error:
            line = s3.remedy(uri, error) if is_s3(uri) else _local_remedy(uri, error)
            if line is None:
                raise
            raise UserError(line) from error

    return wrapped


@_mendable
def exists(uri: str) -> bool:
    """True for a file or object; also for a local folder."""
    return s3.head(uri) is not None if is_s3(uri) else Path(uri).exists()


@_mendable
def size(uri: str) -> int:
    """Bytes. Raises UserError when it is not there."""
    if not is_s3(uri):
        return Path(uri).stat().st_size
    if (head := s3.head(uri)) is None:
        raise UserError(f"{uri}: not there")
    return int(head["ContentLength"])


@_mendable
def version(uri: str) -> str:
    """Changes when the bytes do: modification time of a local file, ETag of an object."""
    if is_s3(uri):
        return str((s3.head(uri) or {}).get("ETag"))
    return str(Path(uri).stat().st_mtime_ns)


@_mendable
def age(uri: str) -> float:
    """Seconds since the file or object was written."""
    if is_s3(uri):
        written = (s3.head(uri) or {})["LastModified"].timestamp()
    else:
        written = Path(uri).stat().st_mtime
    return max(time.time() - float(written), 0.0)


@_mendable
def read(uri: str, offset: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `offset` (all that follow when None); fewer only where the file ends."""
    if length == 0:
        return b""
    if is_s3(uri):
        return s3.read(uri, offset, length)
    with Path(uri).open("rb") as file:
        file.seek(offset)
        return file.read(-1 if length is None else length)


class RangeFile(io.RawIOBase):
    """Bytes [start, start + length) of a stored file as a seekable file."""

    def __init__(self, uri: str, start: int, length: int) -> None:
        self._uri, self._start, self._length = uri, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self._length - self._position), 0)
        data = read(self._uri, self._start + self._position, wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_ranges(uri: str, length: int | None = None) -> io.BufferedReader:
    """A stored file of which only parts are wanted; length: its bytes, where they are known. Raises
    UserError when it is not there."""
    return io.BufferedReader(RangeFile(uri, 0, size(uri) if length is None else length), _BUFFER)


def read_each(
    uris: Sequence[str], starts: Sequence[int] | None = None, ahead: int = 16
) -> Iterator[bytes]:
    """Each file from its start, or from the byte given, in order. On S3 with `ahead` reads under
    way or waiting to be taken: thousands of small objects would otherwise cost a round trip
    each."""
    pending = zip(uris, starts or itertools.repeat(0), strict=False)
    if not any(map(is_s3, uris)):
        # In no thread: glibc would not give back what was read in one.
        yield from itertools.starmap(read, pending)
        return
    with ThreadPoolExecutor(ahead) as pool:
        reads = deque(pool.submit(read, *place) for place in itertools.islice(pending, ahead))
        while reads:
            data = reads.popleft().result()
            reads.extend(pool.submit(read, *place) for place in itertools.islice(pending, 1))
            yield data


@_mendable
def list_files(uri: str, *, markers: bool = False) -> list[tuple[str, int]]:
    """(name relative to `uri`, bytes) of every file below it, sorted by name; [] if none.

    markers: with the objects whose names end with "/", by which web consoles keep empty folders.
    """
    found = s3.list_objects(uri) if is_s3(uri) else _list_folder(Path(uri), "")
    return sorted(entry for entry in found if markers or not entry[0].endswith("/"))


@_mendable
def write_new(uri: str, data: bytes, below: str | None = None) -> None:
    """Publish atomically under a name that must be free.

    The same bytes already there are success (a retry, or a second builder). Raises UserError when
    other bytes are there, when the store cannot be written, or when the local folder `below`, a
    parent that must exist already, was taken away.
    """
    published = s3.put(uri, data, new=True) if is_s3(uri) else _link_new(Path(uri), data, below)
    if not published and not _same(uri, data):
        raise UserError(
            f"{uri} already exists with different contents; delete it or choose another output"
        )


@_mendable
def write(uri: str, data: bytes, below: str | None = None) -> None:
    """Publish atomically, replacing what was there; `below` as for `write_new`."""
    if is_s3(uri):
        s3.put(uri, data)
        return
    path = Path(uri)
    with _temporary_beside(path, data, below) as temporary:
        temporary.replace(path)
    _sync_folder(path.parent)


@_mendable
def delete(uri: str) -> None:
    """Remove one file or object; nothing happens when it is not there."""
    if is_s3(uri):
        s3.delete(uri)
    else:
        Path(uri).unlink(missing_ok=True)


@_mendable
def sweep(folder: str) -> None:
    """Remove the unfinished files that killed writers of this host left in a local folder."""
    if is_s3(folder):
        return  # an unfinished PUT leaves nothing
    for path in Path(folder).rglob(f".*~*{_TEMPORARY}"):
        host, _, rest = path.name[1:].partition("~")
        pid = rest.partition("~")[0]
        if host == socket.gethostname() and pid.isdecimal() and not is_alive(int(pid)):
            _remove(path)


@_mendable
def free_bytes(uri: str) -> int | None:
    """What the disk of a local path, which need not exist yet, has left; None for S3 and where the
    file system does not tell."""
    if is_s3(uri):
        return None
    path = Path(uri)
    while not path.exists() and path != path.parent:
        path = path.parent
    if not offers(path, "free space", lambda: shutil.disk_usage(path), "it is not checked"):
        return None
    usage = shutil.disk_usage(path)
    return usage.free if usage.total else None  # some mounts of object stores tell of no blocks


def offers(place: Path, what: str, action: Callable[[], object], without: str) -> bool:
    """Whether `action` was done. Where the file system of `place` refuses `what` it is not, which a
    process notes once; without: what that means. Other errors are raised."""
    try:
        action()
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        note(f"{place} refuses {what} ({error.strerror}); {without}", what)
        return False
    return True


def home() -> Path:
    """$ALEXNET_HOME or ~/.alexnet, absolute because Ray's workers change directory."""
    return _expanded(os.environ.get("ALEXNET_HOME") or "~/.alexnet")


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:  # no such user, or none that has a home folder
        raise UserError(
            f"{path}: the home folder is not known; write the whole path, or set ALEXNET_HOME and "
            "HOME to folders that you can write"
        ) from error


def newest_shards(holding: str = "manifest.json") -> str | None:
    """The shard set under home()/shards whose file of this name is newest; None if none has one.
    By default: the newest finished one."""
    found = [
        (path.stat().st_mtime_ns, str(path)) for path in (home() / "shards").glob(f"*/{holding}")
    ]
    return max(found)[1].removesuffix(f"/{holding}") if found else None


# Local files


def _list_folder(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    try:
        listing = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with listing as entries:
        for entry in entries:
            if entry.is_dir():
                if prefix or entry.name != "lost+found":  # of a disk's root, and its owner's
                    yield from _list_folder(folder / entry.name, f"{prefix}{entry.name}/")
            elif entry.name.startswith(".") and entry.name.endswith(_TEMPORARY):
                continue  # what a writer killed with SIGKILL leaves behind
            elif entry.is_file():
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:  # deleted since the listing began
                    continue
                yield prefix + entry.name, size


def is_alive(pid: int) -> bool:
    """Whether a process of this host still runs."""
    return bool(psutil.pid_exists(pid))


@contextlib.contextmanager
def _temporary_beside(path: Path, data: bytes, below: str | None) -> Iterator[Path]:
    """`data` on disk in a hidden file next to `path`, gone afterwards unless it was renamed."""
    _make_folders(path.parent, below)
    writer = f".{socket.gethostname()}~{os.getpid()}~{path.name}."  # for `sweep`
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=writer, suffix=_TEMPORARY)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            offers(path.parent, "fsync of files", partial(os.fsync, file.fileno()), _POWER)
        readable = partial(temporary.chmod, 0o644)  # mkstemp's 0600 would hide a shared shard set
        offers(path.parent, "chmod", readable, "other users may be unable to read its files")
        yield temporary
    finally:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    unlink = partial(temporary.unlink, missing_ok=True)
    offers(temporary.parent, "deletion", unlink, f"hidden files that end in {_TEMPORARY} stay")


def _make_folders(folder: Path, below: str | None) -> None:
    """Never `below` itself: an OUT that was taken away would come back, holding a part of it."""
    if below is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    place = Path(below)
    for name in folder.relative_to(place).parts:
        place /= name
        place.mkdir(exist_ok=True)


def _link_new(path: Path, data: bytes, below: str | None) -> bool:
    if path.exists():
        return False
    with _temporary_beside(path, data, below) as temporary:
        try:
            _name_new(temporary, path)
        except FileExistsError:
            return False
    _sync_folder(path.parent)
    return True


def _name_new(temporary: Path, path: Path) -> None:
    """Raises FileExistsError if somebody was faster, which a plain rename would not tell."""
    link = partial(path.hardlink_to, temporary)
    if offers(path.parent, "hard links", link, "let one command at a time write there"):
        return
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_HERE, os.fsencode(temporary), _HERE, os.fsencode(path), _NO_REPLACE) == 0:
            return
        if (code := ctypes.get_errno()) not in _NOT_OFFERED:
            raise OSError(code, os.strerror(code), str(path))
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary.rename(path)


def _sync_folder(folder: Path) -> None:
    def sync() -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)  # makes the new name itself survive a power cut
        finally:
            os.close(handle)

    offers(folder, "fsync of folders", sync, _POWER)


def _same(uri: str, data: bytes) -> bool:
    if is_s3(uri) and (checksum := (s3.head(uri) or {}).get("ChecksumSHA256")):
        return bool(checksum == s3.base64_sha256(data))
    return size(uri) == len(data) and read(uri) == data


def _local_remedy(uri: str, error: Exception) -> str | None:
    if isinstance(error, FileNotFoundError):
        return f"{uri}: not there"
    if not isinstance(error, OSError):
        return None
    remedy = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "; make room there"
    elif error.errno in _REFUSED and Path(uri).is_relative_to(home()):
        remedy = "; set ALEXNET_HOME to a folder that you can write"
    return f"{uri}: {error.strerror or error}{remedy}"
