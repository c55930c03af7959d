"""Files of decoded images of a train split, in the tests' own home."""

import numpy as np
from shard_sets import SIZES

from pipelines.shards import load_manifest
from training.decoded import Decoded, open_decoded
from training.loader import Loader

ALL = np.arange(sum(SIZES))


def opened(uri: str, split: str = "train", limit_gb: float | None = None) -> Decoded:
    file = open_decoded(load_manifest(uri), split, limit_gb)
    assert file is not None
    return file


def worker(uri: str, split: str = "train", limit_gb: float | None = None) -> Loader:
    file = opened(uri, split, limit_gb)
    return Loader(uri, load_manifest(uri), split, threads=2, decoded=file)


def served(uri: str) -> dict[int, np.ndarray]:
    """By id, all images that the file of the train split gives."""
    file = opened(uri)
    side = load_manifest(uri).crop
    out = np.zeros((len(ALL), side, side, 3), np.uint8)
    missing = file.read(ALL, out)
    file.close()
    return {sample: out[sample] for sample in sorted(set(ALL.tolist()) - set(missing.tolist()))}


def filled(uri: str) -> None:
    with worker(uri) as loader:
        loader.read(ALL)
