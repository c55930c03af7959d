"""Building and training steps on one CPU, two, four … up to all of this machine.

    python -m benchmarks.grown_workers '{"shards": …, "workers": …, "batch": …, "steps": …, …}'

runs the ranks of a training without Ray, one thread each, and prints the seconds of a step.
"""

import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import fit_loop, processes
from benchmarks.builder import steady
from benchmarks.images import Raw, class_folders, stored, write_shards
from benchmarks.turns import in_turns
from pipelines.shards import load_manifest
from training.loop import Place, fit

_PER_SHARD = 125
_ROUNDS = 2
Points = dict[int, list[tuple[float, float]]]
_UNKNOWN = float("nan")


@dataclass(frozen=True)
class Sizes:
    """build: files of the set; batch: of all ranks together; steps: timed, after two."""

    build: int = 2500
    batch: int = 64
    steps: int = 3
    classes: int = 1000
    width: float = 1.0
    most: int | None = None  # CPUs; all by default

    def measured(self, raw: Raw, rounds: int) -> Iterator[tuple[str, Points]]:
        rounds, counts = min(rounds, _ROUNDS), self._counts()
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = Path(name)
            files = class_folders(folder / "raw", raw, self.build)
            built = functools.partial(_built, files, folder / "out")
            yield "1,000 images built", self._turns(built, counts, rounds)
            request = self._training(folder / "shards", raw)
            yield "training step", self._turns(functools.partial(stepped, request), counts, rounds)

    def words(self, raw: Raw) -> str:
        return (
            f"On CPUs, {_ROUNDS} rounds at most: images built in steady state, of "
            f"{self.build} files ({raw.origin}), by the times of the tars; training steps of "
            f"`baseline` (width {self.width}, {self.classes} classes) with random images, global "
            f"batch {self.batch}, as many ranks as CPUs, one thread each, without Ray; median of "
            f"{self.steps} steps after two."
        )

    def _counts(self) -> list[int]:
        every = self.most or len(processes.cpus())
        return sorted({*(2**n for n in range(8) if 2**n <= every), every})

    def _turns(self, seconds_on: Any, counts: list[int], rounds: int) -> Points:
        contenders = {
            str(count): functools.partial(lambda count, _: seconds_on(count), count)
            for count in counts
        }
        found = in_turns(contenders, rounds)
        return {int(count): [(s, _UNKNOWN) for s in values] for count, values in found.items()}

    def _training(self, folder: Path, raw: Raw) -> dict[str, Any]:
        uri = write_shards(
            folder,
            stored(raw, 227),
            crop=227,
            train=(self.steps + 3) * self.batch,
            classes=self.classes,
            per_shard=500,
        )
        return asdict(self) | {"shards": uri}


def _built(raw: Path, out: Path, count: int) -> float:
    """Seconds for 1,000 images more."""
    command = [sys.executable, "-m", "pipelines", "build", "--raw", str(raw), "--out", str(out)]
    command += ["--splits", "train", "--samples-per-shard", str(_PER_SHARD)]
    processes.run(command, on=processes.cpus(count))
    rate = steady(out, count)
    shutil.rmtree(out)
    return 1000 / rate


def stepped(request: dict[str, Any], count: int) -> float:
    """Seconds of a step of `count` ranks, each on a CPU of its own."""
    asked = request | {"workers": count}
    answer = processes.ask_ours("grown_workers", asked, on=processes.cpus(count)).answer()
    return float(answer["seconds"])


def _rank(rank: int, request: dict[str, Any], meeting: str, answers: Any) -> None:
    """Rank 0 answers with the seconds of each step; nobody goes on after that."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[rank]])
    ranks, seconds = request["workers"], []
    dist.init_process_group("gloo", meeting, rank=rank, world_size=ranks)

    def log(metrics: dict[str, float], step: int) -> None:
        seconds.append(metrics["seconds"])
        if step == request["steps"] + 2:
            answers.put(seconds[2:])

    place = Place(torch.device("cpu"), rank=rank, world_size=ranks, threads=1)
    config = fit_loop._config(request)
    shards = request["shards"]
    fit(config, shards, load_manifest(shards), place, log=log, report=fit_loop.never)


def main() -> None:
    request = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        answers = mp.get_context("spawn").SimpleQueue()
        arguments = (request, f"file://{folder}/meeting", answers)
        ranks = mp.spawn(_rank, arguments, nprocs=request["workers"], join=False)
        seconds = answers.get()
        for process in ranks.processes:
            process.kill()
    print(json.dumps({"seconds": statistics.median(seconds)}))


if __name__ == "__main__":
    main()
