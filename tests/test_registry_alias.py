"""Moving an alias: all or nothing, whatever fails."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drawn import ROOT
from gated import (
    AFTER,
    BEFORE,
    LOCK,
    TAGS,
    enter_bare_copy,
    locked,
    state,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from registered import MLFLOW_WARNINGS

from alexnet.errors import UserError
from training.registry import alias
from training.registry.alias import Refused, move, settle
from training.registry.versions import NAME, aliases

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture
def client(bare_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    return enter_bare_copy(bare_store, tmp_path, monkeypatch)


def test_alias_and_tags_change_together_and_nothing_is_left(client):
    assert state(client) == BEFORE
    move(client, "champion", "1", "2", TAGS)
    assert state(client) == AFTER and not locked(client)


def test_first_champion_moves_from_nowhere(client):
    client.delete_registered_model_alias(NAME, "champion")
    move(client, "champion", None, "2", TAGS)
    assert state(client) == AFTER


@pytest.mark.parametrize("now", ["3", None])
def test_alias_that_is_elsewhere_by_now_is_not_moved(client, now):
    client.delete_registered_model_alias(NAME, "champion")
    if now is not None:
        client.set_registered_model_alias(NAME, "champion", now)
    named = "none" if now is None else f"version {now}"
    with pytest.raises(Refused, match=f"changed from version 1 to {named} meanwhile; promote ag"):
        move(client, "champion", "1", "2", TAGS)
    assert state(client) == (now, BEFORE[1]) and not locked(client)


# Faults


class Faulty:
    """A client whose call number k fails, before or after the store did it. once: only that one;
    otherwise all later ones fail too, as of a server, or this process, that is gone."""

    def __init__(self, client: MlflowClient, k: int, *, done: bool, once: bool) -> None:
        self._client, self._k, self._done, self._once = client, k, done, once
        self.calls = 0

    def __getattr__(self, name: str):
        real = getattr(self._client, name)

        def call(*args, **kwargs):
            self.calls += 1
            if self.calls < self._k or (self._once and self.calls > self._k):
                return real(*args, **kwargs)
            if self.calls == self._k and self._done:
                real(*args, **kwargs)
            raise MlflowException(f"no answer to {name}")

        return call


def calls_of_a_move(client: MlflowClient) -> int:
    counting = Faulty(client, 10**6, done=False, once=True)
    move(counting, "champion", "1", "2", TAGS)
    return counting.calls


def test_a_fault_at_any_step_leaves_before_or_after_and_the_next_move_settles_it(
    client, monkeypatch
):
    steps = calls_of_a_move(client)
    assert steps > 6
    seen = set()
    for k in range(1, steps + 1):
        for done in (False, True):
            for once in (False, True):
                reset(client)
                faulty = Faulty(client, k, done=done, once=once)
                try:
                    move(faulty, "champion", "1", "2", TAGS)
                except MlflowException as error:
                    assert "no answer" in str(error), "the first failure is the one that is told"
                champion = aliases(client)["champion"]
                assert champion in ("1", "2"), f"call {k}"
                with monkeypatch.context() as patch:
                    patch.setattr(alias, "STALE_SECONDS", -1.0)
                    settle(client, "champion")
                assert state(client) == (BEFORE if champion == "1" else AFTER), f"call {k}"
                assert not locked(client)
                seen.add(champion)
    assert seen == {"1", "2"}


def reset(client: MlflowClient) -> None:
    if locked(client):
        client.delete_registered_model(LOCK)
    client.set_registered_model_alias(NAME, "champion", "1")
    alias.write_tags(client, "2", {"previous_champion": None, **BEFORE[1]})
    assert state(client) == BEFORE


KILLED_WHILE_MOVING = """
import os, signal, sys
from mlflow.tracking import MlflowClient
from training import tracking
from training.registry.alias import move

client = tracking.connect(tracking.tracking_uri())
real = getattr(client, sys.argv[1])

def then_die(*args, **kwargs):
    real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(client, sys.argv[1], then_die)
tags = {"gate": "passed", "previous_champion": "1", "gate_reason": None}
move(client, "champion", "1", "2", tags)
"""


@pytest.mark.parametrize(
    ("last", "expected", "told"),
    [
        (
            "set_model_version_tag",
            BEFORE,
            "undid an interrupted move of champion from version 1 to",
        ),
        ("set_registered_model_alias", AFTER, "finished an interrupted move"),
    ],
    ids=["before the alias moved", "after it"],
)
def test_killed_process_leaves_a_journal_that_the_next_move_settles(
    client, monkeypatch, caplog, last, expected, told
):
    command = [sys.executable, "-W", "ignore", "-c", KILLED_WHILE_MOVING, last]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert locked(client) and "unfinished" in alias.unfinished(client, "champion")
    monkeypatch.setattr(alias, "STALE_SECONDS", 0.5)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="training"):
        settle(client, "champion")
    assert time.monotonic() - began > 0.5, "it might have gone on"
    assert state(client) == expected and not locked(client)
    assert told in caplog.text and alias.unfinished(client, "champion") is None


def test_interrupted_move_is_undone_at_once(client, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "set_registered_model_alias", interrupted)
    with pytest.raises(KeyboardInterrupt):
        move(client, "champion", "1", "2", TAGS)
    assert state(client) == BEFORE and not locked(client)


def test_holder_that_slept_past_its_lease_moves_nothing(client, monkeypatch):
    monkeypatch.setattr(alias, "_LEASE_SECONDS", -1.0)
    with pytest.raises(UserError, match="others may have gone on; run the command again"):
        move(client, "champion", "1", "2", TAGS)
    assert state(client) == BEFORE and not locked(client)


def test_lock_of_somebody_else_is_not_released_by_a_late_holder(client):
    create, mine = client.create_registered_model, {}

    def then_settled_by_another(name, tags, description):
        create(name, tags=tags, description=description)
        client.delete_registered_model(name)
        create(name, tags=tags | {"holder": "another"}, description=description)
        mine.update(tags)

    client.create_registered_model = then_settled_by_another
    move(client, "champion", "1", "2", TAGS)
    assert client.get_registered_model(LOCK).tags["holder"] == "another" != mine["holder"]


def test_lost_answer_to_the_lock_is_recognised_as_ones_own(client):
    create = client.create_registered_model

    def sent_twice(name, **rest):
        create(name, **rest)
        create(name, **rest)

    client.create_registered_model = sent_twice
    move(client, "champion", "1", "2", TAGS)
    assert state(client) == AFTER and not locked(client)


def test_registered_model_that_is_no_journal_is_told(client):
    client.create_registered_model(LOCK)
    with pytest.raises(UserError, match=r"is no journal of a move .*delete it in MLflow"):
        settle(client, "champion")
