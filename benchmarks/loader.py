"""Claim: training's loader feeds more pictures than webdataset with Pillow on the same shards."""

import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.pictures import Raw, stored, write_shards
from benchmarks.table import Table, spread
from pipelines.shards import Manifest, load_manifest
from training.loader import Loader
from training.order import epoch_order, global_batch, steps_per_epoch

COLUMNS = ("loader", "img/s", "ratio", "first batch, s")
CROP = 227


def run(
    raw: Raw, samples: int = 6000, batch_size: int = 64, workers: int = 2, rounds: int = 4
) -> Table:
    """One epoch of each loader per round, in alternating order. workers 0 stays in the process."""
    jpegs = stored(raw, CROP)
    with tempfile.TemporaryDirectory() as folder:
        uri = write_shards(
            Path(folder), jpegs, crop=CROP, train=samples, classes=1000, per_shard=500
        )
        measured = _measure(uri, load_manifest(uri), batch_size, workers, rounds)
    plain = [rate for rate, _ in measured["webdataset + Pillow, DataLoader"]]
    rows = []
    for name, figures in measured.items():
        rates = [rate for rate, _ in figures]
        ratios = [mine / theirs for mine, theirs in zip(rates, plain, strict=True)]
        first = spread([seconds for _, seconds in figures], 2)
        rows.append((name, spread(rates), spread(ratios, 2), first))
    setting = (
        f"{samples} stored pictures of {CROP} px (copies of {len(jpegs)}, mean "
        f"{np.mean([len(jpeg) for jpeg in jpegs]) / 1000:.0f} kB; {raw.origin}), page cache warm; "
        f"uint8 batches of {batch_size}, no augmentation; {workers} decoding threads against "
        f"{workers} worker processes; wall time after the first batch; {rounds} rounds. "
        "Ours is shuffled, webdataset is not, which favours it."
    )
    return Table(COLUMNS, tuple(rows), setting)


def _measure(
    uri: str, manifest: Manifest, batch_size: int, workers: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    epochs = {
        "webdataset + Pillow, DataLoader": functools.partial(
            _webdataset, uri, manifest, batch_size, workers
        ),
        "training.loader": functools.partial(_ours, uri, manifest, batch_size, workers),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in epochs}
    for number in range(rounds):
        for name in list(epochs)[:: 1 if number % 2 == 0 else -1]:
            measured[name].append(_timed(epochs[name](number), manifest.num_samples("train")))
    return measured


def _timed(batches: Iterator[Tensor], expected: int) -> tuple[float, float]:
    """Pictures per second after the first batch, and the seconds until it came."""
    start = time.perf_counter()
    first = next(batches)
    arrived = time.perf_counter()
    assert first.dtype == torch.uint8 and first.shape[1:] == (3, CROP, CROP)
    later = sum(len(batch) for batch in batches)
    seconds = time.perf_counter() - arrived
    assert len(first) + later == expected, "a loader lost or repeated pictures"
    return later / seconds, arrived - start


def _ours(
    uri: str, manifest: Manifest, batch_size: int, workers: int, epoch: int
) -> Iterator[Tensor]:
    with Loader(uri, manifest, "train", threads=max(1, workers), cache_gb=1.0) as loader:
        order = epoch_order(loader.shard_sizes, seed=0, epoch=epoch)
        steps = steps_per_epoch(len(order), batch_size)
        for batch in loader.batches(global_batch(order, step, steps) for step in range(steps)):
            yield batch.images


def _webdataset(
    uri: str, manifest: Manifest, batch_size: int, workers: int, epoch: int
) -> Iterator[Tensor]:
    urls = [f"{uri}/{shard.name}.tar" for shard in manifest.split_shards("train")]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb")
    pairs = dataset.to_tuple("jpg", "cls").map_tuple(_planes, int)
    for images, _ in DataLoader(pairs, batch_size=batch_size, num_workers=workers):
        yield images


def _planes(image: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
