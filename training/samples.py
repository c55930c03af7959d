"""Where each sample's JPEG lies in its shard, and its way from there to pixels."""

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch

from alexnet.errors import UserError
from pipelines import shards
from training.gpu_jpeg import Decode
from training.order import Ids
from training.shard_files import OpenShard
from training.shard_plan import ShardPlan, uses

Opening = Mapping[str, Future[OpenShard]]


@dataclass(frozen=True)
class Seconds:
    read: float
    decode: float


class Samples:
    """The index of one split. All its methods may be called from any thread."""

    def __init__(self, uri: str, manifest: shards.Manifest, split: str) -> None:
        """Raises UserError for an index that is not the manifest's."""
        self._uri = uri
        # The rest, keys and hashes mostly, would be a gigabyte of ImageNet's index.
        index = shards.load_index(uri, split, ("shard", "offset", "size", "label"))
        self.count = len(index)
        if self.count != manifest.num_samples(split):
            raise UserError(
                f"index/{split}.parquet of {uri} has {self.count} rows, its manifest "
                f"promises {manifest.num_samples(split)}; run "
                f"`python -m pipelines verify {shlex.quote(uri)}`"
            )
        column = index["shard"].combine_chunks().dictionary_encode()
        self._names: list[str] = column.dictionary.to_pylist()
        self._shard = column.indices.to_numpy()
        self._offset = index["offset"].to_numpy()
        self._size = index["size"].to_numpy()
        self.labels = torch.from_numpy(index["label"].to_numpy().astype(np.int64))

    def shards_of(self, ids: Ids) -> list[str]:
        """Names of the shards that hold them."""
        return [self._names[shard] for shard in np.unique(self._shard[ids])]

    def plan(self, ids: Ids, batches: Ids) -> ShardPlan:
        """For the batch numbers of `ids`, both int64 (N,), in ascending order of batches."""
        return ShardPlan(uses(self._shard[ids], batches, self._names))

    def read(self, ids: Ids, opening: Opening) -> tuple[list[memoryview], Seconds]:
        """The JPEGs of `ids`, from shards that are open or being opened."""
        start = time.perf_counter()
        sizes, offsets = self._size[ids].tolist(), self._offset[ids].tolist()
        ends = np.cumsum(sizes).tolist()
        block = memoryview(bytearray(sum(sizes)))
        jpegs = [block[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        files = {shard: opening[self._names[shard]].result() for shard in set(self._shards(ids))}
        for shard, offset, jpeg in zip(self._shards(ids), offsets, jpegs, strict=True):
            files[shard].read(offset, jpeg)
        return jpegs, Seconds(time.perf_counter() - start, 0.0)

    def decode(self, ids: Ids, pictures: Iterable[np.ndarray], opening: Opening) -> Seconds:
        """Each sample of `ids` into the uint8 (H,W,3) array that `pictures` has for it."""
        jpegs, reading = self.read(ids, opening)
        start = time.perf_counter()
        for sample, jpeg, picture in zip(ids, jpegs, pictures, strict=True):
            try:
                decoded = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=picture)
            except ValueError as error:
                raise self._undecodable(sample, str(error), opening) from error
            if decoded.shape != picture.shape:
                sizes = f"{decoded.shape[:2]} pixels instead of {picture.shape[:2]}"
                raise self._undecodable(sample, sizes, opening)
        return Seconds(reading.read, time.perf_counter() - start)

    def decode_together(
        self,
        decode: Decode,
        ids: Ids,
        reads: Sequence[Future[tuple[list[memoryview], Seconds]]],
        opening: Opening,
        side: int,
    ) -> tuple[torch.Tensor, Seconds]:
        """All of `ids`, whose JPEGs `reads` bring in parts, by one call: uint8 (B,H,W,3)."""
        parts = [read.result() for read in reads]
        jpegs = [jpeg for part, _ in parts for jpeg in part]
        start = time.perf_counter()
        try:
            pixels = decode(jpegs)
            if pixels.shape[1:] != (side, side, 3):
                raise RuntimeError(f"pictures of {tuple(pixels.shape)}")
        except RuntimeError:
            # It does not say which one it was: this names it, or the defect is not the shard's.
            self.decode(ids, np.empty((len(ids), side, side, 3), np.uint8), opening)
            raise
        return pixels, Seconds(sum(s.read for _, s in parts), time.perf_counter() - start)

    def _shards(self, ids: Ids) -> list[int]:
        numbers: list[int] = self._shard[ids].tolist()
        return numbers

    def _undecodable(self, sample: int, why: str, opening: Opening) -> UserError:
        name = self._names[self._shard[sample]]
        opening[name].result().check()  # raises where the shard was changed meanwhile
        return UserError(
            f"sample {sample} of {name} does not decode ({why}); run "
            f"`python -m pipelines verify {shlex.quote(self._uri)} --full`"
        )
