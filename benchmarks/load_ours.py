"""One epoch of training's own loader, mirrored at random, for the benchmark of loaders.

    python -m benchmarks.load_ours '{"action": "run", "shards": …, "batch": …, "threads": …}'

"decoded": epochs after one that has decoded whatever was not (`--cache decoded`), not mirrored.
"""

import os
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import clock, tars
from pipelines.shards import load_manifest
from training.decoded import open_decoded
from training.loader import Loader
from training.order import epoch_order, global_batch, steps_per_epoch


def batches(request: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 (B,3,H,W), labels (B,)."""
    torch.set_num_threads(1)  # the mirroring's; decoding has threads of its own
    manifest, keep = load_manifest(request["shards"]), bool(request.get("decoded"))
    os.environ["ALEXNET_HOME"] = request["work"]
    decoded = open_decoded(manifest, "train", None) if keep else None
    with Loader(
        request["shards"], manifest, "train", threads=request["threads"], decoded=decoded
    ) as loader:
        if keep:
            deque(_epoch(loader, request["batch"], 0, mirrored=False), maxlen=0)
        for number in range(1, request.get("epochs", 1) + 1):
            yield from _epoch(loader, request["batch"], number, mirrored=not keep)


def _epoch(
    loader: Loader, size: int, number: int, *, mirrored: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    order = epoch_order(loader.shard_sizes, seed=0, epoch=number)
    steps = steps_per_epoch(len(order), size)
    chosen = [global_batch(order, step, steps) for step in range(steps)]
    for batch in loader.batches(chosen):
        if mirrored:
            tars.mirror(batch.images)
        yield batch.images, batch.labels


if __name__ == "__main__":
    clock.main(batches)
