"""The shards that a loader has open: verified, found again when they change, opened ahead; and
which of them the batches to come need.

Read with `pread` rather than through a memory map: as fast from the page cache, but other threads
go on while a disk answers, and a file that is cut short is an error instead of a signal that ends
the process.
"""

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import ShardInfo
from training.shard_cache import NodeCache, repair_hint, sha256_of

_IO_THREADS = 4

Stamp = tuple[int, int, int, int]  # inode, bytes, times of the last change of content and status


class OpenShard:
    """An open shard, to be read from any thread; closed when nothing refers to it any more."""

    def __init__(self, path: str, info: ShardInfo, handle: int, stamp: Stamp | None) -> None:
        """stamp: None for the cache's own copy, which nobody else changes."""
        self.path, self.info, self._handle, self._stamp = path, info, handle, stamp
        weakref.finalize(self, os.close, handle)

    def read(self, offset: int, into: memoryview) -> None:
        """Fills `into` with the bytes from `offset`."""
        try:
            count = os.preadv(self._handle, [into], offset)
        except OSError as error:
            raise UserError(_unreadable(self.path, error)) from error
        if count != len(into):
            self.check()
            raise UserError(f"shard {self.path} ends before byte {offset + len(into)}")

    def check(self) -> None:
        """Raises UserError where the file is no longer what it was when it was opened. A new name
        or owner is no harm, so the bytes are what decides."""
        if self._stamp is None or (now := _stamp(self._handle)) == self._stamp:
            return
        self.check_bytes("was changed under the run: it has")
        self._stamp = now

    def check_bytes(self, problem: str = "has") -> None:
        """Raises UserError where they are not the manifest's."""
        size, found = os.fstat(self._handle).st_size, sha256_of(self._handle)
        if found != self.info.sha256:
            raise UserError(
                f"shard {self.path} {problem} {size} bytes with sha256 {found}, its manifest says "
                f"{self.info.num_bytes} with {self.info.sha256}; {repair_hint(self.path)}"
            )


class ShardFiles:
    """Opens the shards of one split: local files as they are, S3 objects through the cache."""

    def __init__(self, uri: str, infos: Iterable[ShardInfo], cache_bytes: int) -> None:
        self._uri, self._infos = uri, {info.name: info for info in infos}
        self._closing = threading.Event()
        remote = storage.is_s3(uri)
        self._cache = NodeCache(cache_bytes, self._closing) if remote else None
        self._room = cache_bytes if remote else sum(i.num_bytes for i in self._infos.values())
        self._verified: dict[str, Stamp] = {}
        self._shards: dict[str, Future[OpenShard]] = {}
        self._lock = threading.Lock()
        self._io = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="shards")

    def close(self) -> None:
        """Ends downloads and waiting; shards in use stay open for those who use them."""
        self._closing.set()
        self._io.shutdown(cancel_futures=True)
        self._shards = {}
        if self._cache is not None:
            self._cache.trim()

    def open(
        self, names: Iterable[str], keep: Iterable[str] = (), ahead: Iterable[str] = ()
    ) -> dict[str, Future[OpenShard]]:
        """The named shards, opened by threads of their own; what fails is raised by the result.

        Those of `keep` stay open where they are, those of `ahead` are begun as far as there is room
        beside the others. All the rest is let go of: whoever still reads it keeps it.
        """
        with self._lock:
            opening = {name: self._opening(name) for name in names}
            wanted = opening | {name: self._shards[name] for name in keep if name in self._shards}
            room = self._room - sum(self._infos[name].num_bytes for name in wanted)
            for name in ahead:
                room -= self._infos[name].num_bytes
                if room < 0:
                    break
                wanted[name] = self._opening(name)
            done_with = self._shards.keys() - wanted.keys()
            self._shards = wanted
            if done_with and self._cache is not None and not self._closing.is_set():
                self._io.submit(self._cache.trim)
            return opening

    def _opening(self, name: str) -> Future[OpenShard]:
        """A shard's opening, begun again if it failed."""
        opening = self._shards.get(name)
        if opening is None or (opening.done() and opening.exception()):
            opening = self._io.submit(self._open, self._infos[name])
        return opening

    def _open(self, info: ShardInfo) -> OpenShard:
        path = storage.join(self._uri, f"{info.name}.tar")
        if self._cache is not None:
            return OpenShard(path, info, self._cache.open(path, info), None)
        try:
            handle = os.open(Path(path), os.O_RDONLY)
            stamp = _stamp(handle)
            shard = OpenShard(path, info, handle, stamp)
            if self._verified.get(info.name) != stamp:  # once for as long as the file stays so
                shard.check_bytes()
                self._verified[info.name] = stamp
        except OSError as error:
            raise UserError(_unreadable(path, error)) from error
        return shard


class ShardUses:
    """From when to when the batches ahead need which shards; goes through them with the batches.

    shards, batches: int64 (N,), each sample's shard, as a place in `names`, and the number of its
    batch, in ascending order. window: shards to tell of ahead.
    """

    def __init__(
        self, shards: NDArray[np.int64], batches: NDArray[np.int64], names: list[str], window: int
    ) -> None:
        used, first = np.unique(shards, return_index=True)
        last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
        rows = zip(batches[first].tolist(), batches[last].tolist(), used.tolist(), strict=True)
        # By first use: numbers of the first and the last batch that need a shard, and its name.
        self._upcoming = deque((begin, end, names[shard]) for begin, end, shard in sorted(rows))
        self._active: list[tuple[int, int, str]] = []
        self._window = window

    def advance(self, batch: int) -> tuple[list[str], list[str]]:
        """The shards that `batch` or an earlier one needs and that are not done with yet, and the
        next window of them. Batches are asked for in ascending order."""
        while self._upcoming and self._upcoming[0][0] <= batch:
            self._active.append(self._upcoming.popleft())
        self._active = [use for use in self._active if use[1] >= batch]
        ahead = [name for _, _, name in itertools.islice(self._upcoming, self._window)]
        return [name for _, _, name in self._active], ahead


def _stamp(handle: int) -> Stamp:
    status = os.fstat(handle)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _unreadable(path: str, error: OSError) -> str:
    return f"shard {path} cannot be read ({error.strerror}); {repair_hint(path)}"
