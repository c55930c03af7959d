"""What the gate passed and a policy wants approved: who may, and that nothing moves before."""

import json
from pathlib import Path

import pytest
from gated import champion, enter_candidate_copy, files_of, tags
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from registered import AGAIN, GOOD, POOR, Built

from training.registry import __main__ as command
from training.registry import champions
from training.registry.checks import SHIPPED
from training.registry.versions import NAME, WEIGHTS


@pytest.fixture
def client(registered_models: Built, home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """GOOD's trainer is jane, POOR is the champion."""
    client = enter_candidate_copy(registered_models, home, monkeypatch)
    client.set_tag(client.get_model_version(NAME, GOOD).run_id, "mlflow.user", "jane")
    client.set_registered_model_alias(NAME, "champion", POOR)
    return client


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "policy.toml"
    shipped = SHIPPED.read_text()
    path.write_text(shipped.replace("\napproval = false", "\napproval = true"))
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and the line that says why."""
    capsys.readouterr()
    code = command.main(list(words))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return code, err


def test_what_passed_waits_until_somebody_but_its_trainer_approves_it(client, policy, capsys):
    assert command.main(["promote", GOOD, "--policy", policy]) == 0
    out = capsys.readouterr().out
    assert "approve 1 --by NAME" in out and "is the champion:" not in out
    waiting = tags(client, GOOD)
    assert (champion(client), waiting["validation_status"]) == (POOR, "pending_approval")
    assert waiting["gate"] == "passed" and "promoted_at" not in waiting
    for name in ("jane", "Jane"):
        code, line = refusal(capsys, "approve", GOOD, "--by", name)
        assert code == 2 and f"cannot be approved by {name}: {name} trained it" in line
    assert (champion(client), tags(client, GOOD)) == (POOR, waiting)

    assert command.main(["approve", GOOD, "--by", "joe", "--reason", "seen"]) == 0
    assert capsys.readouterr().out == "version 1 is the champion: models:/alexnet@champion\n"
    found = tags(client, GOOD)
    assert (champion(client), found["validation_status"]) == (GOOD, "approved")
    assert found["approved_by"] == f"joe ({champions.actor()})"
    assert (found["previous_champion"], found["champions_before"]) == (POOR, POOR)
    last = champions.moves(client)[-1]
    assert (last["how"], last["by"], last["why"]) == ("approved", found["approved_by"], "seen")
    assert champions.rollback(client) == (GOOD, POOR)


def test_trainer_may_approve_where_the_policy_says_so(client, policy, capsys):
    command.main(["promote", GOOD, "--policy", policy])
    allowed = Path(policy).read_text().replace("may_be_trainer = false", "may_be_trainer = true")
    Path(policy).write_text(allowed)
    assert command.main(["approve", GOOD, "--by", "jane", "--policy", policy]) == 0
    assert champion(client) == GOOD


def test_what_the_gate_has_not_passed_is_approved_by_nobody(client, policy, capsys):
    for words in (["approve", GOOD], ["approve", GOOD, "--by", " "]):
        assert refusal(capsys, *words)[0] == 2
    code, line = refusal(capsys, "approve", AGAIN, "--by", "joe")
    assert (
        code == 2
        and "does not wait for approval (validation_status pending, gate not asked)" in line
    )
    client.set_registered_model_alias(NAME, "champion", GOOD)
    assert command.main(["promote", POOR, "--policy", policy]) == 1
    code, line = refusal(capsys, "approve", POOR, "--by", "joe")
    assert code == 2 and "(validation_status rejected, gate refused)" in line
    client.set_model_version_tag(NAME, POOR, "validation_status", "pending_approval")
    assert refusal(capsys, "approve", POOR, "--by", "joe")[0] == 2, "as a kill may leave it"
    assert champion(client) == GOOD


@pytest.mark.parametrize("change", ["champion", "files", "trainer"])
def test_what_changed_since_the_gate_is_not_approved(client, policy, capsys, change):
    command.main(["promote", GOOD, "--policy", policy])
    expected = POOR
    if change == "champion":
        expected, told = AGAIN, (1, "changed from version 3 to version 2 meanwhile")
        client.set_registered_model_alias(NAME, "champion", AGAIN)
    elif change == "files":
        told = (1, "model.safetensors changed")
        (files_of(client, GOOD) / WEIGHTS).write_bytes(b"")
    else:
        told = (2, "nobody knows who trained it")
        client.delete_tag(client.get_model_version(NAME, GOOD).run_id, "mlflow.user")
    code, line = refusal(capsys, "approve", GOOD, "--by", "joe")
    assert code == told[0] and told[1] in line
    assert champion(client) == expected
    assert tags(client, GOOD)["validation_status"] == "pending_approval"


def test_approval_that_broke_off_is_finished_by_the_same_again(client, policy, capsys, monkeypatch):
    command.main(["promote", GOOD, "--policy", policy])
    written = MlflowClient.set_model_version_tag

    def broken(self, name, version, key, value):
        if key == "validation_status":
            raise MlflowException("no answer")
        written(self, name, version, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_model_version_tag", broken)
        assert refusal(capsys, "approve", GOOD, "--by", "joe")[0] == 2
    assert champion(client) == POOR
    assert command.main(["approve", GOOD, "--by", "joe"]) == 0
    assert champion(client) == GOOD and len(champions.moves(client)) == 2


def test_verdict_of_what_waits_says_so_as_json(client, policy, capsys):
    assert command.main(["promote", GOOD, "--policy", policy, "--json", "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["approval"], champion(client)) == ("passed", True, POOR)
