"""Shards to uint8 batches: byte ranges of tars, decoded by threads; or random images of one size.

Knows nothing of order, augmentation or ranks: it is handed the sample ids of each batch. Batches
are begun ahead, in the consumer's own thread, and their parts run in a pool that goes from one
batch to the next without a stop.
"""

import itertools
import math
import shlex
import time
import weakref
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import simplejpeg
import torch

from alexnet.errors import UserError
from pipelines import shards
from training.config import WINDOW_SHARDS
from training.decoded import Decoded
from training.order import Ids
from training.shard_files import OpenShard, ShardFiles, ShardUses

_AHEAD = 3  # batches begun beyond the one that the consumer holds
_SYNTHETIC_IMAGES = 1024  # 158 MB at 227 px: beyond a processor's cache, within every device

Opening = Mapping[str, Future[OpenShard]]


@dataclass(frozen=True)
class Batch:
    """images: uint8 (B,3,H,W) in channels-last memory; labels, sample_ids: int64 (B,). All on the
    CPU, but the images of `Synthetic`."""

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor


Batches = Generator[Batch, None, None]


@dataclass(frozen=True)
class _Begun:
    """A batch on its way: `parts`, runs of `decode`, fill `pixels`, uint8 (B,H,W,3)."""

    ids: Ids
    opening: Opening
    pixels: torch.Tensor
    parts: list[Future[tuple[float, float]]]


class Loader:
    """Reads samples of one split by id. Close it, or use it as a context manager, to end its
    threads. Raises UserError for an index that is not the manifest's.

    cache_gb: how much of the node's own disk shards from S3 may take. decoded: where images are
    kept once they are decoded; it is closed with the loader. window: shards that are opened or
    downloaded before their turn, as many as are mixed with each other.
    """

    def __init__(
        self,
        uri: str,
        manifest: shards.Manifest,
        split: str,
        *,
        threads: int,
        cache_gb: float = 20.0,
        decoded: Decoded | None = None,
        window: int = WINDOW_SHARDS,
    ) -> None:
        self._describe(manifest, split)
        self._samples, self._decoded = Samples(uri, manifest, split, decoded), decoded
        self._window = window
        self._files = ShardFiles(uri, manifest.split_shards(split), int(cache_gb * 1e9))
        self._buffers = Buffers(manifest.crop, idle=_AHEAD + 2)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def _describe(self, manifest: shards.Manifest, split: str) -> None:
        self.shard_sizes = [shard.samples for shard in manifest.split_shards(split)]
        self.num_samples = manifest.num_samples(split)
        self._seconds = {"read": 0.0, "decode": 0.0, "wait": 0.0}

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._pool.shutdown(cancel_futures=True)
        if self._decoded is not None:
            self._decoded.close()

    def timings(self) -> dict[str, float]:
        """Seconds since the start: "read" (with waiting for shards to open or arrive) and "decode",
        each summed over the threads, and "wait", which the consumer spent without a batch."""
        return dict(self._seconds)

    def batches(self, ids_of_batches: Sequence[Ids], *, pin: bool = False) -> Batches:
        """One batch for each array of ids, decoded ahead of the consumer, and the next shards
        opened or downloaded ahead; `pin` for a GPU. Raises what reading raises, after the good
        batches before it: UserError for a shard that is missing, changed or undecodable."""
        uses = self._samples.uses(ids_of_batches, self._window)
        begun = deque[_Begun]()
        try:
            for number, ids in enumerate(ids_of_batches):
                keep, ahead = uses.advance(number)
                keep += [name for batch in begun for name in batch.opening]
                begun.append(self._begin(ids, pin, keep, ahead))
                if len(begun) > _AHEAD:
                    yield self._finish(begun.popleft())
            while begun:
                yield self._finish(begun.popleft())
        finally:
            for batch in begun:
                for part in batch.parts:
                    part.cancel()
            self._files.open([])

    def prefetch(self, ids_of_batches: Sequence[Ids]) -> None:
        """Opens or downloads the first shards of batches to come, as far as there is room."""
        now, ahead = self._samples.uses(ids_of_batches, self._window).advance(0)
        self._files.open([], ahead=[*now, *ahead])

    def read(self, ids: Ids) -> Batch:
        """The samples of `ids` (int64 (B,)) in that order."""
        return self._finish(self._begin(ids, False, [], []))

    def _begin(self, ids: Ids, pin: bool, keep: list[str], ahead: list[str]) -> _Begun:
        """`keep`, `ahead`: the shards to keep and to open ahead, besides those of `ids`."""
        ids = np.ascontiguousarray(ids)
        opening = self._files.open(self._samples.shards_of(ids), keep, ahead)
        pixels = self._buffers.take(len(ids), pin=pin)
        out = pixels.numpy()
        cuts = np.linspace(0, len(ids), self._threads + 1, dtype=int).tolist()
        parts = [
            self._pool.submit(self._samples.decode, ids[a:b], out[a:b], opening)
            for a, b in itertools.pairwise(cuts)
            if b > a
        ]
        return _Begun(ids, opening, pixels, parts)

    def _finish(self, batch: _Begun) -> Batch:
        """Waits for a batch, and makes sure that its shards stayed what they were."""
        start = time.perf_counter()
        spent = [part.result() for part in batch.parts]
        for opening in batch.opening.values():
            opening.result().check()
        self._seconds["wait"] += time.perf_counter() - start
        for read, decode in spent:
            self._seconds["read"] += read
            self._seconds["decode"] += decode
        rows = torch.from_numpy(batch.ids)
        return Batch(batch.pixels.permute(0, 3, 1, 2), self._samples.labels[rows], rows)


