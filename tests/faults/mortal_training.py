"""A training as a worker of Ray runs it, with its checkpoints and uploads, but without Ray."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first step of an optimizer would import it, in every life
from small_training import CPU, small_config

from alexnet.errors import UserError
from training import checkpoint, loop
from training.uploads import Uploader


def train(uri: str, run: str, log: str, changes: dict[str, Any]) -> int:
    """Goes on from the newest checkpoint in `run`. `log` gets a line for each log line, before
    them one with the step that this life began at. 2, and one line, where the user must mend."""
    torch.set_num_threads(1)
    config = small_config(**changes)

    def tell(metrics: dict[str, float], step: int) -> None:
        with Path(log).open("a") as file:
            file.write(json.dumps({"step": step, "pid": os.getpid(), **metrics}) + "\n")

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        assert folder is not None
        uploads.send(folder)

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
            loop.fit(config, uri, place, log=tell, report=report, resume=resume, run_id="a-run")
    except UserError as error:
        print(f"error: {error}")
        return 2
    return 0
