"""What a network says of the pictures of one shard, as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from alexnet.preprocess import InputSpec
from pipelines.shards import Manifest
from training.evaluate import Scores, places, scores
from training.loader import Loader

KEPT = 5  # likeliest classes of each picture
# One row per picture, in the order of the shard. place: how many classes stand before the true one,
# of equals the lower label first; loss in nats; the likeliest classes with their probabilities.
ROWS = pa.schema(
    [
        ("label", pa.int32()),
        ("place", pa.int32()),
        ("loss", pa.float64()),
        ("likeliest", pa.list_(pa.int32())),
        ("probabilities", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Job:
    """What a process needs to score shards, besides the network."""

    data: str
    manifest: Manifest
    split: str
    input_spec: InputSpec


class Scorer:
    """A network and the loader of one split."""

    def __init__(self, network: torch.nn.Module, job: Job, threads: int) -> None:
        self._network, self._job = network, job
        self._device = next(network.parameters()).device
        infos = job.manifest.split_shards(job.split)
        self._ends = np.cumsum([info.samples for info in infos]).tolist()
        self._sizes = [info.samples for info in infos]
        self._loader = Loader(job.data, job.manifest, job.split, threads=threads)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *details: object) -> None:
        self._loader.__exit__(*details)

    def shard(self, number: int, count: Callable[[int], None] = lambda pictures: None) -> pa.Table:
        """The `ROWS` of a shard; `count` is told how many pictures each batch had."""
        ids = np.arange(self._ends[number] - self._sizes[number], self._ends[number])
        spec, batches = self._job.input_spec, []
        for batch in scores(self._network, self._loader, spec, device=self._device, sample_ids=ids):
            batches.append(_rows(batch))
            count(len(batches[-1]))
        return pa.concat_tables([ROWS.empty_table(), *batches]).combine_chunks()


def _rows(batch: Scores) -> pa.Table:
    # Stable, so that of equals the lower label is first, as in argmax.
    values, classes = batch.log_probabilities.sort(dim=1, descending=True, stable=True)
    own = batch.log_probabilities.gather(1, batch.labels[:, None])[:, 0]
    place = places(batch).clamp_max(torch.iinfo(torch.int32).max)  # of NaN
    columns = [
        pa.array(batch.labels.int().cpu().numpy()),
        pa.array(place.int().cpu().numpy()),
        pa.array(-own.double().cpu().numpy()),
        _lists(classes[:, :KEPT].int().cpu().numpy()),
        _lists(values[:, :KEPT].exp().cpu().numpy()),
    ]
    return pa.table(columns, schema=ROWS)


def _lists(values: NDArray[Any]) -> pa.ListArray:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, np.ascontiguousarray(values).ravel())


def first_of_each(lists: pa.ChunkedArray) -> NDArray[Any]:
    """(N,): the first value of each list; none is empty."""
    chunks = [chunk.flatten().to_numpy()[_starts(chunk)] for chunk in lists.chunks]
    return np.concatenate(chunks)


def _starts(lists: pa.ListArray) -> NDArray[np.int64]:
    lengths = np.asarray(lists.value_lengths(), dtype=np.int64)
    return np.cumsum(lengths) - lengths
