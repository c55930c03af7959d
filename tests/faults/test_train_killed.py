"""SIGKILL at any instant of a training and of its checkpoints: the bits of one that was not."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import Attack
from mortal import Mortals
from shard_sets import write_shard_set
from trainings import STEPS, Training, check_same_as

KILLS = 5


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are written first."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def mortals(temporary: Path) -> Iterator[Mortals]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        with Mortals("mortal_training") as running:
            yield running


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("killed")
    return write_shard_set(folder / "set", train=(10, 9, 9), val=(7, 6))


@pytest.fixture(scope="module")
def whole(mortals: Mortals, uri: str, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training that nobody disturbed."""
    training = Training(mortals, uri, tmp_path_factory.mktemp("whole") / "training")
    life = training.live(watch="checkpoint-")
    assert life.status == 0, life.said
    assert json.loads(training.files["state.json"])["step"] == STEPS
    return training


@pytest.fixture
def training(mortals: Mortals, uri: str, tmp_path: Path) -> Training:
    return Training(mortals, uri, tmp_path / "training")


@pytest.mark.first
def test_killed_at_any_instant_a_training_ends_with_the_same_bits(attack, whole, training):
    # Later lives begin later in the training: they reach its end before those of the first do.
    longest = 0.7 * whole.lives[0].seconds
    while len(training.lives) < KILLS:
        if not training.live(after=attack.draw.uniform(0, longest)).killed:
            break
    check_survived(attack, "training", whole, training)


def test_killed_between_two_files_of_a_checkpoint_takes_nothing_half_written(
    attack, whole, training
):
    operations = whole.lives[0].operations
    assert operations > 50, "saving and uploading were not seen"
    while len(training.lives) < KILLS:
        instant = attack.draw.randint(1, operations // 2)
        if not training.live(watch="checkpoint-", at=instant).killed:
            break
    check_survived(attack, "checkpoint", whole, training)


def check_survived(attack: Attack, place: str, whole: Training, training: Training) -> None:
    """After the same command once more, where the last life was killed."""
    kills = sum(life.killed for life in training.lives)
    if training.lives[-1].killed:
        assert training.live().status == 0, training.lives[-1].said
    check_same_as(whole, training)
    lost = max(0.0, training.seconds - whole.seconds)
    attack.survived("SIGKILL", place, faults=kills, seconds_lost=lost)


def test_nothing_is_left_of_what_was_killed_in_its_first_file(whole, training, temporary):
    left = training.run / "checkpoint-00000003-0a0a0a"
    left.mkdir(parents=True)
    (left / ".another-host~1~hashes.json.x.tmp").write_bytes(b"half")
    assert training.live(watch="checkpoint-", at=3).killed
    assert list(temporary.glob("checkpoint-*")), "it was killed while it saved"
    assert training.live().status == 0
    assert not list(temporary.glob("checkpoint-*"))
    check_same_as(whole, training)
