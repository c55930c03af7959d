"""The driver's part of Ctrl-C: whom it asks, how long it waits, what it says; see also test_loop.py
and faults/test_train_ray.py, where the whole of it happens."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from made_checkpoints import made

from alexnet.errors import UserError
from pipelines import command
from training import lease, stop
from training.stop import Stopped


@pytest.fixture
def writer(tmp_path: Path) -> lease.Lease:
    return lease.held(str(tmp_path / "run"))


def pressed(
    monkeypatch: pytest.MonkeyPatch,
    writer: lease.Lease,
    begun: Callable[[threading.Event], bool],
    times: int = 1,
) -> BaseException:
    """What fit raises when Ctrl-C comes in the middle of a training that ends once it is asked to.
    begun: what the workers do with the question, in the place of those of Ray."""
    saved = threading.Event()
    pressed_again = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])

    def ask(token: str) -> bool:
        assert token == writer.token
        if times > 1:
            pressed_again.start()
        return begun(saved)

    monkeypatch.setattr(stop, "ask_to_stop", ask)
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with command.raised(), pytest.raises(BaseException) as left:
        stop.fit(lambda: saved.wait(60), writer)
    saved.set()
    return left.value


def test_workers_that_save_end_it_and_their_step_is_told(monkeypatch, writer):
    def begun(saved: threading.Event) -> bool:
        made(Path(writer.run) / "checkpoint-00000007-a", 7)
        saved.set()
        return True

    left = pressed(monkeypatch, writer, begun)
    assert isinstance(left, Stopped) and str(left) == "stopped at step 7, saved"


@pytest.mark.parametrize(("before", "told"), [(None, "none is stored"), (3, "step 3 is stored")])
def test_silent_workers_are_waited_for_as_long_as_is_said(
    monkeypatch, writer, caplog, before, told
):
    monkeypatch.setattr(stop, "_SECONDS", 0.5)
    caplog.set_level("INFO", "training")
    if before is not None:
        made(Path(writer.run) / f"checkpoint-{before:08d}-a", before)
    left = pressed(monkeypatch, writer, lambda saved: True)
    assert isinstance(left, Stopped)
    assert str(left) == f"no checkpoint could be saved in 0.5 s, {told}"
    assert "saving a checkpoint first (at most 0.5 s; Ctrl-C again ends at once)" in caplog.text


def test_before_workers_train_and_at_the_second_time_it_ends_at_once(monkeypatch, writer):
    assert type(pressed(monkeypatch, writer, lambda saved: False)) is KeyboardInterrupt
    assert type(pressed(monkeypatch, writer, lambda saved: True, times=2)) is KeyboardInterrupt


def test_head_that_does_not_answer_is_not_waited_for(monkeypatch, writer):
    monkeypatch.setattr(stop, "_ASK_SECONDS", 0.2)
    assert type(pressed(monkeypatch, writer, lambda saved: saved.wait(60))) is KeyboardInterrupt


def test_failure_while_it_stops_is_told_as_a_failure(monkeypatch, writer):
    def train() -> None:
        asked.wait(60)
        raise UserError("disk full")

    asked = threading.Event()
    monkeypatch.setattr(stop, "ask_to_stop", lambda token: asked.set() or True)
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with command.raised(), pytest.raises(UserError, match="disk full"):
        stop.fit(train, writer)


def test_training_ends_when_its_lease_is_lost(monkeypatch, writer):
    monkeypatch.setattr(writer, "_lost", "run x was taken over by y")
    with pytest.raises(lease.Superseded, match="taken over by y"):
        stop.fit(threading.Event().wait, writer)


@pytest.mark.parametrize(
    ("allowed", "seconds"), [(None, 1.0), ("3", 1.0), ("30", 28.0), ("600", 60.0), ("x", 1.0)]
)
def test_in_a_job_it_takes_what_ray_leaves_it(monkeypatch, allowed, seconds):
    assert stop.seconds_to_stop() == 60.0
    job = json.dumps({"metadata": {"job_submission_id": "j"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    if allowed is not None:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", allowed)
    assert stop.seconds_to_stop() == seconds
