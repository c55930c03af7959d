"""What a network says of every picture of a split: in this process, or shard by shard on Ray."""

from __future__ import annotations

import copy
import functools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from alexnet.errors import UserError
from alexnet.preprocess import InputSpec
from pipelines import shards, storage
from training.evaluate import Metrics, Scores, _place, scores
from training.loader import Batches, Loader
from training.order import Ids

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
Tell = Callable[[int, int], None]  # pictures done, of how many
_SCHEDULER_SECONDS = 10
_TOLD_EVERY = 0.2  # seconds


class Model(Protocol):
    """What is scored: float32 (B,3,227,227) -> logits (B, classes), in evaluation mode."""

    @property
    def network(self) -> torch.nn.Module: ...
    @property
    def input_spec(self) -> InputSpec: ...


@dataclass(frozen=True)
class Scored:
    """A whole split in the order of sample ids. labels, predicted, place: int32 (N,), where place
    says how many classes stand before the true one; loss: float64 (N,), nats; probability: float32
    (N,), of `predicted`."""

    keys: tuple[str, ...]
    num_classes: int
    labels: NDArray[np.int32]
    predicted: NDArray[np.int32]
    place: NDArray[np.int32]
    loss: NDArray[np.float64]
    probability: NDArray[np.float32]

    @property
    def correct(self) -> NDArray[np.bool_]:
        return self.place == 0

    @property
    def metrics(self) -> Metrics:
        images = len(self.labels)
        counts = int((self.place < 1).sum()), int((self.place < 5).sum())
        loss = float(self.loss.sum()) / images
        return Metrics(images, counts[0] / images, counts[1] / images, loss, *counts)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """(classes, classes): row label, column predicted."""
        cells = self.labels.astype(np.int64) * self.num_classes + self.predicted
        counted = np.bincount(cells, minlength=self.num_classes**2).astype(np.int64)
        return counted.reshape(self.num_classes, self.num_classes)


def score(
    model: Model,
    data: str,
    manifest: shards.Manifest,
    split: str = "val",
    *,
    workers: int | None = None,
    shared_fs: bool = False,
    tell: Tell | None = None,
) -> Scored:
    """The centre view of every picture of the split, once.

    workers: None scores in this process with all its threads, on the network's device; a number
    does it on Ray, one shard per task, with so many processes of one CPU at most. Batches are cut
    alike either way. shared_fs: every node of a cluster sees a local `data`.
    Raises UserError for shards that are missing, damaged, empty, unlabelled or of more classes than
    the network has.
    """
    tables = dict(score_shards(model, data, manifest, split, None, workers, shared_fs, tell))
    keys = shards.load_index(data, split)["key"].to_pylist()
    rows = pa.concat_tables([tables[number] for number in sorted(tables)])
    assert len(rows) == len(keys) == manifest.num_samples(split), "pictures lost or seen twice"
    likeliest = first_of_each(rows["likeliest"]), first_of_each(rows["probabilities"])
    return Scored(
        keys=tuple(keys),
        num_classes=manifest.num_classes,
        labels=rows["label"].to_numpy(),
        predicted=likeliest[0],
        place=rows["place"].to_numpy(),
        loss=rows["loss"].to_numpy(),
        probability=likeliest[1],
    )


def first_of_each(lists: pa.ChunkedArray) -> NDArray[Any]:
    """(N,): the first value of each list; none is empty."""
    chunks = [chunk.flatten().to_numpy()[_starts(chunk)] for chunk in lists.chunks]
    return np.concatenate(chunks)


def _starts(lists: pa.ListArray) -> NDArray[np.int64]:
    lengths = np.asarray(lists.value_lengths(), dtype=np.int64)
    return np.cumsum(lengths) - lengths


def score_shards(
    model: Model,
    data: str,
    manifest: shards.Manifest,
    split: str,
    numbers: Sequence[int] | None,
    workers: int | None,
    shared_fs: bool = False,
    tell: Tell | None = None,
) -> Generator[tuple[int, pa.Table]]:
    """(number of the shard, its `ROWS`), as they get done; `numbers` None takes all of the split.

    Raises as `score`. Close it to end the work before its end.
    """
    infos = manifest.split_shards(split)
    numbers = range(len(infos)) if numbers is None else numbers
    total = sum(infos[number].samples for number in numbers)
    if total == 0:
        raise UserError(f"split {split} of {data} has no pictures; choose another --split")
    job = _Job(storage.absolute(data), manifest, split, model.input_spec)
    progress = _Progress(total, tell)
    if workers is None:
        found = _here(model.network, job, numbers, progress)
    else:
        found = _on_ray(model.network, job, numbers, workers, shared_fs, progress)
    seen = 0
    with closing(found):
        for number, table in found:
            assert len(table) == infos[number].samples, f"{infos[number].name} is not whole"
            seen += len(table)
            yield number, table
    assert seen == total, f"scored {seen} of {total} pictures"


