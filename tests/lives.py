"""Trainings that are killed and continued, in real processes: python lives.py URI HISTORIES.

HISTORIES is JSON: for each folder of checkpoints, changes of `small_config` ("changes") and lives:
pairs of the number of ranks and the step after which SIGKILL hits rank 0 (null: it may finish).
Every life goes on from the newest checkpoint there; log.jsonl gets what rank 0 logged.

One process imports torch and forks the ranks of all lives, since the import takes seconds.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first step of an optimizer would import it, in every life
import torch.distributed as dist
from small_training import CPU, small_config, without_dropout

from pipelines.shards import load_manifest
from training import checkpoint, loop


def main(uri: str, histories: dict[str, dict[str, Any]]) -> None:
    for folder, history in histories.items():
        Path(folder).mkdir(parents=True)
        for ranks, kill in history["lives"]:
            _live(Path(folder), uri, ranks, kill, history["changes"])


def _live(keep: Path, uri: str, ranks: int, kill: int | None, changes: dict[str, Any]) -> None:
    meeting = keep / f"meeting-{len(list(keep.glob('meeting-*')))}"
    meeting.touch()  # taken, also where one rank needs none
    places = [loop.Place(CPU, rank=rank, world_size=ranks) for rank in range(ranks)]
    pids = [_start(place, keep, uri, kill, changes, meeting) for place in places]
    _, status = os.waitpid(pids[0], 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed if kill else status == 0, f"ended with {status}"
    for pid in pids[1:]:
        if killed:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _start(
    place: loop.Place,
    keep: Path,
    uri: str,
    kill: int | None,
    changes: dict[str, Any],
    meeting: Path,
) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        if place.world_size > 1:
            dist.init_process_group(
                "gloo", f"file://{meeting}", rank=place.rank, world_size=place.world_size
            )
        _train(place, keep, uri, kill, changes)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _train(
    place: loop.Place, keep: Path, uri: str, kill: int | None, changes: dict[str, Any]
) -> None:
    def log(metrics: dict[str, float], step: int) -> None:
        with (keep / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if "loss" in metrics and step == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def report(metrics: dict[str, float], write: Callable[[], Path] | None) -> None:
        if write is not None:
            folder = write()
            step = checkpoint.load_state(folder)["step"]
            shutil.move(folder, keep / "moving")
            (keep / "moving").rename(keep / f"step-{step}")

    fields = dict(changes)
    if not fields.pop("dropout", True):
        without_dropout(setattr)
    saved = sorted(keep.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    resume = saved[-1] if saved else None
    manifest = load_manifest(uri)
    loop.fit(small_config(**fields), uri, manifest, place, log=log, report=report, resume=resume)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
