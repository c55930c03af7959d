"""Trainings in folders of their own, which lives of `mortal_training` go on with."""

import json
from pathlib import Path
from typing import Any

from mortal import Life, Mortals

from training import checkpoint

# 4 steps in each of 3 epochs; checkpoints after 3, 4, 6, 8, 9 and 12.
STEPS, EVERY = 12, 3
CHANGES = {
    "model_batch_norm": True,
    "optim_batch_size": 7,
    "optim_epochs": 3,
    "optim_ema_decay": 0.9,
    "checkpoint_steps": EVERY,
}


class Training:
    """One training in a folder of its own: lives that go on with it, and what they left."""

    def __init__(self, mortals: Mortals, uri: str, folder: Path) -> None:
        self._mortals, self.uri, self._folder = mortals, uri, folder
        self.run = folder / "run"
        self.lives: list[Life] = []
        folder.mkdir()

    def live(self, **how: Any) -> Life:
        arguments = {"uri": self.uri, "run": str(self.run), "log": str(self._folder / "log")}
        arguments |= {"changes": CHANGES}
        self.lives.append(self._mortals.live("train", **arguments, **how))
        return self.lives[-1]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self._folder / "log").read_text().splitlines()]

    @property
    def seconds(self) -> float:
        return sum(life.seconds for life in self.lives)

    @property
    def files(self) -> dict[str, bytes]:
        with checkpoint.newest_good(str(self.run)) as last:
            assert last is not None
            return {path.name: path.read_bytes() for path in sorted(last.iterdir())}


def learned(training: Training) -> dict[int, set[tuple[float, ...]]]:
    """What was said of each step, in any life, of loss and samples."""
    said: dict[int, set[tuple[float, ...]]] = {}
    for line in training.lines:
        values = tuple(line[key] for key in ("loss", "sample_digest", "val_loss") if key in line)
        if values:
            said.setdefault(line["step"], set()).add(values)
    return said


def check_steps_done_again(training: Training) -> None:
    """An upload goes on behind the steps up to the next checkpoint: what a kill takes with it are
    at most the steps since the last checkpoint but one."""
    reached = 0
    for line in training.lines:
        if "loss" not in line and "val_loss" not in line:
            assert reached - 2 * EVERY <= line["step"] <= reached, training.lines
        reached = line["step"]


def check_same_as(whole: Training, training: Training) -> None:
    assert training.files == whole.files
    assert learned(training) == learned(whole)
    check_steps_done_again(training)
    names = {path.name.split("-")[1] for path in training.run.iterdir()}
    assert names == {path.name.split("-")[1] for path in whole.run.iterdir()}
    held = {path.name for path in training.run.rglob("*") if path.is_file()}
    assert held == set(whole.files), "nothing of the killed is left"
