"""S3 shards on a node's disk: fetched once for all its workers, verified, and kept within a bound.

home()/cache/SHA256.tar holds a shard under the hash of its bytes, so that no cache, however old,
feeds the bytes of another set. Every claim is a flock, which ends with the process that holds it:

    SHA256.tar      locked shared by whoever has it open, and then not evicted
    SHA256.partial  locked alone by the download that fills it, for which the neighbours wait;
                    without a lock it is what a killed process left, and goes
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import shlex
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import ShardInfo

logger = logging.getLogger("training")

_CHUNK = 16 << 20  # bytes per request: what each download holds in memory
# Seconds between reads of a store that does not answer, a good six minutes in all. One that is
# silent takes minutes to fail a single read: after as long as the pauses add up to, no more follow.
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0, 60.0)
_POLL_SECONDS = 0.05


class NodeCache:
    """The cache under home(), with room for `num_bytes` and for whatever is open beyond that.
    Setting `closing` ends all waiting with CancelledError."""

    def __init__(self, num_bytes: int, closing: threading.Event) -> None:
        self._num_bytes, self._closing = num_bytes, closing
        self._verified: set[tuple[str, int]] = set()  # sha256 and inode

    @functools.cached_property
    def _folder(self) -> Path:
        """home()/cache; on the node's own disk where that one has no locks."""
        folder = storage.home() / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.gettempdir()) / f"alexnet-cache-{os.getuid()}"
        with (folder / "room.lock").open("ab") as room:
            lock = functools.partial(fcntl.flock, room, fcntl.LOCK_EX)
            if storage.offers(folder, "file locks", lock, f"shards are kept in {own}"):
                return folder
        own.mkdir(mode=0o700, exist_ok=True)
        if own.is_symlink() or own.stat().st_uid != os.getuid():  # anybody may write beside it
            raise PermissionError(errno.EPERM, "belongs to another user", str(own))
        return own

    def open(self, uri: str, info: ShardInfo) -> int:
        """A descriptor of the verified copy of the shard at `uri`, cached as long as it is open.

        Raises UserError for an object that is gone or has another hash, a store that stays
        unreachable, and a disk without room.
        """
        place = storage.home() / "cache"
        try:
            place = self._folder
            while not self._closing.is_set():
                handle = self._open_cached(info)
                if handle is None:
                    handle = self._fetch(uri, info)
                if handle is not None:
                    return handle
                # A neighbour was faster, with the download or with the eviction.
        except OSError as error:
            raise UserError(
                f"shard cache {place}: {error.strerror or error} ({info.num_bytes / 1e6:.1f}"
                " MB wanted); free that disk, set ALEXNET_HOME to another one, or pass a smaller "
                "--cache-gb"
            ) from error
        raise CancelledError

    def _open_cached(self, info: ShardInfo) -> int | None:
        path = self._path(info)
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if not _lock_shared(handle):
            return None
        if not self._is_whole(handle, info):
            logger.warning(f"cached shard {path} is damaged; fetching {info.name} again")
            path.unlink(missing_ok=True)
            os.close(handle)
            return None
        touch = functools.partial(os.utime, handle)
        storage.offers(self._folder, "utime", touch, "shards leave the cache in another order")
        return handle

    def _is_whole(self, handle: int, info: ShardInfo) -> bool:
        """Hashed once per process and file: a power cut can leave a full-sized file of zeros."""
        status = os.fstat(handle)
        known = (info.sha256, status.st_ino)
        if known in self._verified:
            return True
        if is_whole := status.st_size == info.num_bytes and sha256_of(handle) == info.sha256:
            self._verified.add(known)
        return is_whole

    def _fetch(self, uri: str, info: ShardInfo) -> int | None:
        """A descriptor of the shard, new in the cache; None where a neighbour fetched it."""
        with self._claimed(info) as handle:
            if handle is None:
                return None
            try:
                self._make_room(info.num_bytes, self._num_bytes, handle)
                self._download(uri, info, handle)
            except OSError as error:  # a full disk: let go of everything that is not open
                logger.warning(f"shard cache {self._folder}: {error.strerror}; making room")
                self._make_room(info.num_bytes, 0, handle)
                self._download(uri, info, handle)
            self._path(info).with_suffix(".partial").rename(self._path(info))
            self._verified.add((info.sha256, os.fstat(handle).st_ino))
            kept = os.dup(handle)  # its lock is that of `handle`, and outlives it
            return kept if _lock_shared(kept) else None

    @contextlib.contextmanager
    def _claimed(self, info: ShardInfo) -> Iterator[int | None]:
        """The locked partial file of a shard, or None where it has been fetched by another. The
        file is gone afterwards, unless it was renamed."""
        partial = self._path(info).with_suffix(".partial")
        handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Once renamed, it is locked for as long as somebody reads it: nothing to wait for.
            while not (locked := lock_alone(handle)) and _is_file(handle, partial):
                if self._closing.wait(_POLL_SECONDS):
                    raise CancelledError
            mine = locked and _is_file(handle, partial)
            try:
                yield handle if mine and not self._path(info).exists() else None
            finally:
                if mine and _is_file(handle, partial):
                    partial.unlink()
        finally:
            os.close(handle)

    def trim(self) -> None:
        """Back within the bound, now that shards beyond it may have been closed."""
        try:
            if (storage.home() / "cache").exists():
                self._make_room(0, self._num_bytes)
        except OSError as error:  # no reason to end a run; the next download tells
            logger.warning(f"shard cache: {error.strerror or error}")

    def _make_room(self, num_bytes: int, bound: int, handle: int | None = None) -> None:
        """Evicts what is not open until `num_bytes` more fit within `bound` bytes, and gives the
        file its full size: one process at a time, since downloads that begin together would each
        find the same room free."""
        with (self._folder / "room.lock").open("wb") as room:
            fcntl.flock(room, fcntl.LOCK_EX)
            if handle is not None:
                os.ftruncate(handle, 0)
            for partial in self._folder.glob("*.partial"):
                _remove_unless_locked(partial)
            entries = [*self._folder.glob("*.partial"), *self._folder.glob("*.tar")]
            there = [(path, status) for path in entries if (status := _status(path))]
            used = sum(status.st_size for _, status in there)
            for path, status in sorted(there, key=lambda entry: entry[1].st_mtime):  # last use
                if used + num_bytes <= bound:
                    break
                if path.suffix == ".tar" and _remove_unless_locked(path):
                    used -= status.st_size
            if handle is not None:
                os.ftruncate(handle, num_bytes)

    def _download(self, uri: str, info: ShardInfo, handle: int) -> None:
        for _ in range(2):
            found, offset = hashlib.sha256(), 0
            with open(handle, "wb", closefd=False) as file:  # writes all that it is given
                file.seek(0)
                while offset < info.num_bytes:
                    data = self._read(uri, offset, min(_CHUNK, info.num_bytes - offset))
                    if not data:
                        break
                    found.update(data)
                    offset += file.write(data)
            if found.hexdigest() == info.sha256:
                return
            logger.warning(f"{uri} arrived with another sha256 than its manifest's")
        raise UserError(
            f"{uri} has sha256 {found.hexdigest()}, its manifest says {info.sha256} (fetched "
            f"twice); {repair_hint(uri)}"
        )

    def _read(self, uri: str, offset: int, length: int) -> bytes:
        """Waits for a store that does not answer, as it did when the manifest was read."""
        began = time.monotonic()
        for seconds in (*_WAITS, None):
            try:
                return storage.read(uri, offset, length)
            except (UserError, OSError) as error:
                if _is_gone(uri):
                    raise UserError(f"{uri}: not there any more; {repair_hint(uri)}") from error
                tried = time.monotonic() - began
                if seconds is None or tried > sum(_WAITS):
                    raise UserError(
                        f"{error}; gave up after {tried:.0f} s: start the same --name again to "
                        "go on at the last checkpoint"
                    ) from error
                logger.warning(f"{error}; reading again in {seconds:g} s")
                if self._closing.wait(seconds):
                    raise CancelledError from error
        raise AssertionError("unreachable")

    def _path(self, info: ShardInfo) -> Path:
        return self._folder / f"{info.sha256}.tar"


