"""Random pictures that stay on the device: the same loop without store, decoding or copying."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from pipelines import shards
from training.loader import Batch, Batches, Loader
from training.order import Ids

# Enough that no cache of a processor holds them, few enough for every device: 158 MB at 227 px.
_PICTURES = 1024


class Synthetic(Loader):
    """A loader of one split of the same size, shape and classes; picture and label of a sample are
    functions of its id. Needs no file of the shard set."""

    def __init__(self, manifest: shards.Manifest, split: str, device: torch.device) -> None:
        self.shard_sizes = [shard.samples for shard in manifest.split_shards(split)]
        self.num_samples = manifest.num_samples(split)
        self._device = device
        side, count = manifest.crop, min(_PICTURES, self.num_samples)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(manifest.num_classes, (count,), generator=generator)
        self._pixels, self._labels = pixels.to(device), labels.to(device)

    def __exit__(self, *_: object) -> None:
        del self._pixels, self._labels

    def batches(self, ids_of_batches: Iterable[Ids], *, pin: bool = False) -> Batches:
        for ids in ids_of_batches:
            yield self.read(ids)

    def prefetch(self, ids_of_batches: Sequence[Ids]) -> None:
        """There is nothing to fetch."""

    def read(self, ids: Ids, *, pin: bool = False) -> Batch:
        """The samples of `ids` (int64 (B,)), on the device; `pin` has nothing to do."""
        sample_ids = torch.from_numpy(np.ascontiguousarray(ids))
        rows = (sample_ids % len(self._pixels)).to(self._device)
        return Batch(self._pixels[rows].permute(0, 3, 1, 2), self._labels[rows], sample_ids)

    def timings(self) -> dict[str, float]:
        return {"read": 0.0, "decode": 0.0, "wait": 0.0}
