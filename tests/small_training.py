"""The smallest real training: a 1/32-wide network on drawn shards, without Ray or MLflow."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training import loop
from training.config import AugmentConfig, ModelConfig, OptimConfig, TrainConfig

CPU = torch.device("cpu")


def small_config(**changes: Any) -> TrainConfig:
    """Two epochs in batches of 8; `changes` as keywords of TrainConfig, or optim_lr=…, model_init=…
    for the fields one level down."""
    config = TrainConfig(
        name="small",
        model=ModelConfig(width=1 / 32, init="he"),
        optim=OptimConfig(batch_size=8, epochs=2, lr=0.01),
        augment=AugmentConfig(crop="resized"),
        log_steps=1,
    )
    for group in ("model", "optim", "augment"):
        inner = {k: changes.pop(k) for k in list(changes) if k.startswith(f"{group}_")}
        fields = {key.removeprefix(f"{group}_"): value for key, value in inner.items()}
        part = dataclasses.replace(getattr(config, group), **fields)
        config = dataclasses.replace(config, **{group: part})
    return dataclasses.replace(config, **changes)


@dataclass
class Record:
    """What a run said and saved: `folders` maps steps to copies of the checkpoints."""

    keep: Path | None = None
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    reported: list[tuple[dict[str, float], Path | None]] = field(default_factory=list)
    folders: dict[int, Path] = field(default_factory=dict)
    result: dict[str, float] = field(default_factory=dict)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        self.reported.append((dict(metrics), folder))
        if folder is not None and self.keep is not None:
            step = loop.checkpoint.load_state(folder)["step"]
            self.folders[step] = Path(shutil.copytree(folder, self.keep / f"step-{step}"))

    @property
    def last(self) -> Path:
        return self.folders[max(self.folders)]


def fit(
    config: TrainConfig,
    data: str,
    keep: Path | None = None,
    *,
    resume: Path | None = None,
    place: loop.Place | None = None,
) -> Record:
    record = Record(keep)
    place = place or loop.Place(CPU, threads=2)
    record.result = loop.fit(
        config, data, place, log=record.log, report=record.report, resume=resume, run_id="a-run"
    )
    return record


def without_dropout(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Masks differ by rank; without them W ranks compute what one does. Takes monkeypatch.setattr
    or the builtin setattr."""
    set_attribute(nn.Dropout, "forward", lambda self, x: x)
