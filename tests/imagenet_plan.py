"""Plans a set of ImageNet's size and prints: train pictures, train shards, peak bytes of memory."""

import resource
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines import plan
from pipelines.sources import Source
from pipelines.sources.table import check, labelled, part

TRAIN, VAL, CLASSES = 1_281_167, 50_000, 1000


def source() -> Source:
    wnids = [f"n{number:08d}" for number in range(CLASSES)]
    label = np.sort(np.arange(TRAIN) % CLASSES)
    names = pa.array([f"{wnids[k]}_{number}.JPEG" for number, k in enumerate(label)])
    offsets = pa.array(np.arange(TRAIN) * 115_000)
    train = part(
        "train", names, pa.array(wnids).take(pa.array(label)), "train.tar", offsets, 113_000
    )
    names = pa.array([f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(VAL)])
    val = part("val", names, wnids * (VAL // CLASSES), "val.tar", [*range(VAL)], 130_000)
    table = labelled([train, val], wnids)
    check("RAW", table)
    classes = tuple(wnids)
    return Source("RAW", "ilsvrc2012", table, classes, classes, {}, (), None, ())


made = plan.make(source(), plan.Recipe())
print(
    sum(shard.samples for shard in made.shards if shard.split == "train"),
    sum(shard.split == "train" for shard in made.shards),
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
)
