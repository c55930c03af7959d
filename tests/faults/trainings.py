"""Trainings that lives of `works.train` go on with."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_checkpoints import steps_in
from mortal import Life, lived
from shard_sets import write_shard_set

from training import checkpoint

# 4 steps in each of 3 epochs; checkpoints after 3, 4, 6, 8, 9 and 12.
STEPS, EVERY = 12, 3
CHANGES = {"optim_batch_size": 7, "optim_epochs": 3, "checkpoint_steps": EVERY}
CHANGES |= {"model_batch_norm": True, "optim_ema_decay": 0.9}


class Training:
    """One training: lives that go on with it, and what they left."""

    def __init__(self, uri: str, folder: Path, run: str = "") -> None:
        self.uri, self._folder = uri, folder
        self.run = run or str(folder / "run")
        self.lives: list[Life] = []
        folder.mkdir()

    def live(self, **how: Any) -> Life:
        arguments = {"uri": self.uri, "run": self.run, "log": str(self._folder / "log")}
        self.lives.append(lived("train", changes=CHANGES, **arguments, **how))
        return self.lives[-1]

    def finish(self, **how: Any) -> None:
        life = self.live(**how)
        assert life.status == 0, life.errors

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self._folder / "log").read_text().splitlines()]

    @property
    def files(self) -> dict[str, bytes]:
        """Of the last checkpoint."""
        with checkpoint.newest_good(self.run) as last:
            assert last is not None
            return {path.name: path.read_bytes() for path in sorted(last.iterdir())}

    def learned(self) -> dict[int, set[tuple[float, ...]]]:
        """What was said of each step, in any life, of loss and samples."""
        said: dict[int, set[tuple[float, ...]]] = {}
        for line in self.lines:
            keys = ("loss", "sample_digest", "val_loss")
            if values := tuple(line[key] for key in keys if key in line):
                said.setdefault(line["step"], set()).add(values)
        return said

    def check_learned_as(self, whole: "Training") -> None:
        assert self.files == whole.files and self.learned() == whole.learned()

    def check_same_as(self, whole: "Training") -> None:
        """The steps that were done again among it: an upload goes on behind the steps up to the
        next checkpoint, so that a kill takes at most those since the last checkpoint but one."""
        self.check_learned_as(whole)
        reached = 0
        for line in self.lines:
            if "loss" not in line and "val_loss" not in line:
                assert reached - 2 * EVERY <= line["step"] <= reached, self.lines
            reached = line["step"]
        assert steps_in(self.run) == steps_in(whole.run)
        held = {path.name for path in Path(self.run).rglob("*") if path.is_file()}
        assert held == set(whole.files), "nothing of the killed is left"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    uri = write_shard_set(folder / "set", train=(10, 9, 9), val=(7, 6))
    training = Training(uri, folder / "training")
    training.finish(watch="checkpoint-")
    assert json.loads(training.files["state.json"])["step"] == STEPS
    return training


@pytest.fixture
def training(whole: Training, tmp_path: Path) -> Training:
    """The same, to be disturbed."""
    return Training(whole.uri, tmp_path / "training")
