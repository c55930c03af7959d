"""Claim: `python -m pipelines build` makes shards faster than its peers, near the sum of its parts.

Every contender is a command in a process of its own that turns the same files into tars of JPEGs of
the same side and quality. The times of its tars tell at what rate images came once all CPUs were at
work; what the job took beyond that rate was its start and its end.
"""

import functools
import io
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import environments, processes, resize
from benchmarks.images import QUALITY, Raw, class_folders
from benchmarks.table import Bars, Table, spread
from benchmarks.turns import in_turns, ratios

COLUMNS = (
    "builder",
    "steady img/s",
    "ratio",
    "img/s per core, CPU time of the whole job",
    "ratio",
    "start-up, s",
    "whole job, s",
    "largest process, MB",
    "PSNR, dB (worst)",
    "kB",
)
SIDE = 227  # shorter side of the resize and side of the crop: what img2dataset can do as well
OURS = "pipelines build"
LIMIT = "the parts alone: the same codecs, nothing else"
SUMS = "the parts with the hashes and sums that a set has"
RAY = "Ray alone: start, one empty map, end"
RAY_DATA = "Ray Data, a block for each tar"
# Several for each CPU; shards of the default length would take jobs of minutes here.
PER_SHARD = 750
_EXAMINED = 16  # images of each contender, for their PSNR
_LEAST_PSNR = 30.0  # dB, on average: another image, or a much worse quality

Command = Callable[[Path, Path], processes.Finished]  # (raw, out)


@dataclass(frozen=True)
class Quality:
    images: int
    psnr: tuple[float, ...]  # dB of the stored JPEGs examined against the exact resize
    kilobytes: float


@dataclass(frozen=True)
class Built:
    """steady: images per second of wall time, by the tars; largest_mb: memory of the largest of the
    command's processes, a worker where there are some."""

    images: int
    wall_seconds: float
    cpu_seconds: float
    steady: float
    largest_mb: float


def run(raw: Raw, rounds: int = 10, count: int = 6000) -> Table:
    """Before anything is timed, each contender has made the set once, which is looked at."""
    commands, absent = contenders()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        files, out = class_folders(folder / "raw", raw, count), folder / "out"
        qualities = {name: _looked_at(name, each, files, out) for name, each in commands.items()}
        turns: dict[str, Callable[[int], Built]] = {
            name: functools.partial(timed, each, files, out, count)
            for name, each in commands.items()
        }
        turns[RAY] = functools.partial(_ray_alone, folder)
        measured = in_turns(turns, rounds)
    rows = [_row(name, measured, qualities[name]) for name in commands]
    alone = spread([job.wall_seconds for job in measured[RAY]], 1)
    rows.append((RAY, "–", "–", "–", "–", alone, "–", "–", "–", "–"))
    return Table(COLUMNS, tuple(rows), _setting(raw, rounds, count, absent), _chart(measured))


def contenders() -> tuple[dict[str, Command], dict[str, str]]:
    """Those that can run here, and why not for the others."""
    sums = functools.partial(_parts, sums=True)
    found: dict[str, Command] = {LIMIT: _parts, SUMS: sums, OURS: _ours, RAY_DATA: _ray_data}
    try:
        python = environments.python("img2dataset")
    except environments.Absent as reason:
        return found, {"img2dataset": str(reason)}
    peer = environments.version("img2dataset")
    plain = functools.partial(_img2dataset, python, False)
    hashed = functools.partial(_img2dataset, python, True)
    return found | {peer: plain, f"{peer}, with a SHA-256 of each source": hashed}, {}


