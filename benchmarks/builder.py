"""Claim: `python -m pipelines build` makes shards faster than its peers, near the sum of its parts.

Every contender is a command in a process of its own that turns the same files into tars of JPEGs of
the same side and quality. Each runs on two sets: the tars of the larger one tell by their times at
what rate images came once all CPUs were at work, and the smaller one how long that took. Ray's
start varies by seconds, so that the difference of the two jobs would tell less.
"""

import functools
import io
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
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
    "img/s per core, CPU time",
    "ratio",
    "start-up, s",
    "whole large job, s",
    "PSNR, dB (worst)",
    "kB",
)
SIDE = 227  # shorter side of the resize and side of the crop: what img2dataset can do as well
OURS = "pipelines build"
LIMIT = "the parts alone: the same codecs, nothing else"
SUMS = "the parts with the hashes and sums that a set has"
RAY = "Ray alone: start, one empty map, end"
RAY_DATA = "Ray Data, a block for each tar"
# Between two shards a CPU waits 0.16 s for Ray Data, which looks every 0.1 s whether a task has
# ended: 1 % of a shard of the default length, which would take jobs of minutes here.
_PER_SHARD = 750
_EXAMINED = 16  # images of each contender, for their PSNR
_LEAST_PSNR = 30.0  # dB, on average: another image, or a much worse quality

Command = Callable[[Path, Path], processes.Finished]  # (raw, out)


@dataclass(frozen=True)
class Quality:
    images: int
    psnr: tuple[float, ...]  # dB of the stored JPEGs examined against the exact resize
    kilobytes: float


@dataclass(frozen=True)
class _Pair:
    """The same job on both sets: (wall seconds, CPU seconds) each."""

    small: tuple[float, float]
    large: tuple[float, float]
    more: int  # images that the larger set has more
    steady: float  # images per second of wall time, by the larger one's tars

    @property
    def rates(self) -> tuple[float, float]:
        """Images per second of wall time, and of CPU time between the two sizes; nan where the
        larger one took no more, as in trials of a few images."""
        seconds = self.large[1] - self.small[1]
        return self.steady, self.more / seconds if seconds > 0 else float("nan")


def run(raw: Raw, rounds: int = 10, sizes: tuple[int, int] = (500, 6000)) -> Table:
    """Before anything is timed, each contender has made the larger set once, which is looked at."""
    commands, absent = contenders()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        sets = {size: class_folders(folder / f"raw{size}", raw, size) for size in sizes}
        turns, qualities = {}, {}
        for name, command in commands.items():
            qualities[name] = _looked_at(name, command, sets[sizes[1]], folder / "out")
            turns[name] = functools.partial(_pair, command, sets, folder / "out", sizes)
        turns[RAY] = functools.partial(_ray_alone, folder)
        measured = in_turns(turns, rounds)
    rows = [_row(name, measured, qualities[name], sizes) for name in commands]
    alone = spread([pair.small[0] for pair in measured[RAY]], 1)
    rows.append((RAY, "–", "–", "–", "–", alone, "–", "–", "–"))
    return Table(COLUMNS, tuple(rows), _setting(raw, rounds, sizes, absent), _chart(measured))


def contenders() -> tuple[dict[str, Command], dict[str, str]]:
    """Those that can run here, and why not for the others."""
    sums = functools.partial(_parts, sums=True)
    found: dict[str, Command] = {LIMIT: _parts, SUMS: sums, OURS: _ours, RAY_DATA: _ray_data}
    try:
        python = environments.python("img2dataset")
    except environments.Absent as reason:
        return found, {"img2dataset": str(reason)}
    peer = environments.version("img2dataset")
    return found | {peer: functools.partial(_img2dataset, python)}, {}


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


def _pair(
    command: Command, sets: dict[int, Path], out: Path, sizes: tuple[int, int], _: int
) -> _Pair:
    seconds = []
    for size in sizes:
        done = command(sets[size], out)
        rate = steady(out, len(processes.cpus()))
        shutil.rmtree(out)
        seconds.append((done.wall_seconds, done.cpu_seconds))
    return _Pair(seconds[0], seconds[1], sizes[1] - sizes[0], rate)


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
        "per_shard": _per_shard(raw),
        "shards": -(-_images(raw) // _per_shard(raw)),
        "images": True,
    }


