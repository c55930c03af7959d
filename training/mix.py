"""How well batches mix the classes, told before a run starts.

Images are shuffled within windows of a few shards. Where the shards are sorted by class, a window
and so each of its batches lacks most of the classes, and the run learns badly without an error.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import Manifest
from training.config import WINDOW_SHARDS, TrainConfig
from training.loader import load_whole_index
from training.order import Ids, steps_per_epoch, windows

logger = logging.getLogger("training")

Labels = NDArray[np.int64]

TOLD, REFUSED = 1.5, 5.0  # mixes, above which a run is told of it, and does not start
_EPOCHS = 3  # whose orders count: with few shards they differ


def label_mix(labels: Labels, shard_sizes: Sequence[int], config: TrainConfig) -> float:
    """Expected chi² of the labels of a batch against their shares in the split, as a multiple of
    what a full shuffle has: 1 is as good as that, sorted shards have more.

    labels: int64 (N,), by sample id; shard_sizes: their sum is N. Exact for the permutations of
    shards that the run's first epochs will have; over those of samples within a window it is a mean
    by the hypergeometric distribution.
    """
    total = len(labels)
    steps = steps_per_epoch(total, config.optim.batch_size)
    classes, ranks, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) == 1 or steps == 1:
        return 1.0
    bounds = np.arange(steps + 1) * total // steps
    sizes = np.diff(bounds)
    fair = (len(classes) - 1) * float((total - sizes).sum()) / (total - 1)
    epochs = min(_EPOCHS, config.optim.epochs)
    found = 0.0
    for epoch in range(epochs):
        order = windows(shard_sizes, seed=config.seed, epoch=epoch, window=config.shuffle_window)
        drawn = (np.bincount(ranks[ids], minlength=len(classes)) for ids in order)
        found += _sum_of_chi2(drawn, bounds, counts / total)
    return found / epochs / fair


def _sum_of_chi2(
    windows_counts: Iterable[NDArray[np.int64]], bounds: Ids, shares: NDArray[np.float64]
) -> float:
    """Expected chi² of all batches together, of which number i takes places bounds[i] to
    bounds[i + 1] of the order. windows_counts: images of each class in a window, window by window.
    shares: of the classes in the split.

    b of the n images of a window have the variance b (n - b) / (n - 1) · q (1 - q) of a class with
    share q in it, and b (q - p) more of it than p promises; a batch adds up its parts.
    """
    total, end = 0.0, 0
    off, spread = np.zeros_like(shares), 0.0  # of the parts of a batch that is not whole yet
    for counts in windows_counts:
        images = int(counts.sum())
        begin, end = end, end + images
        own = counts / images
        excess, variance = own - shares, float((own * (1 - own) / shares).sum())
        first = int(np.searchsorted(bounds, begin, side="right")) - 1
        last = int(np.searchsorted(bounds, end, side="left"))
        cuts = np.clip(bounds[first : last + 1], begin, end)
        parts = np.diff(cuts)
        spreads = parts * (images - parts) / max(1, images - 1) * variance
        batches = np.diff(bounds[first : last + 1])
        inside = parts == batches
        total += float((spreads / batches)[inside].sum())
        total += float(batches[inside].sum() * (excess**2 / shares).sum())
        for number in np.flatnonzero(~inside).tolist():  # the first, the last, or both
            off, spread = off + parts[number] * excess, spread + float(spreads[number])
            if bounds[first + number + 1] <= end:
                total += (spread + float((off**2 / shares).sum())) / float(batches[number])
                off, spread = np.zeros_like(shares), 0.0
    return total


def check_mix(config: TrainConfig, manifest: Manifest, *, begun: bool) -> float | None:
    """`label_mix` of a run's shards, with a line of what would mix better where it is bad; None
    for random images. Reads the index of the train split.

    Raises UserError where it is so bad that a run learns little, unless that is allowed or the run
    has `begun`, and for a window that a node's cache cannot hold.
    """
    if config.synthetic:
        return None
    _refuse_wide(config, manifest)
    uri = str(config.data)
    labels = load_whole_index(uri, manifest, "train", ("label",))["label"].to_numpy()
    sizes = [shard.samples for shard in manifest.split_shards("train")]
    mix = label_mix(labels, sizes, config)
    if mix <= TOLD:
        return mix
    wide = config.shuffle_window
    while label_mix(labels, sizes, replace(config, shuffle_window=wide)) > TOLD:
        wide = min(2 * wide, len(sizes))  # all of them are a full shuffle
    line = (
        f"batches of {config.optim.batch_size} mix the classes badly: chi² of their labels is "
        f"{mix:.1f} times that of a full shuffle, since {uri} is sorted and --shuffle-window is "
        f"{config.shuffle_window} shards; rebuild it with `python -m pipelines build --raw RAW "
        f"--shuffle global`, or pass --shuffle-window {wide} "
        f"({_window_bytes(manifest, wide) / 1e9:.1f} GB of shards at once)"
    )
    if mix > REFUSED and not (config.allow_sorted or begun):
        raise UserError(f"{line}; --allow-sorted True trains on them as they are")
    logger.warning(line)
    return mix


def _refuse_wide(config: TrainConfig, manifest: Manifest) -> None:
    """On S3 a window of shards lies on each node's disk; the default one is taken as it is."""
    needed, room = _window_bytes(manifest, config.shuffle_window), config.cache_gb * 1e9
    if config.shuffle_window <= WINDOW_SHARDS or not storage.is_s3(str(config.data)):
        return
    if needed > room:
        shards = manifest.split_shards("train")
        largest = max(shard.num_bytes for shard in shards)
        raise UserError(
            f"--shuffle-window {config.shuffle_window} holds {needed / 1e9:.1f} GB of shards on "
            f"each node, --cache-gb {config.cache_gb:g} is less; pass --shuffle-window "
            f"{max(WINDOW_SHARDS, int(room // largest))}, or --cache-gb {needed / 1e9:.1f} or more"
        )


def _window_bytes(manifest: Manifest, window: int) -> int:
    """Of the largest shards that may be mixed with each other."""
    sizes = sorted((shard.num_bytes for shard in manifest.split_shards("train")), reverse=True)
    return sum(sizes[:window])


def shown(mix: float) -> str:
    """For the table of the dry run."""
    return f"chi² of a batch's labels is {mix:.2f} times that of a full shuffle"