@dataclass(frozen=True)
class _Job:
    """What a process needs to score shards, besides the network."""

    data: str
    manifest: shards.Manifest
    split: str
    input_spec: InputSpec


class _Progress:
    def __init__(self, total: int, tell: Tell | None) -> None:
        self._done, self._total, self._tell = 0, total, tell

    def count(self, pictures: int) -> None:
        self._done += pictures
        if self._tell is not None:
            self._tell(self._done, self._total)


def _here(
    network: torch.nn.Module, job: _Job, numbers: Sequence[int], progress: _Progress
) -> Generator[tuple[int, pa.Table]]:
    with _Scorer(network, job, os.cpu_count() or 1) as scorer:
        for number in numbers:
            yield number, scorer.shard(number, progress.count)


class _Scorer:
    """A network and the loader of one split."""

    def __init__(self, network: torch.nn.Module, job: _Job, threads: int) -> None:
        self._network, self._job = network, job
        self._device = next(network.parameters()).device
        infos = job.manifest.split_shards(job.split)
        self._ends = np.cumsum([info.samples for info in infos]).tolist()
        self._sizes = [info.samples for info in infos]
        self._loader = Loader(job.data, job.manifest, job.split, threads=threads)

    def __enter__(self) -> _Scorer:
        return self

    def __exit__(self, *details: object) -> None:
        self._loader.__exit__(*details)

    def shard(self, number: int, count: Callable[[int], None] = lambda pictures: None) -> pa.Table:
        """The `ROWS` of a shard; `count` is told how many pictures each batch had."""
        ids = np.arange(self._ends[number] - self._sizes[number], self._ends[number])
        part = cast(Loader, _Part(self._loader, ids))
        batches = []
        if len(ids):
            for batch in scores(self._network, part, self._job.input_spec, device=self._device):
                batches.append(_rows(batch))
                count(len(batches[-1]))
        return pa.concat_tables([ROWS.empty_table(), *batches]).combine_chunks()


@dataclass(frozen=True)
class _Part:
    """Some samples of a loader, as if they were a split."""

    loader: Loader
    ids: Ids

    @property
    def num_samples(self) -> int:
        return len(self.ids)

    def batches(self, parts: Sequence[Ids], *, pin: bool = False) -> Batches:
        return self.loader.batches([self.ids[part] for part in parts], pin=pin)


def _rows(batch: Scores) -> pa.Table:
    # Stable, so that of equals the lower label is first, as in argmax.
    values, classes = batch.log_probabilities.sort(dim=1, descending=True, stable=True)
    own = batch.log_probabilities.gather(1, batch.labels[:, None])[:, 0]
    place = _place(batch).clamp_max(torch.iinfo(torch.int32).max)  # of NaN
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


def _on_ray(
    network: torch.nn.Module,
    job: _Job,
    numbers: Sequence[int],
    workers: int,
    shared_fs: bool,
    progress: _Progress,
) -> Generator[tuple[int, pa.Table]]:
    raise UserError(f"--workers {workers}: leave it out")


def terminal_line(name: str, stream: TextIO | None = None) -> Tell | None:
    """Renews one line with the pictures, their rate and the time left on `stream` (stderr); None
    where that is no terminal."""
    stream = stream or sys.stderr
    if not stream.isatty():
        return None
    began = time.monotonic()
    told = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < _TOLD_EVERY and done < total:
            return
        told = now
        rate = done / max(now - began, 1e-9)
        left = f"{(total - done) / rate:.0f} s left" if done < total else f"{now - began:.0f} s"
        text = f"{name}: {done:,} of {total:,} pictures, {rate:,.0f} a second, {left}"
        stream.write(f"\r\x1b[K{text}" + ("\n" if done == total else ""))
        stream.flush()

    return tell
