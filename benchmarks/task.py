"""Claim: a builder's task runs close to the sum of its parts: decode, resize, encode, write.

The limit is those four calls of the chosen libraries in a loop, with no check, no label, no hash
and no statistics: once as the builder calls them, with four bytes a pixel, and once as their
manuals do, with three. The task is `pipelines.write_shard`, which is what Ray runs once per shard.
"""

import tempfile
import time
from pathlib import Path
from typing import Literal

import torch

from benchmarks.images import QUALITY, RESIZE, Raw, class_folders
from benchmarks.parts import pack
from benchmarks.table import Bars, Table, spread
from benchmarks.turns import ratios
from pipelines import plan, plan_files, sources
from pipelines.build import job_for
from pipelines.write_shard import write_shard

COLUMNS = ("path", "img/s per core, CPU time", "ratio", "img/s, wall time", "ratio")
CROP = 227
_NAMES = ("the parts alone", "the parts alone, RGB throughout", "pipelines.write_shard")
_LIMIT, _PLAIN, _OURS = _NAMES


def run(raw: Raw, rounds: int = 15) -> Table:
    """Each round makes the same images into one tar by both paths, in alternating order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in _NAMES}
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            raw_folder = class_folders(Path(folder) / "raw", raw, len(raw.jpegs))
            files = sorted(raw_folder.glob("train/*/*"))
            for number in range(-1, rounds):  # the first round warms up and does not count
                for name in _NAMES[:: 1 if number % 2 == 0 else -1]:
                    rate = _timed(name, files, Path(folder), number, len(raw.jpegs))
                    rates[name] += [rate] if number >= 0 else []
    finally:
        torch.set_num_threads(threads)
    rows = []
    for name in _NAMES:
        row = [name]
        for clock in (0, 1):
            mine = [rate[clock] for rate in rates[name]]
            limit = [rate[clock] for rate in rates[_LIMIT]]
            row += [spread(mine), spread(ratios(mine, limit), 2)]
        rows.append(tuple(row))
    setting = (
        f"{raw.origin}, as files of two class folders, page cache warm; shorter side {RESIZE}, "
        f"centre crop {CROP}, JPEG quality {QUALITY} 4:2:0; one shard of all to a local disk, one "
        f"process without Ray; {rounds} rounds, median [lowest..highest], ratios within a round."
    )
    bars = {name: [rate[0] for rate in rates[name]] for name in _NAMES}
    chart = Bars("raw JPEGs to one shard, img/s per core of CPU time", bars)
    return Table(COLUMNS, tuple(rows), setting, chart)


def _timed(
    name: str, files: list[Path], folder: Path, number: int, images: int
) -> tuple[float, float]:
    """Images per second of CPU and of wall time. The plan, made once per set, is not counted."""
    out = folder / f"{name.replace(' ', '-')}{number}"
    if name != _OURS:
        out.mkdir()
        colours: Literal["RGB", "RGBX"] = "RGB" if name == _PLAIN else "RGBX"
        start = time.process_time(), time.perf_counter()
        tar = out / "parts.tar"
        pack(files, tar, resize=RESIZE, crop=CROP, quality=QUALITY, colours=colours)
    else:
        raw = str(folder / "raw")
        recipe = plan.Recipe(samples_per_shard=images, splits=("train",))
        made = plan.make(sources.scan(raw, recipe.splits), recipe)
        plan_files.begin(str(out), raw, made)
        job = job_for(made, raw, str(out))
        start = time.process_time(), time.perf_counter()
        write_shard(job, 0, made.shards[0].name, made.shards[0].id)
    seconds = time.process_time() - start[0], time.perf_counter() - start[1]
    return images / seconds[0], images / seconds[1]