class Synthetic(Loader):
    """Random images that stay on the device, as many and of the size and classes that the manifest
    says: the same loop without store, decoding or copying. Image and label of a sample are
    functions of its id. Needs no file of the shard set."""

    def __init__(self, manifest: shards.Manifest, split: str, device: torch.device) -> None:
        self._describe(manifest, split)
        self._device = device
        side, count = manifest.crop, min(_SYNTHETIC_IMAGES, self.num_samples)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
        self._labels = torch.randint(manifest.num_classes, (count,), generator=generator)
        self._pixels = pixels.to(device)

    def __exit__(self, *_: object) -> None:
        del self._pixels, self._labels

    def batches(self, ids_of_batches: Sequence[Ids], *, pin: bool = False) -> Batches:
        for ids in ids_of_batches:
            yield self.read(ids)

    def prefetch(self, ids_of_batches: Sequence[Ids]) -> None:
        """There is nothing to fetch."""

    def read(self, ids: Ids) -> Batch:
        """The samples of `ids` (int64 (B,)), their images on the device."""
        sample_ids = torch.from_numpy(np.ascontiguousarray(ids))
        rows = sample_ids % len(self._pixels)
        labels = self._labels[rows]
        if self._device.type != "cpu":  # from pageable memory the step would wait for the copy
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        return Batch(self._pixels[rows].permute(0, 3, 1, 2), labels, sample_ids)