def sha256_of(handle: int) -> str:
    """Of all bytes of an open file, which other threads may read meanwhile."""
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(handle, 1 << 20, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


def repair_hint(uri: str) -> str:
    """For the shard at `uri`."""
    return f"run `python -m pipelines verify --repair {shlex.quote(uri.rpartition('/')[0])}`"


def _is_gone(uri: str) -> bool:
    """True where the store answers and has no such object: waiting would not bring it back."""
    try:
        return not storage.exists(uri)
    except (UserError, OSError):
        return False


def _lock_shared(handle: int) -> bool:
    """False, and closed, for a file that was evicted meanwhile."""
    fcntl.flock(handle, fcntl.LOCK_SH)
    if os.fstat(handle).st_nlink:
        return True
    os.close(handle)
    return False


def lock_alone(handle: int) -> bool:
    """Where it is not, a shared lock may be lost."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unless_locked(path: Path) -> bool:
    """True when the file is gone."""
    try:
        handle = os.open(path, os.O_RDWR)  # NFS locks a file alone only for who may write it
    except FileNotFoundError:
        return True
    except PermissionError:  # another user's
        return False
    try:
        if not lock_alone(handle):
            return False
        if _is_file(handle, path):
            path.unlink()
        return True
    finally:
        os.close(handle)


def _is_file(handle: int, path: Path) -> bool:
    """True when the open file is the one that `path` names."""
    status = _status(path)
    return status is not None and status.st_ino == os.fstat(handle).st_ino


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # a neighbour evicted or finished it meanwhile
        return None
