"""Shards to uint8 batches: byte ranges of tars, decoded by threads or on the GPU.

Knows nothing of order, augmentation or ranks: it is handed the sample ids of each batch. Batches
are begun ahead, in the consumer's own thread, and their parts run in a pool that goes from one
batch to the next without a stop.
"""

import itertools
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from alexnet.errors import UserError
from pipelines.shards import Manifest
from training.buffers import Buffers
from training.gpu_jpeg import gpu_decoder
from training.order import Ids
from training.resident import Resident
from training.samples import Opening, Samples, Seconds
from training.shard_files import ShardFiles
from training.shard_plan import ShardPlan

_AHEAD = 3  # batches begun beyond the one that the consumer holds


@dataclass(frozen=True)
class Batch:
    """images: uint8 (B,3,H,W) in channels-last memory, on the device already where pictures stay
    or are decoded there; labels, sample_ids: int64 (B,) on the CPU."""

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor


Batches = Generator[Batch, None, None]


@dataclass(frozen=True)
class _Begun:
    """A batch on its way to uint8 (B,H,W,3) `pixels`: the parts fill it, or `on_gpu` brings it."""

    ids: Ids
    missing: Ids  # those that are not resident yet
    opening: Opening
    pixels: torch.Tensor
    parts: list[Future[Seconds]]
    on_gpu: list[Future[tuple[torch.Tensor, Seconds]]]


