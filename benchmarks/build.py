"""Claim: a builder's task runs close to the sum of its parts: decode, resize, encode, write.

The limit is those four calls of the chosen libraries in a loop, with no check, no label, no hash
and no statistics. The task is `pipelines.produce`, which is what Ray runs once per shard.
"""

import io
import tarfile
import tempfile
import time
from pathlib import Path

import simplejpeg
import torch
from PIL import Image

from alexnet.preprocess import resize_and_crop
from benchmarks.pictures import QUALITY, RESIZE, Raw
from benchmarks.table import Table, spread
from pipelines import claim, plan, sources
from pipelines.build import job_for
from pipelines.produce import produce

COLUMNS = ("path", "img/s per core, CPU time", "ratio", "img/s, wall time", "ratio")
CROP = 227
_NAMES = ("the parts alone", "pipelines.produce")
_WNIDS = ("n00000001", "n00000002")


def run(raw: Raw, rounds: int = 5) -> Table:
    """Each round makes the same pictures into one tar by both paths, in alternating order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in _NAMES}
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            files = _class_folders(Path(folder) / "raw", raw)
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
            limit = [rate[clock] for rate in rates[_NAMES[0]]]
            row += [spread(mine), spread([a / b for a, b in zip(mine, limit, strict=True)], 2)]
        rows.append(tuple(row))
    setting = (
        f"{raw.origin}, as files of two class folders, page cache warm; shorter side {RESIZE}, "
        f"centre crop {CROP}, JPEG quality {QUALITY} 4:2:0; one shard of all to a local disk, one "
        f"process without Ray; {rounds} rounds, median [lowest..highest], ratios within a round."
    )
    return Table(COLUMNS, tuple(rows), setting)


def _class_folders(folder: Path, raw: Raw) -> list[Path]:
    files = []
    for number, jpeg in enumerate(raw.jpegs):
        wnid = _WNIDS[number % len(_WNIDS)]
        path = folder / "train" / wnid / f"{wnid}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
        files.append(path)
    return files


def _timed(
    name: str, files: list[Path], folder: Path, number: int, pictures: int
) -> tuple[float, float]:
    """Pictures per second of CPU and of wall time. The plan, made once per set, is not counted."""
    out = folder / f"{name.replace(' ', '-')}{number}"
    if name == _NAMES[0]:
        out.mkdir()
        start = time.process_time(), time.perf_counter()
        _parts(files, out / "parts.tar")
    else:
        raw = str(folder / "raw")
        recipe = plan.Recipe(samples_per_shard=pictures, splits=("train",))
        made = plan.make(sources.scan(raw, recipe.splits), recipe)
        claim.begin(str(out), raw, made)
        job = job_for(made, raw, str(out))
        start = time.process_time(), time.perf_counter()
        produce(job, 0, made.shards[0].name, made.shards[0].id)
    seconds = time.process_time() - start[0], time.perf_counter() - start[1]
    return pictures / seconds[0], pictures / seconds[1]


def _parts(files: list[Path], out: Path) -> None:
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in files:
            pixels = torch.from_numpy(simplejpeg.decode_jpeg(path.read_bytes())).permute(2, 0, 1)
            small = resize_and_crop(pixels, RESIZE, CROP).permute(1, 2, 0).contiguous().numpy()
            buffer = io.BytesIO()
            Image.fromarray(small).save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
            member = tarfile.TarInfo(path.name)
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
