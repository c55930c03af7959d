"""Past the gate by force, a dry run of it, and back to the champions before."""

import shutil
from pathlib import Path

import pytest
from gated import FORCED, champion, content, enter_candidate_copy, files_of, tags
from mlflow.tracking import MlflowClient
from registered import AGAIN, GOOD, MLFLOW_WARNINGS, POOR, Built

from training.registry import gate
from training.registry.gate import Asked
from training.registry.versions import NAME, WEIGHTS, Refused

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture
def client(registered_models: Built, home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    return enter_candidate_copy(registered_models, home, monkeypatch)


def test_champion_that_cannot_be_scored_needs_force(client):
    gate.promote(client, GOOD, Asked())
    copy = shutil.copytree(files_of(client, GOOD), files_of(client, GOOD).parent / "copy")
    made = client.create_model_version(
        NAME, str(copy), client.get_model_version(NAME, AGAIN).run_id, tags=tags(client, AGAIN)
    )
    (files_of(client, GOOD) / WEIGHTS).unlink()
    found = gate.promote(client, str(made.version), Asked())
    assert found.outcome == "refused" and champion(client) == GOOD
    assert [check.name for check in found.checks if not check.passed] == ["champion"]
    assert "cannot be scored" in found.reason
    assert '--force --reason "…"' in found.reason
    assert gate.promote(client, str(made.version), FORCED).outcome == "forced"
    assert champion(client) == str(made.version)


def test_force_is_recorded_with_its_reason(client):
    gate.promote(client, GOOD, Asked())
    found = gate.promote(client, POOR, FORCED)
    assert (found.outcome, found.passed, champion(client)) == ("forced", False, POOR)
    remembered = tags(client, POOR)
    assert (remembered["gate"], remembered["gate_reason"]) == ("forced", FORCED.force)
    assert remembered["previous_champion"] == GOOD


def test_force_that_was_not_needed_is_a_pass(client):
    assert gate.promote(client, GOOD, FORCED).outcome == "passed"
    assert tags(client, GOOD)["gate"] == "passed"


# A dry run, and back


@pytest.mark.parametrize(("version", "outcome"), [(GOOD, "passed"), (POOR, "refused")])
def test_dry_run_judges_and_changes_nothing(client, home, version, outcome):
    before = content(home)
    assert gate.promote(client, version, Asked(dry_run=True)).outcome == outcome
    assert content(home) == before


def test_rollback_goes_back_step_by_step_and_has_an_end(client, home):
    with pytest.raises(Refused, match="no champion to roll back"):
        gate.rollback(client)
    for version in (POOR, GOOD, AGAIN, GOOD):  # GOOD is champion twice
        gate.promote(client, version, FORCED)
    before = content(home)
    assert gate.rollback(client, dry_run=True) == (GOOD, AGAIN)
    assert content(home) == before
    assert gate.rollback(client) == (GOOD, AGAIN)
    assert gate.rollback(client) == (AGAIN, GOOD)
    assert gate.rollback(client) == (GOOD, POOR)
    assert champion(client) == POOR and "previous_champion" not in tags(client, POOR)
    with pytest.raises(Refused, match="champion 3 had none before it"):
        gate.rollback(client)


def test_rollback_to_changed_files_is_refused(client):
    gate.promote(client, POOR, FORCED)
    gate.promote(client, GOOD, Asked())
    (files_of(client, POOR) / WEIGHTS).write_bytes(b"")
    with pytest.raises(Refused, match=r"the champion before: .*/3: .*safetensors changed"):
        gate.rollback(client)
    assert champion(client) == GOOD