class Loader:
    """Reads samples of one split by id. Close it, or use it as a context manager, to end its
    threads.

    cache "ram" or "gpu" keeps every decoded picture, in memory or on `device`; decode "gpu" decodes
    there. Raises UserError for an index that is not the manifest's, for a cache that does not fit,
    and where no decoder works on the device.
    """

    def __init__(
        self,
        uri: str,
        manifest: Manifest,
        split: str,
        *,
        threads: int,
        cache_gb: float = 20.0,
        cache: Literal["none", "ram", "gpu"] = "none",
        decode: Literal["cpu", "gpu"] = "cpu",
        device: torch.device | None = None,
    ) -> None:
        if cache == "ram" and decode == "gpu":
            raise UserError(
                "--cache ram with --decode gpu would copy every picture back; use --cache gpu"
            )
        cpu = torch.device("cpu")
        self._device = device or cpu
        self._side = manifest.crop
        self._samples = Samples(uri, manifest, split)
        self.num_samples = self._samples.count
        infos = manifest.split_shards(split)
        self.shard_sizes = [shard.samples for shard in infos]
        self._gpu_decode = gpu_decoder(self._device) if decode == "gpu" else None
        self._cache = cache
        self._resident: Resident | None = None
        if cache != "none":
            place = cpu if cache == "ram" else self._device
            self._resident = Resident(cache, self.num_samples, self._side, place)
        self._files = ShardFiles(uri, infos, int(cache_gb * 1e9))
        self._buffers = Buffers(self._side, idle=_AHEAD + 2)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._gpu_thread = ThreadPoolExecutor(1, thread_name_prefix="decode-gpu")
        self._seconds = {"read": 0.0, "decode": 0.0, "wait": 0.0}

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._pool.shutdown(cancel_futures=True)
        self._gpu_thread.shutdown(cancel_futures=True)
        self._resident = None  # gives its memory back at once

    def timings(self) -> dict[str, float]:
        """Seconds since the start: "read" (with waiting for shards to open or arrive) and "decode",
        each summed over the threads, and "wait", which the consumer spent without a batch."""
        return dict(self._seconds)

    def batches(self, ids_of_batches: Iterable[Ids], *, pin: bool = False) -> Batches:
        """One batch for each array of ids, decoded ahead of the consumer; `pin` for a GPU.

        A list, other than an iterator, lets it open or download the next shards ahead as well.
        Raises what reading raises, after the good batches before it: UserError for a shard that is
        missing, changed or undecodable.
        """
        plan = self._plan(ids_of_batches)
        begun = deque[_Begun]()
        try:
            for number, ids in enumerate(ids_of_batches):
                begun.append(self._begin(ids, pin, plan.advance(number), begun))
                if len(begun) > _AHEAD:
                    yield self._finish(begun.popleft())
            while begun:
                yield self._finish(begun.popleft())
        finally:
            for batch in begun:
                for part in batch.parts:
                    part.cancel()
                for whole in batch.on_gpu:
                    whole.cancel()
            self._files.open([])

    def prefetch(self, ids_of_batches: Sequence[Ids]) -> None:
        """Opens or downloads the first shards of batches to come, as far as there is room."""
        now, ahead = self._plan(ids_of_batches).advance(0)
        self._files.open([], ahead=[*now, *ahead])

    def read(self, ids: Ids, *, pin: bool = False) -> Batch:
        """The samples of `ids` (int64 (B,)) in that order."""
        return self._finish(self._begin(ids, pin))

    def _missing(self, ids: Ids) -> Ids:
        return ids if self._resident is None else self._resident.missing(ids)

    def _plan(self, ids_of_batches: Iterable[Ids]) -> ShardPlan:
        """The shards of batches that are known beforehand; of an iterator's, nothing is."""
        if not isinstance(ids_of_batches, Sequence) or not ids_of_batches:
            return ShardPlan(deque())
        ids = np.concatenate(ids_of_batches)
        numbers = np.repeat(np.arange(len(ids_of_batches)), [len(ids) for ids in ids_of_batches])
        if self._resident is not None:
            missing = ~self._resident.filled[ids]
            ids, numbers = ids[missing], numbers[missing]
        return self._samples.plan(ids, numbers)

    def _begin(
        self,
        ids: Ids,
        pin: bool,
        planned: tuple[Sequence[str], Sequence[str]] = ((), ()),
        begun: Iterable[_Begun] = (),
    ) -> _Begun:
        """`planned`: the shards to keep and to open ahead, besides those of the batches `begun`."""
        ids = np.ascontiguousarray(ids)
        missing = self._missing(ids)
        keep, ahead = planned
        in_use = {name for batch in begun for name in batch.opening}
        opening = self._files.open(self._samples.shards_of(missing), in_use.union(keep), ahead)
        if self._gpu_decode is not None:
            return self._begin_on_gpu(ids, missing, opening)
        # A resident place on the device needs no more than what is not there yet.
        filled = missing if self._cache == "gpu" else ids
        pixels = self._buffers.take(len(filled), pin=pin)
        out = pixels.numpy()
        work = self._keep_and_copy if self._cache == "ram" else self._samples.decode
        parts = [
            self._pool.submit(work, filled[span], out[span], opening)
            for span in self._spans(len(filled))
        ]
        return _Begun(ids, missing, opening, pixels, parts, [])

    def _begin_on_gpu(self, ids: Ids, missing: Ids, opening: Opening) -> _Begun:
        assert self._gpu_decode is not None
        nothing = torch.empty(
            (0, self._side, self._side, 3), dtype=torch.uint8, device=self._device
        )
        if not len(missing):
            return _Begun(ids, missing, opening, nothing, [], [])
        spans = self._spans(len(missing))
        reads = [self._pool.submit(self._samples.read, missing[span], opening) for span in spans]
        together = self._samples.decode_together
        arguments = (self._gpu_decode, missing, reads, opening, self._side)
        on_gpu = self._gpu_thread.submit(together, *arguments)
        return _Begun(ids, missing, opening, nothing, [], [on_gpu])

    def _spans(self, count: int) -> list[slice]:
        """A share of a batch for each thread."""
        cuts = np.linspace(0, count, self._threads + 1, dtype=int).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(cuts) if b > a]

    def _keep_and_copy(self, ids: Ids, out: np.ndarray, opening: Opening) -> Seconds:
        """Decodes what is not resident to its place there, then copies all of `ids` to `out`."""
        assert self._resident is not None
        kept = self._resident.pixels.numpy()
        missing = self._resident.missing(ids)
        seconds = self._samples.decode(missing, (kept[row] for row in missing), opening)
        np.take(kept, ids, axis=0, out=out, mode="clip")  # "raise" would make one more copy
        return seconds

    def _finish(self, batch: _Begun) -> Batch:
        """Waits for a batch, and makes sure that its shards stayed what they were."""
        start = time.perf_counter()
        spent = [part.result() for part in batch.parts]
        pixels = batch.pixels
        for brought in batch.on_gpu:
            pixels, seconds = brought.result()
            spent.append(seconds)
            if pixels.is_cuda:  # made on a stream of its own, freed when this one is done with it
                pixels.record_stream(torch.cuda.current_stream(self._device))
        for opening in batch.opening.values():
            opening.result().check()
        self._seconds["wait"] += time.perf_counter() - start
        self._seconds["read"] += sum(seconds.read for seconds in spent)
        self._seconds["decode"] += sum(seconds.decode for seconds in spent)
        if self._resident is not None and self._cache == "ram":
            self._resident.filled[batch.missing] = True
        elif self._resident is not None:
            self._resident.put(batch.missing, pixels)
            pixels = self._resident.take(batch.ids)
        rows = torch.from_numpy(batch.ids)
        return Batch(pixels.permute(0, 3, 1, 2), self._samples.labels[rows], rows)