class Samples:
    """Where each sample's JPEG lies in its shard, and its way from there to pixels. All methods may
    be called from any thread."""

    def __init__(
        self, uri: str, manifest: shards.Manifest, split: str, decoded: Decoded | None = None
    ) -> None:
        """Raises UserError for an index that is not the manifest's."""
        self._uri, self._decoded = uri, decoded
        # The rest, keys and hashes mostly, would be a gigabyte of ImageNet's index.
        index = load_whole_index(uri, manifest, split, ("shard", "offset", "size", "label"))
        self.count = len(index)
        column = index["shard"].combine_chunks().dictionary_encode()
        self._names: list[str] = column.dictionary.to_pylist()
        self._shard = column.indices.to_numpy()
        self._offset = index["offset"].to_numpy()
        self._size = index["size"].to_numpy()
        self.labels = torch.from_numpy(index["label"].to_numpy().astype(np.int64))

    def shards_of(self, ids: Ids) -> list[str]:
        """Names of the shards that they have to be read from."""
        return [self._names[shard] for shard in np.unique(self._shard[ids[self._to_decode(ids)]])]

    def uses(self, ids_of_batches: Sequence[Ids], window: int) -> ShardUses:
        """Which shards these batches have to be read from, and when."""
        ids = np.concatenate([np.zeros(0, np.int64), *ids_of_batches])
        sizes = np.array([len(ids) for ids in ids_of_batches], np.int64)
        batches, places = np.repeat(np.arange(len(sizes)), sizes), self._to_decode(ids)
        return ShardUses(self._shard[ids[places]], batches[places], self._names, window)

    def _to_decode(self, ids: Ids) -> Ids:
        """Places in `ids` of the images that are not decoded yet."""
        if self._decoded is None:
            return np.arange(len(ids))
        return np.flatnonzero(~self._decoded.holds(ids))

    def read(self, ids: Ids, opening: Opening) -> list[memoryview]:
        """The JPEGs of `ids`, from shards that are open or being opened."""
        sizes = self._size[ids].tolist()
        block = memoryview(bytearray(sum(sizes)))
        ends = itertools.accumulate(sizes)
        jpegs = [block[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        places = zip(self._shard[ids].tolist(), self._offset[ids].tolist(), jpegs, strict=True)
        for shard, offset, jpeg in places:
            opening[self._names[shard]].result().read(offset, jpeg)
        return jpegs

    def decode(self, ids: Ids, out: np.ndarray, opening: Opening) -> tuple[float, float]:
        """The samples of `ids` into `out`, uint8 (B,H,W,3); the seconds of reading and decoding."""
        began = time.perf_counter()
        places = np.arange(len(ids)) if self._decoded is None else self._decoded.read(ids, out)
        jpegs = self.read(ids[places], opening)
        was_read = time.perf_counter()
        for place, jpeg in zip(places.tolist(), jpegs, strict=True):
            sample, pixels = int(ids[place]), out[place]
            try:
                decoded = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=pixels)
            except ValueError as error:
                raise self._undecodable(sample, str(error), opening) from error
            if decoded.shape != pixels.shape:
                sizes = f"{decoded.shape[:2]} pixels instead of {pixels.shape[:2]}"
                raise self._undecodable(sample, sizes, opening)
            if self._decoded is not None:
                self._decoded.keep(sample, pixels)
        return was_read - began, time.perf_counter() - was_read

    def _undecodable(self, sample: int, why: str, opening: Opening) -> UserError:
        name = self._names[self._shard[sample]]
        opening[name].result().check()  # raises where the shard was changed meanwhile
        return UserError(
            f"sample {sample} of {name} does not decode ({why}); run "
            f"`python -m pipelines verify {shlex.quote(self._uri)} --full`"
        )


def load_whole_index(
    uri: str, manifest: shards.Manifest, split: str, columns: Sequence[str]
) -> pa.Table:
    """These columns of `shards.INDEX` for every sample of a split. Raises UserError for an index
    that is not the manifest's."""
    index = shards.load_index(uri, split, columns)
    if len(index) != manifest.num_samples(split):
        raise UserError(
            f"index/{split}.parquet of {uri} has {len(index)} rows, its manifest promises "
            f"{manifest.num_samples(split)}; run `python -m pipelines verify {shlex.quote(uri)}`"
        )
    return index


class Buffers:
    """Lends uint8 (B, side, side, 3) tensors, each to be had again when the last tensor or array
    that looks into it is gone: a batch that is kept is never overwritten. `idle` free ones at most
    are kept for the next batches.

    Pinned ones are PyTorch's own to reuse. The host runs several steps ahead of a GPU, so a batch
    that nothing refers to may still be waiting to be copied; only the allocator of pinned memory
    knows of these copies, and gives a block out again after them.
    """

    def __init__(self, side: int, idle: int) -> None:
        self._side = side
        # A deque's ends need no lock: buffers come back in whatever thread drops them.
        self._free: deque[np.ndarray] = deque(maxlen=idle)

    def take(self, count: int, *, pin: bool) -> torch.Tensor:
        """uint8 (count, side, side, 3) with arbitrary content; in pinned memory for `pin`."""
        shape = (count, self._side, self._side, 3)
        if pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        num_bytes = math.prod(shape)
        whole = self._free.popleft() if self._free else None
        if whole is None or len(whole) < num_bytes:
            whole = np.empty(num_bytes, np.uint8)
        lent = whole[:num_bytes].reshape(shape)
        # from_numpy's storage holds `lent` for as long as any tensor shares it.
        weakref.finalize(lent, self._free.append, whole).atexit = False
        return torch.from_numpy(lent)