def examined(raw: Path, out: Path) -> Quality:
    """Refuses tars that hold other images than `raw`; compares some with the exact resize."""
    stored = images_of(out)
    files = {path.stem: path for path in raw.glob("train/*/*")}
    assert stored.keys() == files.keys(), "a builder lost, invented or renamed images"
    psnr = []
    for key in sorted(stored)[:: max(1, len(stored) // _EXAMINED)]:
        image = Image.open(io.BytesIO(stored[key]))  # grey ones stay grey in img2dataset
        pixels = np.asarray(image.convert("RGB"))
        wanted = resize.reference(files[key].read_bytes(), SIDE, SIDE)
        psnr.append(resize.psnr(pixels, wanted))
    size = float(np.mean([len(jpeg) for jpeg in stored.values()])) / 1000
    return Quality(len(stored), tuple(psnr), size)


def images_of(out: Path) -> dict[str, bytes]:
    """Name of the raw file without its ending → stored JPEG, of all tars below `out`."""
    found = {}
    for path in sorted(out.rglob("*.tar")):
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                data = tar.extractfile(member)
                members.setdefault(key, {})[suffix] = data.read() if data else b""
        for key, parts in members.items():
            found[_source(key, parts)] = parts["jpg"]
    return found


def steady(out: Path, workers: int) -> float:
    """Images per second of wall time, from the tar with which each worker has ended one to the
    last: by the times at which the tars were written. nan where there are no more tars, or where
    the file system gives all of them one time, as in trials of a few images."""
    tars = sorted(out.rglob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
    later = tars[workers:]
    if not later:
        return float("nan")
    nanoseconds = later[-1].stat().st_mtime_ns - tars[workers - 1].stat().st_mtime_ns
    return sum(map(_images_in, later)) / (nanoseconds / 1e9) if nanoseconds else float("nan")


def _images_in(tar: Path) -> int:
    with tarfile.open(tar) as opened:
        return sum(name.endswith(".jpg") for name in opened.getnames())


def _source(key: str, parts: dict[str, bytes]) -> str:
    """img2dataset numbers its images, and notes under "url" where each came from."""
    url = json.loads(parts.get("json", b"{}")).get("url")
    return Path(url).stem if url else key


def timed(command: Command, raw: Path, out: Path, count: int, _: int) -> Built:
    done = command(raw, out)
    rate = steady(out, len(processes.cpus()))
    shutil.rmtree(out)
    return Built(count, done.wall_seconds, done.cpu_seconds, rate, done.largest_mb)


def _looked_at(name: str, command: Command, raw: Path, out: Path) -> Quality:
    command(raw, out)
    quality = examined(raw, out)
    shutil.rmtree(out)
    assert np.mean(quality.psnr) > _LEAST_PSNR, f"{name} stores other images: {quality.psnr}"
    return quality


def _request(raw: Path, out: Path) -> dict[str, object]:
    return {
        "raw": str(raw),
        "out": str(out),
        "side": SIDE,
        "quality": QUALITY,
        "processes": len(processes.cpus()),
        "per_shard": per_shard(_images(raw)),
        "shards": -(-_images(raw) // per_shard(_images(raw))),
        "images": True,
    }


def per_shard(count: int) -> int:
    """At least a shard for each CPU."""
    return max(1, min(PER_SHARD, count // len(processes.cpus())))


def _images(raw: Path) -> int:
    return sum(1 for _ in raw.glob("train/*/*"))


def _parts(raw: Path, out: Path, sums: bool = False) -> processes.Finished:
    return processes.ask_ours("parts", _request(raw, out) | {"sums": sums}, on=processes.cpus())


def _ours(raw: Path, out: Path) -> processes.Finished:
    return build(str(raw), str(out), per_shard(_images(raw)))


def build(
    raw: str, out: str, length: int, settings: Mapping[str, str] | None = None
) -> processes.Finished:
    """Our command with shards of this length, and these environment variables."""
    flags = {
        "--raw": raw,
        "--out": out,
        "--resize": SIDE,
        "--crop": SIDE,
        "--quality": QUALITY,
        "--samples-per-shard": length,
        "--splits": "train",
    }
    words = [str(word) for flag in flags.items() for word in flag]
    command = [sys.executable, "-m", "pipelines", "build", *words, "--partial"]  # of ImageNet
    return processes.run(command, on=processes.cpus(), settings=settings)


def _ray_data(raw: Path, out: Path) -> processes.Finished:
    request = _request(raw, out)
    return processes.ask(sys.executable, "build_ray_data.py", request, on=processes.cpus())


def _img2dataset(python: Path, sums: bool, raw: Path, out: Path) -> processes.Finished:
    request = _request(raw, out) | {"sums": sums}
    return processes.ask(python, "build_img2dataset.py", request, on=processes.cpus())


def _ray_alone(folder: Path, _: int) -> Built:
    request = _request(folder, folder) | {"images": False}
    done = processes.ask(sys.executable, "build_ray_data.py", request, on=processes.cpus())
    return Built(0, done.wall_seconds, done.cpu_seconds, float("nan"), done.largest_mb)


def _row(name: str, measured: dict[str, list[Built]], made: Quality) -> tuple[str, ...]:
    jobs, limit = measured[name], measured[LIMIT]
    rates, of_limit = [job.steady for job in jobs], [job.steady for job in limit]
    per_core = [job.images / job.cpu_seconds for job in jobs]
    limit_per_core = [job.images / job.cpu_seconds for job in limit]
    start = [job.wall_seconds - job.images / job.steady for job in jobs]
    return (
        f"**`{name}`**" if name == OURS else name,
        spread(rates),
        spread(ratios(rates, of_limit), 2),
        spread(per_core),
        spread(ratios(per_core, limit_per_core), 2),
        spread(start, 1),
        spread([job.wall_seconds for job in jobs], 1),
        spread([job.largest_mb for job in jobs]),
        f"{np.mean(made.psnr):.1f} ({min(made.psnr):.1f})",
        f"{made.kilobytes:.1f}",
    )


def _setting(raw: Raw, rounds: int, count: int, absent: dict[str, str]) -> str:
    missing = "".join(f" Not here: {name} ({reason})." for name, reason in absent.items())
    return (
        f"{count} files in two class folders, copies of {raw.origin}, page cache warm; "
        f"{PER_SHARD} a shard; shorter side {SIDE}, centre crop {SIDE}, JPEG quality "
        f"{QUALITY} 4:2:0; tars on a local disk; {len(processes.cpus())} CPUs for each, whose "
        f"processes take turns; {rounds} rounds after one that is looked at and not timed, median "
        "[lowest..highest], ratios to the parts alone within a round. Steady: by the times of the "
        "tars, from the one with which each CPU has made one to the last; start-up: what the job "
        "takes beyond that rate, its end and Ray's start included. PSNR: of the stored JPEGs "
        "against a resize in double precision. Ray's workers have its own niceness, 15. The tars "
        "of the parts and of img2dataset hold no labels; img2dataset resizes by another filter "
        f"(area).{missing}"
    )


def _chart(measured: dict[str, list[Built]]) -> Bars:
    values = {name: [job.steady for job in jobs] for name, jobs in measured.items() if name != RAY}
    return Bars("raw JPEGs to shards, steady img/s", values)
