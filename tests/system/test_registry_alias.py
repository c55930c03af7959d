"""Moving the champion: a fault or a kill anywhere leaves the one before or the one after."""

import shutil
from pathlib import Path

import pytest
from gated import champion, tags
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from training import tracking
from training.registry import champions, gate
from training.registry.champions import move_champion
from training.registry.versions import NAME, Refused

# What a move of the champion from 1 to 2 with TAGS begins and ends with, as `state` tells it.
TAGS = {"gate": "passed", "previous_champion": "1", "gate_reason": None}
BEFORE = ("1", {"gate": "refused", "gate_reason": "worse"})
AFTER = ("2", {"gate": "passed", "previous_champion": "1"})


@pytest.fixture(scope="module")
def bare_store(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions without content; 1 is the champion, 2 was refused once."""
    store = shutil.copy(empty_store, tmp_path_factory.mktemp("bare"))
    client = MlflowClient(f"sqlite:///{store}", f"sqlite:///{store}")
    client.create_registered_model(NAME)
    for _ in range(3):
        client.create_model_version(NAME, "/nowhere")
    client.set_registered_model_alias(NAME, "champion", "1")
    client.set_model_version_tag(NAME, "2", "gate", "refused")
    client.set_model_version_tag(NAME, "2", "gate_reason", "worse")
    return store


@pytest.fixture
def client(bare_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(bare_store, tmp_path)}")
    return tracking.connect(tracking.tracking_uri())


def state(client: MlflowClient) -> tuple[str | None, dict[str, str]]:
    """The champion and the tags of version 2."""
    return champion(client), tags(client, "2")


def test_alias_and_tags_change_together(client):
    assert state(client) == BEFORE
    move_champion(client, "1", "2", TAGS)
    assert state(client) == AFTER
    client.delete_registered_model_alias(NAME, "champion")
    move_champion(client, None, "2", TAGS)
    assert state(client) == AFTER


@pytest.mark.parametrize("now", ["3", None])
def test_champion_that_is_another_by_now_is_not_moved(client, now):
    client.delete_registered_model_alias(NAME, "champion")
    if now is not None:
        client.set_registered_model_alias(NAME, "champion", now)
    named = "none" if now is None else f"version {now}"
    with pytest.raises(Refused, match=f"changed from version 1 to {named} meanwhile; promote ag"):
        move_champion(client, "1", "2", TAGS)
    assert state(client) == (now, BEFORE[1])


def test_champion_that_changes_while_tags_are_written_is_not_moved(client, monkeypatch):
    write = champions.write_tags

    def and_another_comes(*args):
        write(*args)
        client.set_registered_model_alias(NAME, "champion", "3")

    monkeypatch.setattr(champions, "write_tags", and_another_comes)
    with pytest.raises(Refused, match="changed from version 1 to version 3 meanwhile"):
        move_champion(client, "1", "2", TAGS)
    assert champion(client) == "3"


def test_champion_that_changes_while_it_is_judged_against_is_not_moved(client, monkeypatch):
    def judged(candidate, run, before, asked):
        client.set_registered_model_alias(NAME, "champion", "3")  # by somebody else
        check = gate.Check("files", "as registered", "as registered", True)
        return gate.Verdict(str(candidate.version), before, champions.now(), "", None, (check,))

    monkeypatch.setattr(gate, "_judge", judged)
    with pytest.raises(Refused, match="changed from version 1 to version 3 meanwhile"):
        gate.promote(client, "2", gate.Asked())
    assert state(client) == ("3", BEFORE[1])


class Faulty:
    """A client whose call number k fails, before or after the store did it, and all later ones."""

    def __init__(self, client: MlflowClient, k: int, *, done: bool) -> None:
        self._client, self._k, self._done, self.calls = client, k, done, 0

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls < self._k or (self.calls == self._k and self._done):
                answer = getattr(self._client, name)(*args, **kwargs)
            if self.calls >= self._k:
                raise MlflowException(f"no answer to {name}")
            return answer

        return call


def test_a_fault_at_any_step_leaves_before_or_after_and_the_same_again_completes_it(client):
    counting = Faulty(client, 10**6, done=False)
    move_champion(counting, "1", "2", TAGS)
    seen = set()
    for k in range(1, counting.calls + 1):
        for done in (False, True):
            client.set_registered_model_alias(NAME, "champion", "1")
            champions.write_tags(client, NAME, "2", {"previous_champion": None, **BEFORE[1]})
            with pytest.raises(MlflowException, match="no answer"):
                move_champion(Faulty(client, k, done=done), "1", "2", TAGS)
            seen.add(held := champion(client))
            assert held == "1" or state(client) == AFTER, f"call {k}"
            move_champion(client, held, "2", TAGS)
            assert state(client) == AFTER
    assert seen == {"1", "2"} and counting.calls > 4
