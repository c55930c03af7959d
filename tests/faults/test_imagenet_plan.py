"""ImageNet's archives are planned from their kept indices, as a second run does.

As a program, in a fresh process to see its peak: python test_imagenet_plan.py FOLDER. The archives
have the published sizes but are sparse files: nobody reads them once they are indexed. It prints
train images, train shards, official or not, and the peak bytes of memory of the planning alone.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from drawn import ROOT, devkit

from pipelines import plan, plan_files, sources
from pipelines.sources import index, official
from pipelines.sources.devkit import NAME

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
TRAIN, VAL, CLASSES = 1_281_167, 50_000, 1000


def test_imagenet_is_planned_within_a_gibibyte(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run(
        [sys.executable, __file__, tmp_path],
        env=os.environ | {"ALEXNET_HOME": str(tmp_path / "home"), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    images, shards, official, peak_bytes = run.stdout.split()
    assert (images, shards, official) == ("1281167", "256", "True")
    assert int(peak_bytes) < 1 << 30


def draw(raw: Path) -> None:
    """Sparse archives, a devkit and the indices that a first run would have kept."""
    raw.mkdir()
    wnids = [f"n{number:08d}" for number in range(1, CLASSES + 1)]
    counts = [TRAIN // CLASSES + (k < TRAIN % CLASSES) for k in range(CLASSES)]
    truth = "\n".join(str(1 + number % CLASSES) for number in range(VAL))
    (raw / NAME).write_bytes(devkit(wnids, counts, truth))
    for name in (TRAIN_TAR, VAL_TAR):
        with (raw / name).open("wb") as file:
            file.truncate(official.ARCHIVES[name].size)
    label = np.repeat(np.arange(CLASSES), counts)
    inner = pa.array([f"{wnid}.tar" for wnid in wnids]).take(pa.array(label))
    train = [f"{wnids[k]}_{number}.JPEG" for number, k in enumerate(label)]
    val = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, VAL + 1)]
    for name, kind, outer, names in (
        (TRAIN_TAR, "nested", inner, train),
        (VAL_TAR, "flat", pa.repeat("", VAL), val),
    ):
        numbers = np.arange(len(names))
        columns = [outer, names, pa.array(numbers * 115_000), pa.array(100_000 + numbers % 1000)]
        table = pa.table(columns, schema=index._SCHEMA)
        index.once(str(raw / name), kind, index._SCHEMA, lambda _, table=table: table)


def main(folder: Path) -> None:
    raw = folder / "raw"
    if os.fork() == 0:  # its memory is not that of the planning
        draw(raw)
        os._exit(0)
    assert os.wait()[1] == 0, "the drawing failed"
    source = sources.scan(str(raw), ["train", "val"])
    made = plan.make(source, plan.Recipe())
    plan_files.begin(str(folder / "out"), str(raw), made)
    shards = [shard.samples for shard in made.shards if shard.split == "train"]
    # getrusage's figure would be that of whoever started this program, if larger.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(sum(shards), len(shards), source.official, int(peak[1]) * 1024)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
