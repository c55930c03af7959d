"""Shards to uint8 batches: byte ranges of memory-mapped tars, decoded by threads.

Knows the index and the shard files; knows nothing of order, augmentation or ranks: it is handed
the sample ids of each batch. S3 shards pass through a bounded cache that the node's workers share.
"""

import contextlib
import hashlib
import itertools
import mmap
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import filelock
import numpy as np
import simplejpeg
import torch

from alexnet.errors import UserError
from pipelines import shards, storage
from training.order import Ids

_PREFETCH_BATCHES = 3
_OPEN_SHARDS = 32
_TRIES = 5


@dataclass(frozen=True)
class Batch:
    """images: uint8 (B,3,H,W) in channels-last memory; labels, sample_ids: int64 (B,)."""

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor


Batches = Generator[Batch, None, None]


class Loader:
    """Reads samples of one split by id. Close it, or use it as a context manager, to end its
    threads."""

    def __init__(
        self, uri: str, manifest: shards.Manifest, split: str, *, threads: int, cache_gb: float
    ) -> None:
        index = shards.load_index(uri, split)
        self.shard_sizes = [shard.samples for shard in manifest.split_shards(split)]
        self.num_samples = len(index)
        if self.num_samples != manifest.num_samples(split):
            raise UserError(
                f"index/{split}.parquet of {uri} has {self.num_samples} rows, its manifest "
                f"promises {manifest.num_samples(split)}; run: python -m pipelines verify {uri}"
            )
        self._side = manifest.crop
        self._shard = index["shard"].combine_chunks().dictionary_encode()
        self._shard_names: list[str] = self._shard.dictionary.to_pylist()
        self._shard_of = self._shard.indices.to_numpy()
        self._offset = index["offset"].to_numpy()
        self._size = index["size"].to_numpy()
        self._labels = torch.from_numpy(index["label"].to_numpy().astype(np.int64))
        self._files = _ShardFiles(uri, manifest, split, cache_gb)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batches(self, ids_of_batches: Iterable[Ids], *, pin: bool = False) -> Batches:
        """One batch for each array of ids, decoded ahead of the consumer; `pin` for a GPU.

        Close the generator when leaving it early: that ends the thread that reads ahead.
        Raises what reading raises: UserError for a shard that is missing, changed or undecodable.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(_PREFETCH_BATCHES)
        stop = threading.Event()

        def offer(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    return ready.put(item, timeout=0.1)

        def produce() -> None:
            try:
                for ids in ids_of_batches:
                    if stop.is_set():
                        return
                    offer(self.read(ids, pin=pin))
                offer(None)
            except BaseException as error:  # handed to the consumer, which raises it
                offer(error)

        producer = threading.Thread(target=produce, name="read-ahead", daemon=True)
        producer.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            producer.join()

    def read(self, ids: Ids, *, pin: bool = False) -> Batch:
        """The samples of `ids` (int64 (B,)) in that order."""
        pixels = torch.empty(
            (len(ids), self._side, self._side, 3), dtype=torch.uint8, pin_memory=pin
        )
        self._files.fetch(
            {self._shard_names[s] for s in np.unique(self._shard_of[ids])}, self._pool
        )
        out = pixels.numpy()
        cuts = np.linspace(0, len(ids), self._threads + 1, dtype=int)
        parts = [
            self._pool.submit(self._decode_range, ids, out, a, b)
            for a, b in itertools.pairwise(cuts)
            if b > a
        ]
        for part in parts:
            part.result()
        rows = torch.from_numpy(np.ascontiguousarray(ids))
        return Batch(pixels.permute(0, 3, 1, 2), self._labels[rows], rows)

    def _decode_range(self, ids: Ids, out: np.ndarray, first: int, last: int) -> None:
        for position in range(first, last):
            row = ids[position]
            name = self._shard_names[self._shard_of[row]]
            start = int(self._offset[row])
            jpeg = self._files.open(name)[start : start + int(self._size[row])]
            try:
                simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=out[position])
            except ValueError as error:
                raise UserError(
                    f"sample {row} of {name} does not decode ({error}); "
                    "run: python -m pipelines verify --full on these shards"
                ) from error


class _ShardFiles:
    """Memory maps of the shards in use: local files as they are, S3 objects through the cache."""

    def __init__(self, uri: str, manifest: shards.Manifest, split: str, cache_gb: float) -> None:
        self._uri = uri
        self._infos = {shard.name: shard for shard in manifest.split_shards(split)}
        self._remote = storage.is_s3(uri)
        self._cache = storage.home() / "cache" / manifest.digest[:16]
        self._cache_bytes = int(cache_gb * 1e9)
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, name: str) -> mmap.mmap:
        with self._lock:
            if name not in self._maps:
                self._maps[name] = self._map(name)
                if len(self._maps) > _OPEN_SHARDS:
                    self._maps.popitem(last=False)  # freed once no thread reads from it
            self._maps.move_to_end(name)
            return self._maps[name]

    def fetch(self, names: set[str], pool: ThreadPoolExecutor) -> None:
        """Brings the shards that a batch needs into the cache, several at a time."""
        if self._remote:
            for _ in pool.map(self._download, sorted(names - self._maps.keys())):
                pass

    def _map(self, name: str) -> mmap.mmap:
        path = Path(storage.join(self._uri, f"{name}.tar"))
        try:
            with self._open_cached(name) if self._remote else path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(
                f"shard {path} cannot be read ({error}); run: python -m pipelines build again"
            ) from error
        if len(mapped) != self._infos[name].num_bytes:
            raise UserError(
                f"shard {path} has {len(mapped)} bytes, its manifest says "
                f"{self._infos[name].num_bytes}; run: python -m pipelines verify {self._uri}"
            )
        return mapped

    def _open_cached(self, name: str) -> BinaryIO:
        for _ in range(_TRIES):
            self._download(name)
            # A neighbour that needs room may evict it again before it is open.
            with contextlib.suppress(FileNotFoundError):
                return (self._cache / f"{name}.tar").open("rb")
        raise UserError(
            f"--cache-gb {self._cache_bytes / 1e9:g} cannot hold the shards in use at once on this "
            "node; pass more"
        )

    def _download(self, name: str) -> None:
        """Fetches a shard once per node: the lock makes its neighbours wait instead of fetching."""
        path = self._cache / f"{name}.tar"
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return
        self._cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            if path.exists():
                return
            data = storage.read(storage.join(self._uri, f"{name}.tar"))
            if hashlib.sha256(data).hexdigest() != self._infos[name].sha256:
                raise UserError(
                    f"{storage.join(self._uri, name)}.tar is not what its manifest describes "
                    f"(sha256 differs); run: python -m pipelines verify {self._uri}"
                )
            # One at a time: shards that arrive together would each find the same room free.
            with filelock.FileLock(self._cache.parent / "room.lock"):
                self._make_room(len(data))
                partial = path.with_suffix(".partial")
                partial.write_bytes(data)
                partial.rename(path)

    def _make_room(self, num_bytes: int) -> None:
        cached = sorted(self._cache.parent.glob("*/*.tar"), key=_last_used)
        used = sum(path.stat().st_size for path in cached if path.exists())
        for path in cached:
            if used + num_bytes <= self._cache_bytes:
                return
            used -= path.stat().st_size if path.exists() else 0
            path.unlink(missing_ok=True)  # readers that map it keep their pages


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a neighbour evicted it meanwhile
        return 0.0
