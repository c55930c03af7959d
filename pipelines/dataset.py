"""A shard set as a map-style dataset, for anybody's training loop and torch's DataLoader.

    from torch.utils.data import DataLoader
    from pipelines.dataset import ShardDataset

    train = DataLoader(ShardDataset("shards", "train", transform), batch_size=256, shuffle=True)

It has no state but what it read when it was made, so that it can be forked and pickled; each image
is read by its byte range, on disk or S3, one request an image.
"""

from __future__ import annotations

import hashlib
import io
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from alexnet.errors import UserError
from pipelines import shards, storage

_COLUMNS = ("key", "label", "shard", "offset", "size", "sha256")


class ShardDataset:
    """`dataset[i]` is (transform(image), target_transform(label)): image, a PIL image in RGB of
    `crop` × `crop` pixels; label, an int. The order is that of the shards.

    classes: names in label order. class_to_idx: WNID or folder → label. targets: the label of each
    sample, int64 (N,). keys: their names in the shards. crop: pixels.

    Raises UserError for a set that is not whole, and in `dataset[i]` for an image that is not the
    one that was there when the dataset was made.
    """

    def __init__(
        self,
        out: str,
        split: str,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """out: folder or s3:// prefix of a finished set."""
        self._out = storage.absolute(out)
        manifest = shards.load_manifest(self._out)
        if split not in manifest.splits:
            names = ", ".join(manifest.splits)
            raise UserError(f"{self._out} has no split {split!r}; it has {names}")
        index = shards.load_index(self._out, split, _COLUMNS)
        self.classes, self.crop = manifest.class_names, manifest.crop
        self.class_to_idx = {wnid: label for label, wnid in enumerate(manifest.wnids)}
        self.targets = index["label"].to_numpy()
        self.keys = index["key"].combine_chunks()
        self._transform, self._target_transform = transform, target_transform
        # Arrays, which forked workers share: lists of a million objects would be copied by each.
        shard = index["shard"].combine_chunks().dictionary_encode()
        self._names, self._shard = shard.dictionary.to_pylist(), shard.indices.to_numpy()
        self._offset, self._size = index["offset"].to_numpy(), index["size"].to_numpy()
        digests = b"".join(map(bytes.fromhex, index["sha256"].to_pylist()))
        self._sha256 = np.frombuffer(digests, np.uint8).reshape(-1, 32)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        number = operator.index(i)
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}; take 0 to {len(self) - 1}")
        uri = storage.join(self._out, f"{self._names[self._shard[number]]}.tar")
        jpeg = storage.read(uri, int(self._offset[number]), int(self._size[number]))
        if hashlib.sha256(jpeg).digest() != self._sha256[number].tobytes():
            raise UserError(
                f"{uri}: image {self.keys[number]} is not the one that was there; open the set "
                f"again, and if that does not help run `python -m pipelines verify {self._out}`"
            )
        image: Any = Image.open(io.BytesIO(jpeg)).convert("RGB")
        label: Any = int(self.targets[number])
        if self._transform is not None:
            image = self._transform(image)
        if self._target_transform is not None:
            label = self._target_transform(label)
        return image, label
