"""A training as a worker of Ray runs it, with its checkpoints and uploads, but without Ray."""

import json
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch
import torch._dynamo  # the first step of an optimizer would import it, in every life
from small_training import CPU, small_config

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import checkpoint, loop
from training.loader import Loader
from training.uploads import Uploader

IMPORTED = (boto3,)  # what a life would import


def train(
    uri: str,
    run: str,
    log: str,
    changes: dict[str, Any],
    temporary: str | None = None,
    signalled: list[str] | None = None,
    memory: int | None = None,
) -> int:
    """Goes on from the newest checkpoint in `run`. `log` gets a line for each log line, before
    them one with the step that this life began at. 2, and one line, where the user must mend; 3
    where memory ended.

    temporary: where checkpoints are written first. signalled: a command that SIGUSR1 makes it run.
    memory: bytes of address space that it may take on.
    """
    torch.set_num_threads(1)
    tempfile.tempdir = temporary or tempfile.tempdir
    _answer(signalled)
    if memory is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, resource.RLIM_INFINITY))
    config = small_config(**changes)

    def tell(metrics: dict[str, float], step: int) -> None:
        with Path(log).open("a") as file:
            file.write(json.dumps({"step": step, "pid": os.getpid(), **metrics}) + "\n")

    def report(metrics: dict[str, float], write: Callable[[], Path] | None) -> None:
        assert write is not None
        uploads.send(write)

    keep_last, keep_best = config.keep_last, config.keep_best
    try:
        with (
            checkpoint.newest_good(run) as resume,
            Uploader(run, keep_last=keep_last, keep_best=keep_best, patience=1.0) as uploads,
        ):
            tell({}, 0 if resume is None else checkpoint.load_state(resume)["step"])
            if resume is not None:
                uploads.tidy(resume.name)
            place = loop.Place(CPU, threads=2)
            loop.fit(
                config,
                uri,
                load_manifest(uri),
                place,
                log=tell,
                report=report,
                resume=resume,
                run_id="a-run",
            )
    except UserError as error:
        print(f"error: {error}")
        return 2
    except (MemoryError, OSError, RuntimeError) as error:
        if memory is None:
            raise
        print(f"without memory: {error}")  # each library has a word of its own for it
        return 3
    return 0


def fetch(uri: str, signalled: list[str] | None = None) -> int:
    """Reads each train image once, as the loader of a worker does. 2, and one line, where the
    user must mend. signalled: as `train`."""
    _answer(signalled)
    manifest = load_manifest(uri)
    try:
        with Loader(uri, manifest, "train", threads=2, cache_gb=1) as loader:
            loader.read(np.arange(loader.num_samples))
    except UserError as error:
        print(f"error: {error}")
        return 2
    return 0


def _answer(command: list[str] | None) -> None:
    """Runs a command at SIGUSR1."""
    if command is not None:
        signal.signal(signal.SIGUSR1, lambda *_: subprocess.run(command) and None)
