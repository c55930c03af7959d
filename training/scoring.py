"""What a network says of every picture of a split: in this process, or shard by shard on Ray."""

from __future__ import annotations

import copy
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from alexnet.errors import UserError
from alexnet.preprocess import InputSpec
from pipelines import shards, storage
from training.evaluate import Metrics
from training.shard_scores import Job, Scorer, first_of_each

Tell = Callable[[int, int], None]  # pictures done, of how many
EVERY_CPU = sys.maxsize  # as `workers`: as many as the cluster has CPUs
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
        right: NDArray[np.bool_] = self.place == 0
        return right

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
    refuse_empty(data, manifest, split)
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


def refuse_empty(data: str, manifest: shards.Manifest, split: str) -> None:
    """Raises UserError for a split without a picture."""
    if manifest.num_samples(split) == 0:
        raise UserError(f"split {split} of {data} has no pictures; choose another --split")


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
    job = Job(storage.absolute(data), manifest, split, model.input_spec)
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


class _Progress:
    def __init__(self, total: int, tell: Tell | None) -> None:
        self._done, self._total, self._tell = 0, total, tell

    def count(self, pictures: int) -> None:
        self._done += pictures
        if self._tell is not None:
            self._tell(self._done, self._total)


def _here(
    network: torch.nn.Module, job: Job, numbers: Sequence[int], progress: _Progress
) -> Generator[tuple[int, pa.Table]]:
    with Scorer(network, job, os.cpu_count() or 1) as scorer:
        for number in numbers:
            yield number, scorer.shard(number, progress.count)


def _on_ray(
    network: torch.nn.Module,
    job: Job,
    numbers: Sequence[int],
    workers: int,
    shared_fs: bool,
    progress: _Progress,
) -> Generator[tuple[int, pa.Table]]:
    """As `_here`, with a task for each shard and a process of its own for each worker."""
    import ray
    import ray.data

    from pipelines import cluster

    if workers < 1:
        raise UserError(f"{workers} workers cannot score anything; ask for 1 or more")
    with cluster.connected():
        cluster.refuse_local_paths([job.data], shared_fs=shared_fs)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # they count shards; ours count pictures
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        # More processes than CPUs would wait for ever.
        cpus = int(ray.cluster_resources().get("CPU", 1))
        rows = [{"number": number} for number in numbers]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,
            fn_constructor_args=(*_sent(network), ray.put(job)),
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows), cpus)),
        )
        with closing(iter(dataset.iter_rows())) as answers:
            for answer in answers:
                if answer["error"]:
                    raise UserError(answer["error"])
                table = shards.read_parquet(answer["table"])
                progress.count(len(table))
                yield answer["number"], table


def _sent(network: torch.nn.Module) -> tuple[Any, Any]:
    """References to the network without its weights, and to these. As NumPy arrays, all workers of
    a node share the one copy in its object store instead of holding 250 MB each."""
    import ray

    weights = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
    return ray.put(copy.deepcopy(network).to("meta")), ray.put(weights)


class _Worker:
    """An actor: the network and the loader, once for all its shards."""

    def __init__(self, network_ref: Any, weights_ref: Any, job_ref: Any) -> None:
        import ray

        network, weights, job = ray.get([network_ref, weights_ref, job_ref])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        network.load_state_dict(tensors, assign=True)
        self._network, self._job = network, job
        self._scorer: Scorer | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the user can mend goes back as a row: raised here, it would reach them as a page of
        Ray's own traceback."""
        try:
            if self._scorer is None:
                self._scorer = Scorer(self._network, self._job, threads=1)
            table = self._scorer.shard(int(row["number"]))
        except UserError as error:
            return {"number": row["number"], "error": str(error), "table": b""}
        return {"number": row["number"], "error": "", "table": shards.parquet_bytes(table)}


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
