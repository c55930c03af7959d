"""Trainings on shards and checkpoints of a bad store: the undisturbed one's weights in the end."""

import os

import pytest
from bad_store import weather_of
from made_checkpoints import made
from store_proxy import FAULTS, FLIPS, Weather
from trainings import EVERY, STEPS, Training

from pipelines import storage
from training import checkpoint

pytestmark = pytest.mark.usefixtures("home")

_MOST_LIVES = 12


def test_a_training_with_checkpoints_on_a_bad_store_learns_the_same(
    attack, proxy, bucket, whole: Training, home, tmp_path
):
    for name, _ in storage.list_files(whole.uri):
        storage.write(f"{bucket}/set/{name}", storage.read(f"{whole.uri}/{name}"))
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    how = {"environment": settings | {"ALEXNET_HOME": str(home)}, "patience": 60}
    training = Training(f"{bucket}/set", tmp_path / "training", f"{bucket}/run")
    proxy.foul(weather := weather_of(attack, (*FAULTS, *FLIPS)))
    for life in range(_MOST_LIVES):
        proxy.weather = weather if life < _MOST_LIVES - 1 else Weather()
        after = attack.draw.uniform(0.5, 2) * whole.lives[0].seconds if life < 2 else None
        if training.live(after=after, **how).status == 0:
            break
        if not training.lives[-1].killed:
            training.lives[-1].check_refused()
    assert proxy.faults or attack.seed  # later runs have a single kind
    proxy.fair()
    training.check_learned_as(whole)
    again = sum("loss" in line for line in training.lines) - STEPS
    assert again <= (len(training.lives) - 1) * 2 * EVERY, "what was not yet uploaded at most"


def test_a_checkpoint_that_was_deleted_since_it_was_listed_is_passed_over(
    bucket, tmp_path, monkeypatch
):
    for step in (1, 2):
        made(tmp_path / "run" / f"checkpoint-0000000{step}-a", step)
    uploaded = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for path in uploaded:
        storage.write(f"{bucket}/{path.relative_to(tmp_path)}", path.read_bytes())
    run, newest = f"{bucket}/run", f"{bucket}/run/checkpoint-00000002-a"
    earlier = {uri: storage.list_files(uri) for uri in (run, newest)}
    for name, _ in earlier[newest]:
        storage.delete(f"{newest}/{name}")
    now = storage.list_files
    monkeypatch.setattr(storage, "list_files", lambda uri: earlier.get(uri) or now(uri))
    with checkpoint.newest_good(run) as found:
        assert found is not None and checkpoint.load_state(found)["step"] == 1
