"""The smallest real training: a 1/32-wide network on drawn shards, without Ray or MLflow."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.shards import load_manifest
from training import checkpoint, loop
from training.accuracy import Metrics
from training.config import AugmentConfig, ModelConfig, OptimConfig, TrainConfig
from training.evaluate import evaluate
from training.loader import Loader
from training.network import build_model, input_spec

CPU = torch.device("cpu")
# Changes of small_config with which 16 images are learned in 2 s, by every seed that was tried.
BY_HEART: dict[str, Any] = {
    "model_width": 1 / 16,
    "model_batch_norm": True,
    "optim_epochs": 20,
    "augment_crop": "centre",
    "augment_flip": False,
    "augment_colour_sigma": 0.0,
}


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
    """What a run said and saved: `folders` maps steps to the checkpoints."""

    keep: Path | None = None
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    reported: list[tuple[dict[str, float], Path | None]] = field(default_factory=list)
    folders: dict[int, Path] = field(default_factory=dict)
    result: dict[str, float] = field(default_factory=dict)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))

    def report(self, metrics: dict[str, float], write: Callable[[], Path] | None) -> None:
        folder = None if self.keep is None or write is None else write()
        self.reported.append((dict(metrics), folder))
        if folder is None or self.keep is None:
            return
        step = checkpoint.load_state(folder)["step"]
        self.folders[step] = self.keep / f"step-{step}"
        self.keep.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, self.folders[step])

    @property
    def last(self) -> Path:
        return self.folders[max(self.folders)]


def fit(
    config: TrainConfig,
    data: str,
    keep: Path | None = None,
    *,
    place: loop.Place | None = None,
    **rest: Any,
) -> Record:
    """`rest`: further arguments of loop.fit."""
    record = Record(keep)
    place = place or loop.Place(CPU, threads=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more cost time at this size, and much more on a busy machine
    try:
        record.result = loop.fit(
            config,
            data,
            load_manifest(data),
            place,
            log=record.log,
            report=record.report,
            run_id="a-run",
            **rest,
        )
    finally:
        torch.set_num_threads(threads)
    return record


def evaluated(folder: Path, uri: str, split: str, **changes: Any) -> Metrics:
    """Of a checkpoint, whose config is small_config(**changes)."""
    config, manifest = small_config(**changes), load_manifest(uri)
    model = build_model(config, manifest.num_classes).eval()
    model.load_state_dict(checkpoint.load_tensors(folder, "model"))
    with Loader(uri, manifest, split, threads=2, cache_gb=1) as loader:
        return evaluate(model, loader, input_spec(manifest, config), device=CPU)


def seen_ids(set_attribute: Callable[[Any, str, Any], None]) -> list[list[int]]:
    """Fills with the sample ids of each train step from now on. Takes a setattr, as below."""
    steps: list[list[int]] = []
    draw = loop.draw_views

    def recording(*args: Any, sample_ids: torch.Tensor, **rest: Any) -> torch.Tensor:
        steps.append(sample_ids.tolist())
        return draw(*args, sample_ids=sample_ids, **rest)

    set_attribute(loop, "draw_views", recording)
    return steps


def without_dropout(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Masks differ by rank; without them W ranks compute what one does. Takes monkeypatch.setattr
    or the builtin setattr."""
    set_attribute(nn.Dropout, "forward", lambda self, x: x)
