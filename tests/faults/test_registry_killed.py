"""SIGKILL at any instant of what changes the registry: nothing half of it is ever visible."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gated import enter_whole_copy
from mlflow.tracking import MlflowClient
from mortal import Life, Mortals
from registered import AGAIN, GOOD, MLFLOW_WARNINGS, POOR, Built
from registries import check_visible, new_run, register

from training.registry import gate
from training.registry.versions import NAME, aliases, load, versions

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]

# Command, champion before and after. What POOR lacks must never make it champion.
COMMANDS: list[tuple[list[str], str | None, str | None]] = [
    (["promote", GOOD], None, GOOD),
    (["promote", AGAIN], GOOD, AGAIN),
    (["promote", POOR], GOOD, GOOD),
    (["rollback"], AGAIN, GOOD),
]
KILLS = 3


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    with Mortals("mortal_registry") as running:
        yield running


@pytest.fixture
def client(
    registered_models: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MlflowClient:
    return enter_whole_copy(registered_models, tmp_path / "home", monkeypatch)


def made_champion(client: MlflowClient, *numbers: str) -> None:
    """One after the other, as promotions leave them."""
    for place, number in enumerate(numbers):
        history = " ".join(numbers[:place]) or None
        before = numbers[place - 1] if place else None
        tags = {"gate": "passed", "promoted_at": "then", "previous_champion": before}
        gate.move_champion(client, before, number, tags | {"champions_before": history})


def test_killed_command_is_finished_by_the_same_again(attack, mortals, client, tmp_path):
    argv, before, after = COMMANDS[attack.seed % len(COMMANDS)]
    made_champion(client, *{None: [], GOOD: [GOOD], AGAIN: [GOOD, AGAIN]}[before])
    lives: list[Life] = []
    done = False  # as good as: a rollback that is over would be followed by another
    while len(lives) < KILLS and not done:
        how = {"after": attack.draw.uniform(0, 1.5)}
        if attack.draw.random() < 0.7:
            how = {"watch": "mlflow", "at": attack.draw.randint(1, 60)}
        lives.append(mortals.live("command", argv=argv, home=tmp_path / "home", **how))
        check_visible(client)
        now = aliases(client).get("champion")
        assert now in (before, after)
        done = argv == ["rollback"] and now == after
    if not done:
        lives.append(mortals.live("command", argv=argv, home=tmp_path / "home"))
        assert lives[-1].status == int(POOR in argv), lives[-1].said
    check_visible(client)
    assert aliases(client)["champion"] == after
    tags = client.get_model_version(NAME, argv[-1] if len(argv) > 1 else GOOD).tags
    assert tags["gate"] == ("refused" if POOR in argv else "passed")
    assert tags.get("champions_before") == (GOOD if AGAIN in argv else None)
    lost = sum(life.seconds for life in lives if life.killed)
    kills = sum(life.killed for life in lives)
    attack.survived("SIGKILL", f"registry {argv[0]}", faults=kills, seconds_lost=lost)


def test_killed_registration_is_finished_by_the_same_again(
    attack, mortals, client, registered_models, tmp_path
):
    run_id = new_run(client, registered_models.data)
    there, home = len(versions(client)), tmp_path / "home"
    instants = [{"at": attack.draw.randint(1, 250)}, {"after": attack.draw.uniform(0, 5)}]
    lives = [register(mortals, registered_models, home, run_id, **instants[attack.seed % 2])]
    check_visible(client)
    assert len(versions(client)) in (there, there + 1)
    lives.append(register(mortals, registered_models, home, run_id))
    assert lives[-1].status == 0, lives[-1].said
    check_visible(client)
    newest, *others = versions(client)
    assert len(others) == there and aliases(client)["candidate"] == str(newest.version)
    assert newest.run_id == run_id and load(f"models:/{NAME}@candidate")
    lost = sum(life.seconds for life in lives if life.killed)
    kills = sum(life.killed for life in lives)
    attack.survived("SIGKILL", "registration", faults=kills, seconds_lost=lost)
