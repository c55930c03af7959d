"""SIGKILL at random steps, then on with as many ranks or others: same samples, same bits."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import ROOT
from safetensors.numpy import load_file
from shard_sets import write_shard_set

from training.order import epoch_order

TRAIN = (10, 9, 9)  # 28 samples: 4 steps of 7, which neither 2 nor 4 ranks divide
STEPS = 8
# Everything that has a state: momentum, averages, batch norm's statistics.
WHOLE = {"model_batch_norm": True, "optim_ema_decay": 0.9, "checkpoint_steps": 3}


PLAIN = {"checkpoint_steps": 3, "dropout": False}


def random_kills(seed: int) -> list[int]:
    """Steps that a life reaches: later than the checkpoint that it starts from."""
    drawn, first = [], 0
    rng = random.Random(seed)
    while first < STEPS - 2 and len(drawn) < 3:
        drawn.append(rng.randint(first + 1, min(first + 5, STEPS - 1)))
        first = max([step for step in (3, 4, 6) if step < drawn[-1]], default=0)
    return drawn


# (number of ranks, killed after this step) for each life of a training
Lives = list[tuple[int, int | None]]
HISTORIES: dict[str, tuple[Lives, dict[str, Any]]] = {
    "1-whole": ([(1, None)], WHOLE),
    "2-whole": ([(2, None)], WHOLE),
    "1-killed-0": ([*((1, step) for step in random_kills(0)), (1, None)], WHOLE),
    "1-killed-1": ([*((1, step) for step in random_kills(1)), (1, None)], WHOLE),
    "2-killed-3": ([*((2, step) for step in random_kills(3)), (2, None)], WHOLE),
    "alone": ([(1, None)], PLAIN),
    "four": ([(4, None)], PLAIN),
    # Each life goes on, from step 4 or 6, with another number of ranks.
    "changing": ([(2, 5), (4, 7), (1, None)], PLAIN),
}


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints and logs of each history."""
    folder = tmp_path_factory.mktemp("killed")
    uri = write_shard_set(folder / "set", train=TRAIN, val=(7, 6))
    document = {
        str(folder / name): {"lives": lives, "changes": changes}
        for name, (lives, changes) in HISTORIES.items()
    }
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, str(ROOT / "tests" / "lives.py"), uri, json.dumps(document)],
        check=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": path},
    )
    return folder


def last(lived: Path, name: str) -> Path:
    return lived / name / f"step-{STEPS}"


def digests(keep: Path) -> dict[int, set[int]]:
    """What was said of the samples up to each step, in any life."""
    said: dict[int, set[int]] = {}
    for line in (keep / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "sample_digest" in row:
            said.setdefault(row["step"], set()).add(int(row["sample_digest"]))
    return said


def expected_digest(step: int) -> str:
    """By hand: a chain of sha256 over the number and sorted ids of each step."""
    running = b""
    for number in range(step):
        order = epoch_order(TRAIN, seed=0, epoch=number // 4)
        ids = sorted(order[number % 4 * 7 : number % 4 * 7 + 7].tolist())
        packed = b"".join(value.to_bytes(8, "little") for value in [number, *ids])
        running = hashlib.sha256(running + packed).digest()
    return running.hex()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", [name for name in HISTORIES if "-killed-" in name])
def test_killed_at_random_steps_ends_with_the_same_bits(lived, name):
    whole = files_of(last(lived, f"{name[0]}-whole"))
    assert {"model.safetensors", "raw.safetensors", "optimizer.safetensors"} <= whole.keys()
    assert files_of(last(lived, name)) == whole, HISTORIES[name][0]


def test_samples_of_every_step_are_the_same_for_any_ranks_through_kills(lived):
    wanted = {step: {int(expected_digest(step)[:12], 16)} for step in range(1, STEPS + 1)}
    for name in ("alone", "four", "changing"):  # steps that are repeated repeat their samples
        assert digests(lived / name) == wanted, name
        state = json.loads((last(lived, name) / "state.json").read_text())
        assert state["samples"] == expected_digest(STEPS), name


def test_other_ranks_after_a_kill_learn_the_same_but_for_the_last_bits(lived):
    alone = load_file(last(lived, "alone") / "model.safetensors")
    for name in ("four", "changing"):
        found = load_file(last(lived, name) / "model.safetensors")
        for key, value in alone.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-5, err_msg=key)
