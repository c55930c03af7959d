"""Changes of the registry that are killed or find a full disk: nothing half is ever visible."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gated import enter_whole_copy
from mlflow.tracking import MlflowClient
from mortal import Life, lived
from registered import AGAIN, GOOD, GOOD_CONFIG, POOR, Built
from tmpfs import tmpfs

from pipelines.shards import load_manifest
from training import tracking
from training.metrics import Tracker
from training.registry import champions
from training.registry.versions import NAME, aliases, load, versions

# Command, champion before and after. What POOR lacks must never make it champion.
COMMANDS: list[tuple[list[str], str | None, str | None]] = [
    (["promote", GOOD], None, GOOD),
    (["promote", AGAIN], GOOD, AGAIN),
    (["promote", POOR], GOOD, GOOD),
    (["rollback"], AGAIN, GOOD),
]
KILLS = 3


@pytest.fixture
def client(registered_models: Built, home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    return enter_whole_copy(registered_models, home, monkeypatch)


@pytest.fixture
def registration(registered_models: Built) -> Callable[[MlflowClient], dict[str, str]]:
    """Of a new run, with all that it asks for."""

    def begun(client: MlflowClient) -> dict[str, str]:
        data, config = registered_models.data, dataclasses.replace(GOOD_CONFIG, name="killed")
        run_id = str(tracking.open_run(client, config, load_manifest(data), data).info.run_id)
        tracker = Tracker(tracking.tracking_uri(), run_id)
        tracker.log({"loss": 1.0, "top1": 0.5, "val_loss": 1.0, "val_top1": 0.5}, 1)
        tracker.wait()
        return {"run_id": run_id, "checkpoint": str(registered_models.checkpoint), "data": data}

    return begun


def check_visible(client: MlflowClient) -> None:
    """What anybody would find now."""
    for version in versions(client):
        assert load(f"models:/{NAME}/{version.version}")
    if champion := aliases(client).get("champion"):
        tags = client.get_model_version(NAME, champion).tags
        assert tags["gate"] == "passed" and "promoted_at" in tags
        load(f"models:/{NAME}@champion")


def check_registered(client: MlflowClient, run_id: str, there: int) -> None:
    check_visible(client)
    newest, *others = versions(client)
    assert len(others) == there and newest.run_id == run_id
    assert aliases(client)["candidate"] == str(newest.version)


def made_champion(client: MlflowClient, *numbers: str) -> None:
    """One after the other, as promotions leave them."""
    for place, number in enumerate(numbers):
        history = " ".join(numbers[:place]) or None
        before = numbers[place - 1] if place else None
        tags = {"gate": "passed", "promoted_at": "then", "previous_champion": before}
        champions.move_champion(client, before, number, tags | {"champions_before": history})


def test_killed_command_is_finished_by_the_same_again(attack, client, home):
    argv, before, after = COMMANDS[attack.seed % len(COMMANDS)]
    made_champion(client, *{None: [], GOOD: [GOOD], AGAIN: [GOOD, AGAIN]}[before])
    how: dict[str, Any] = {"argv": argv, "environment": {"ALEXNET_HOME": str(home)}}
    lives: list[Life] = []
    done = False  # as good as: a rollback that is over would be followed by another
    while len(lives) < KILLS and not done:
        instant: dict[str, Any] = {"after": attack.draw.uniform(0, 1.5)}
        if attack.draw.random() < 0.7:
            instant = {"watch": "mlflow", "at": attack.draw.randint(1, 60)}
        lives.append(lived("registry", **how, **instant))
        check_visible(client)
        now = aliases(client).get("champion")
        assert now in (before, after)
        done = argv == ["rollback"] and now == after
    if not done:
        lives.append(lived("registry", **how))
        assert lives[-1].status == int(POOR in argv), lives[-1].errors
    check_visible(client)
    assert aliases(client)["champion"] == after
    tags = client.get_model_version(NAME, argv[-1] if len(argv) > 1 else GOOD).tags
    assert tags["gate"] == ("refused" if POOR in argv else "passed")
    assert tags.get("champions_before") == (GOOD if AGAIN in argv else None)


def test_killed_registration_is_finished_by_the_same_again(attack, client, home, registration):
    there, how = len(versions(client)), registration(client)
    run_id, how["environment"] = how["run_id"], {"ALEXNET_HOME": str(home)}
    instants = [{"at": attack.draw.randint(1, 250)}, {"after": attack.draw.uniform(0, 5)}]
    lives = [lived("register", **how, **instants[attack.seed % 2])]
    check_visible(client)
    assert len(versions(client)) in (there, there + 1)
    lives.append(lived("register", **how))
    assert lives[-1].status == 0, lives[-1].errors
    check_registered(client, run_id, there)


@pytest.mark.parametrize("work", ["registry", "register"])
def test_full_disk_is_told_and_with_room_the_same_finishes(
    work, attack, registered_models, tmp_path, monkeypatch, registration
):
    with tmpfs(tmp_path / "disk", 1 << 28) as disk:
        home = disk.path / "home"
        client = enter_whole_copy(registered_models, home, monkeypatch)
        there, pages = len(versions(client)), attack.draw.randint(0, 60)
        how: dict[str, Any] = {"argv": ["promote", GOOD]}
        if work == "register":
            how, pages = registration(client), attack.draw.randint(1, 1500)
        filler = disk.fill(4096 * pages)
        life = lived(work, environment={"ALEXNET_HOME": str(home)}, **how)
        check_visible(client)
        if life.status != 0:
            life.check_refused()
        filler.unlink()
        life = lived(work, environment={"ALEXNET_HOME": str(home)}, **how)
        assert life.status == 0, life.errors
        check_visible(client)
        if work == "register":
            check_registered(client, how["run_id"], there)
        else:
            assert aliases(client)["champion"] == GOOD