def _per_shard(raw: Path) -> int:
    """At least a shard for each CPU."""
    return max(1, min(_PER_SHARD, _images(raw) // len(processes.cpus())))


def _images(raw: Path) -> int:
    return sum(1 for _ in raw.glob("train/*/*"))


def _parts(raw: Path, out: Path, sums: bool = False) -> processes.Finished:
    return processes.ask_ours("parts", _request(raw, out) | {"sums": sums}, on=processes.cpus())


def _ours(raw: Path, out: Path) -> processes.Finished:
    command = [sys.executable, "-m", "pipelines", "build", "--raw", str(raw), "--out", str(out)]
    flags = {
        "--resize": SIDE,
        "--crop": SIDE,
        "--quality": QUALITY,
        "--samples-per-shard": _per_shard(raw),
        "--splits": "train",
    }
    command += [str(word) for flag in flags.items() for word in flag]
    return processes.run(command, on=processes.cpus())


def _ray_data(raw: Path, out: Path) -> processes.Finished:
    request = _request(raw, out)
    return processes.ask(sys.executable, "build_ray_data.py", request, on=processes.cpus())


def _img2dataset(python: Path, raw: Path, out: Path) -> processes.Finished:
    return processes.ask(python, "build_img2dataset.py", _request(raw, out), on=processes.cpus())


def _ray_alone(folder: Path, _: int) -> _Pair:
    request = _request(folder, folder) | {"images": False}
    done = processes.ask(sys.executable, "build_ray_data.py", request, on=processes.cpus())
    return _Pair((done.wall_seconds, done.cpu_seconds), (0, 0), 0, 0)


def _row(
    name: str, measured: dict[str, list[_Pair]], made: Quality, sizes: tuple[int, int]
) -> tuple[str, ...]:
    cells = [f"**`{name}`**" if name == OURS else name]
    for clock in (0, 1):
        mine = [pair.rates[clock] for pair in measured[name]]
        limit = [pair.rates[clock] for pair in measured[LIMIT]]
        cells += [spread(mine), spread(ratios(mine, limit), 2)]
    start = [pair.small[0] - sizes[0] / pair.steady for pair in measured[name]]
    cells += [spread(start, 1), spread([pair.large[0] for pair in measured[name]], 1)]
    return (*cells, f"{np.mean(made.psnr):.1f} ({min(made.psnr):.1f})", f"{made.kilobytes:.1f}")


def _setting(raw: Raw, rounds: int, sizes: tuple[int, int], absent: dict[str, str]) -> str:
    missing = "".join(f" Not here: {name} ({reason})." for name, reason in absent.items())
    return (
        f"{sizes[0]} and {sizes[1]} files in two class folders, copies of {raw.origin}, page cache "
        f"warm; {_PER_SHARD} a shard; shorter side {SIDE}, centre crop {SIDE}, JPEG quality "
        f"{QUALITY} 4:2:0; tars on a local disk; {len(processes.cpus())} CPUs for each, whose "
        f"processes take turns; {rounds} rounds after one that is looked at and not timed, median "
        "[lowest..highest], ratios to the parts alone within a round. Steady: by the times of the "
        "larger job's tars, from the one with which each CPU has made one to the last; CPU time: "
        "from the difference of the two jobs; start-up: what the smaller one takes beyond that "
        "rate, Ray's included. PSNR: of the stored JPEGs against a resize in double precision. "
        f"Ray's workers have its own niceness, 15. The tars of the parts and of img2dataset hold "
        f"no labels; img2dataset hashes nothing, and resizes by another filter (area).{missing}"
    )


def _chart(measured: dict[str, list[_Pair]]) -> Bars:
    values = {
        name: [pair.steady for pair in pairs] for name, pairs in measured.items() if name != RAY
    }
    return Bars("raw JPEGs to shards, steady img/s", values)
