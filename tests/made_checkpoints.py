"""Checkpoints without a network, and which of them a run has."""

from pathlib import Path

import torch

from pipelines import storage
from training import checkpoint


def made(folder: Path, step: int, top1: float | None = None, measured: int | None = None) -> Path:
    """measured: the step whose evaluation gave top1; by default this one."""
    metrics = {} if top1 is None else {"val_top1": top1}
    state = {"step": step, "metrics": metrics}
    state["evaluated_step"] = step if measured is None else measured
    tensors = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {}}
    checkpoint.save(folder, tensors, state)
    return folder


def steps_in(run: str) -> list[int]:
    names = [name for name, _ in storage.list_files(run) if name.endswith("/hashes.json")]
    return sorted(int(name.split("-")[1]) for name in names)
