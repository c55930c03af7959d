"""SIGKILL at any instant of what changes the registry: nothing half of it is ever visible."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gated import enter_whole_copy, locked
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mortal import Life, Mortals
from registered import AGAIN, GOOD, GOOD_CONFIG, MLFLOW_WARNINGS, POOR, Built

from pipelines.shards import load_manifest
from training import tracking
from training.registry import alias
from training.registry.gate import rollback
from training.registry.versions import NAME, aliases, load, verify, versions

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

# Of POOR the gate asks too much: what cannot pass must never be champion.
COMMANDS = [["promote", GOOD], ["promote", AGAIN], ["promote", POOR], ["rollback"]]
CHAMPIONS = [GOOD, AGAIN, AGAIN, GOOD]  # after each
KILLS = 2  # of each command


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    with Mortals("mortal_registry") as running:
        yield running


@pytest.fixture
def client(
    registered_models: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MlflowClient:
    return enter_whole_copy(registered_models, tmp_path / "home", monkeypatch)


def check_visible(client: MlflowClient) -> None:
    """What anybody would find now."""
    for version in versions(client):
        assert verify(client, version) == [], f"version {version.version}"
    for name, number in aliases(client).items():
        tags = client.get_model_version(NAME, number).tags
        if name == "champion":
            assert tags["gate"] == "passed" and "promoted_at" in tags
            load(f"models:/{NAME}@champion")


# Tags of the verdicts and moves after COMMANDS.
REMEMBERED = {
    GOOD: {"gate": "passed"},
    AGAIN: {"gate": "passed", "champions_before": GOOD, "previous_champion": GOOD},
    POOR: {"gate": "refused"},
}


def remembered(client: MlflowClient, number: str) -> dict[str, str]:
    tags = client.get_model_version(NAME, number).tags
    return {key: tags[key] for key in ("gate", *REMEMBERED[AGAIN]) if key in tags}


def test_killed_commands_are_finished_by_the_same_again(
    attack, mortals, client, registered_models, tmp_path, monkeypatch
):
    kills, lost = 0, 0.0
    monkeypatch.setattr(alias, "STALE_SECONDS", 0.2)
    for argv, expected in zip(COMMANDS, CHAMPIONS, strict=True):
        lives, before = [], aliases(client).get("champion")
        for _ in range(KILLS):
            how = {"after": attack.draw.uniform(0, 1.5)}
            if attack.draw.random() < 0.7:
                how = {"watch": "mlflow", "at": attack.draw.randint(1, 60)}
            lives.append(mortals.live("command", argv=argv, home=tmp_path / "home", **how))
            check_visible(client)
            assert aliases(client).get("champion") in (before, expected)
        kills += sum(life.killed for life in lives)
        lost += sum(life.seconds for life in lives if life.killed)
        moved = aliases(client).get("champion") == expected != before
        if not (argv == ["rollback"] and moved and not locked(client)):  # as good as done
            lives.append(mortals.live("command", argv=argv, home=tmp_path / "home"))
        check_visible(client)
        assert not locked(client)
        assert aliases(client)["champion"] == expected, (argv, lives)
    assert {number: remembered(client, number) for number in REMEMBERED} == REMEMBERED
    attack.survived("SIGKILL", "promote, rollback", faults=kills, seconds_lost=lost)


def register(mortals: Mortals, built: Built, home: Path, run_id: str, **how: Any) -> Life:
    checkpoint, data = str(built.checkpoint), built.data
    told = {"run_id": run_id, "checkpoint": checkpoint, "data": data}
    return mortals.live("register", watch="", home=home, **told, **how)


def test_killed_registration_is_finished_by_the_same_again(
    attack, mortals, client, registered_models, tmp_path
):
    data = registered_models.data
    config = dataclasses.replace(GOOD_CONFIG, name="killed")
    run = tracking.open_run(client, config, load_manifest(data), data)
    tracker = tracking.Tracker(tracking.tracking_uri(), run.info.run_id)
    tracker.log({"loss": 1.0, "top1": 0.5, "val_loss": 1.0, "val_top1": 0.5}, 1)
    there, lost = len(versions(client)), 0.0
    instants = [{"at": attack.draw.randint(1, 250)}, {"after": attack.draw.uniform(0, 6)}]
    lives = []
    for how in instants:
        home = tmp_path / "home"
        lives.append(register(mortals, registered_models, home, run.info.run_id, **how))
        check_visible(client)
        assert len(versions(client)) in (there, there + 1)
    lives.append(register(mortals, registered_models, home, run.info.run_id))
    assert lives[-1].status == 0, lives[-1].said
    check_visible(client)
    newest, *others = versions(client)
    assert len(others) == there and aliases(client)["candidate"] == str(newest.version)
    assert newest.run_id == run.info.run_id and load(f"models:/{NAME}@candidate")
    lost = sum(life.seconds for life in lives if life.killed)
    kills = sum(life.killed for life in lives)
    attack.survived("SIGKILL", "registration", faults=kills, seconds_lost=lost)


def test_rollback_that_was_killed_is_finished_once_and_goes_no_further(client, monkeypatch):
    monkeypatch.setattr(alias, "STALE_SECONDS", 0.2)
    for number, before in ((GOOD, None), (AGAIN, GOOD), (POOR, AGAIN)):
        history = {GOOD: "", AGAIN: GOOD, POOR: f"{GOOD} {AGAIN}"}[number]
        alias.move(client, "champion", before, number, {"champions_before": history or None})
    with monkeypatch.context() as patch:
        patch.setattr(alias, "_release", lambda *_: None)  # killed before it
        assert rollback(client) == (POOR, AGAIN)
    assert locked(client)
    assert rollback(client) == (POOR, AGAIN)
    assert aliases(client)["champion"] == AGAIN and not locked(client)
    assert rollback(client) == (AGAIN, GOOD)


def test_second_killed_move_leaves_the_tags_that_the_first_found(client, monkeypatch):
    monkeypatch.setattr(alias, "STALE_SECONDS", 0.2)
    client.set_model_version_tag(NAME, GOOD, "gate", "refused")
    for _ in range(2):
        with pytest.raises(MlflowException, match="gone"):
            alias.move(Dying(client), "champion", None, GOOD, {"gate": "passed"})
        assert locked(client)
        assert client.get_model_version(NAME, GOOD).tags["gate"] == "passed"
    alias.settle(client, "champion")
    assert client.get_model_version(NAME, GOOD).tags["gate"] == "refused"


def test_move_that_goes_on_is_not_settled_by_a_clock_that_is_ahead(client, monkeypatch):
    monkeypatch.setattr(alias.time, "time", lambda: 4e9)
    monkeypatch.setattr(alias, "STALE_SECONDS", 60.0)
    alias.move(client, "champion", None, GOOD, {})
    with monkeypatch.context() as patch:
        patch.setattr(alias, "_release", lambda *_: None)
        alias.move(client, "champion", GOOD, AGAIN, {})
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        client.delete_registered_model("alexnet-champion-move")  # as its holder does at last

    monkeypatch.setattr(alias.time, "sleep", nap)
    assert alias.settle(client, "champion") is None
    assert len(naps) == 1 and aliases(client)["champion"] == AGAIN


class Dying:
    """A client of a process that dies when it is about to set an alias."""

    def __init__(self, client: MlflowClient) -> None:
        self._client, self._dead = client, False

    def __getattr__(self, name: str) -> Any:
        self._dead |= name == "set_registered_model_alias"
        if self._dead:
            raise MlflowException("gone")
        return getattr(self._client, name)
