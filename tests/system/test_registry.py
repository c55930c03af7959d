"""The registry's commands: what each prints and how it ends, force, dry runs and the way back."""

import dataclasses
import hashlib
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from gated import FORCED, champion, content, enter_candidate_copy, files_of, tags
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from registered import AGAIN, FOREIGN, GOOD, GOOD_CONFIG, POOR, Built
from shard_sets import write_shard_set

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import tracking
from training.registry import __main__ as command
from training.registry import champions, gate
from training.registry.gate import Asked
from training.registry.package import register
from training.registry.versions import NAME, WEIGHTS, Refused, aliases, versions


@pytest.fixture
def client(registered_models: Built, home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    return enter_candidate_copy(registered_models, home, monkeypatch)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = command.main(list(words))
    told = capsys.readouterr()
    return code, told.out, told.err


# promote and rollback


def test_promote_prints_the_checks_and_the_new_champion_or_the_reason_in_one_line(client, capsys):
    code, out, err = printed(capsys, "promote")
    assert (code, err, champion(client)) == (0, "", GOOD)
    assert out.splitlines()[-1] == "version 1 is the champion: models:/alexnet@champion"
    assert re.search(r"^top-1 +1\.0000 +0\.4375 or more .* ok$", out, re.MULTILINE)
    assert printed(capsys, "promote") == (0, "version 1 is the champion already\n", "")
    code, out, err = printed(capsys, "promote", "--version", POOR)
    assert (code, champion(client)) == (1, GOOD)
    assert err.startswith("refused: ") and err.count("\n") == 1 and "champion: -0." in err
    assert "REFUSED" in out and "is the champion:" not in out


def test_json_of_promote_is_the_verdict(client, capsys):
    code, out, _ = printed(capsys, "promote", "--json", "--dry-run")
    found = json.loads(out)
    assert (code, found["outcome"], found["dry_run"], champion(client)) == (0, "passed", True, None)
    assert found["metrics"]["correct1"] == 13 and found["paired"] is None
    code, out, err = printed(capsys, "promote", FOREIGN, "--json")
    found = json.loads(out)
    assert (code, found["outcome"], found["metrics"]) == (1, "refused", None)
    assert err == f"refused: {found['reason']}\n"


def test_force_needs_a_reason(client, capsys):
    for words in (["--force"], ["--force", "--reason", " "]):
        code, _, err = printed(capsys, "promote", POOR, *words)
        assert code == 2 and err.startswith("error: --force needs a reason to record")
    code, out, _ = printed(capsys, "promote", POOR, "--force", "--reason", "for a demonstration")
    assert code == 0 and "forced: for a demonstration" in out and champion(client) == POOR


def test_rollback_tells_who_is_champion_again(client, capsys):
    for version in (GOOD, AGAIN):
        client.set_registered_model_alias(NAME, "champion", version)
    client.set_model_version_tag(NAME, AGAIN, "champions_before", GOOD)
    assert printed(capsys, "rollback", "--dry-run")[1] == (
        "version 1 would be the champion again, 2 would not\n"
    )
    assert champion(client) == AGAIN
    code, out, _ = printed(capsys, "rollback", "--json")
    assert (code, json.loads(out)) == (0, {"from": AGAIN, "to": GOOD, "dry_run": False})
    assert champion(client) == GOOD


# Past the gate by force, a dry run of it, and back to the champions before


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
    assert "cannot be scored" in found.reason and '--force --reason "…"' in found.reason
    assert gate.promote(client, str(made.version), FORCED).outcome == "forced"
    assert champion(client) == str(made.version)


def test_force_is_recorded_with_its_reason_where_it_was_needed(client):
    assert gate.promote(client, GOOD, FORCED).outcome == "passed"
    assert tags(client, GOOD)["gate"] == "passed"
    found = gate.promote(client, POOR, FORCED)
    assert (found.outcome, found.passed, champion(client)) == ("forced", False, POOR)
    remembered = tags(client, POOR)
    assert (remembered["gate"], remembered["gate_reason"]) == ("forced", FORCED.force)
    assert remembered["previous_champion"] == GOOD


@pytest.mark.parametrize(("version", "outcome"), [(GOOD, "passed"), (POOR, "refused")])
def test_dry_run_judges_and_changes_nothing(client, home, version, outcome):
    before = content(home)
    assert gate.promote(client, version, Asked(dry_run=True)).outcome == outcome
    assert content(home) == before


def test_rollback_goes_back_step_by_step_and_has_an_end(client, home):
    with pytest.raises(Refused, match="no champion to roll back"):
        champions.rollback(client)
    for version in (POOR, GOOD, AGAIN, GOOD):  # GOOD is champion twice
        gate.promote(client, version, FORCED)
    before = content(home)
    assert champions.rollback(client, dry_run=True) == (GOOD, AGAIN)
    assert content(home) == before
    for move in ((GOOD, AGAIN), (AGAIN, GOOD), (GOOD, POOR)):
        assert champions.rollback(client) == move
    assert champion(client) == POOR and "previous_champion" not in tags(client, POOR)
    with pytest.raises(Refused, match="champion 3 had none before it"):
        champions.rollback(client)


def test_rollback_to_changed_files_is_refused(client):
    gate.promote(client, POOR, FORCED)
    gate.promote(client, GOOD, Asked())
    (files_of(client, POOR) / WEIGHTS).write_bytes(b"")
    with pytest.raises(Refused, match=r"the champion before: .*/3: .*safetensors changed"):
        champions.rollback(client)
    assert champion(client) == GOOD


def test_model_of_another_name_has_versions_and_a_champion_of_its_own(
    client, registered_models, capsys
):
    gate.promote(client, POOR, FORCED)
    run_id = client.get_model_version(NAME, GOOD).run_id
    config = dataclasses.replace(GOOD_CONFIG, model_name="birds")
    manifest = load_manifest(registered_models.data)
    register(client, run_id, registered_models.checkpoint, manifest, config)
    first = client.get_model_version("birds", "1")
    client.create_model_version("birds", first.source, run_id, tags=first.tags)
    before = versions(client), aliases(client)
    of = ("--model", "birds")
    assert (
        "\nversion 1 is the champion: models:/birds@champion" in printed(capsys, "promote", *of)[1]
    )
    assert printed(capsys, "promote", "2", *of)[0] == 0
    assert aliases(client, "birds") == {"candidate": "1", "champion": "2"}
    assert printed(capsys, "rollback", *of)[1] == "version 1 is the champion again, 2 is not\n"
    assert len(printed(capsys, "list", *of)[1].splitlines()) == 3
    assert (versions(client), aliases(client)) == before
    code, out, err = printed(capsys, "list", "--model", "a/b")
    assert (code, out) == (2, "") and err.startswith("error: --model 'a/b' is not a name")


# Who, when and why


def test_history_tells_of_every_move_who_made_it_when_and_why(client, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "jane")
    job = {"metadata": {"job_submission_id": "raysubmit_7"}}
    jane = f"jane@{socket.gethostname()}"
    began = champions.now()
    assert printed(capsys, "promote", POOR, "--force", "--reason", "the first")[0] == 0
    assert printed(capsys, "promote", GOOD, "--reason", "it is better")[0] == 0
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert printed(capsys, "rollback", "--reason", "it\nis \x1b[7mslow")[0] == 0
    given, back = tags(client, GOOD), tags(client, POOR)
    assert (given["promoted_by"], given["gate_reason"]) == (jane, "it is better")
    assert (given["validation_status"], given["previous_champion"]) == ("approved", POOR)
    assert back["restored_by"] == f"{jane}, Ray job raysubmit_7"
    found = json.loads(printed(capsys, "history", "--json")[1])
    assert [(m["version"], m["how"], m["by"], m["why"]) for m in found] == [
        (POOR, "forced", jane, "the first"),
        (GOOD, "promoted", jane, "it is better"),
        (POOR, "restored", f"{jane}, Ray job raysubmit_7", "it\nis \x1b[7mslow"),
    ]
    times = [began, *(move["at"] for move in found), champions.now()]
    assert times == sorted(times) and given["promoted_at"] == times[2]
    _, *rows = printed(capsys, "history")[1].splitlines()
    assert [row.split()[1] for row in rows] == [POOR, GOOD, POOR]
    assert rows[2].endswith("  it is ?[7mslow")


def test_history_begins_with_what_an_earlier_release_left(client):
    client.set_model_version_tag(NAME, GOOD, "promoted_at", "2025-01-01T00:00:00+00:00")
    client.set_model_version_tag(NAME, AGAIN, "champions_before", f"{GOOD} 77")  # 77 was deleted
    client.set_registered_model_alias(NAME, "champion", AGAIN)
    gate.promote(client, GOOD, Asked())
    found = [(m["version"], m["at"] is None, m["by"] is None) for m in champions.moves(client)]
    first = [(GOOD, False, True), ("77", True, True), (AGAIN, True, True)]
    assert found == [*first, (GOOD, False, False)]
    client.set_model_version_tag(NAME, GOOD, "champion_moves", "[")
    with pytest.raises(UserError, match=r"of version 1 is not valid JSON .* delete it"):
        champions.moves(client)


# list and show


def test_list_shows_versions_newest_first_with_aliases_and_accuracy(client, capsys):
    printed(capsys, "promote", POOR, "--force", "--reason", "why")
    printed(capsys, "promote", GOOD)
    _, *rows = printed(capsys, "list")[1].splitlines()
    assert [row.split()[0] for row in rows] == [FOREIGN, POOR, AGAIN, GOOD]
    assert re.fullmatch(
        r"1 +candidate, champion +baseline +1\.0000 +passed +approved +good +3", rows[3]
    )
    assert re.fullmatch(r"2 +baseline +1\.0000 +pending +again", rows[2])
    found = json.loads(printed(capsys, "list", "--json")[1])
    assert found[3] == {
        "version": GOOD,
        "aliases": ["candidate", "champion"],
        "recipe": "baseline",
        "val_top1": 1.0,
        "gate": "passed",
        "validation_status": "approved",
        "run": "good",
        "previous_champion": POOR,
    }


def test_list_of_many_versions_asks_for_no_run_alone(client, capsys, monkeypatch):
    run_id = client.get_model_version(NAME, GOOD).run_id
    for _ in range(20):
        client.create_model_version(NAME, "somewhere", run_id)
    for name in ("get_run", "get_model_version"):
        monkeypatch.setattr(MlflowClient, name, lambda *_: pytest.fail("a query for each version"))
    found = json.loads(printed(capsys, "list", "--json")[1])
    assert len(found) == 24 and found[0]["run"] == "good"


def test_show_goes_back_to_the_run_the_code_and_the_shards(
    client, capsys, registered_models, tmp_path
):
    code, out, _ = printed(capsys, "show", "candidate")
    assert code == 0 and "run               good (" in out and "aliases           candidate" in out
    assert f"python -m pipelines inspect KEY --out {registered_models.data}" in out
    found = json.loads(printed(capsys, "show", GOOD, "--json")[1])
    assert (found["version"], found["aliases"]) == (GOOD, ["candidate"])
    assert found["tags"]["recipe"] == "baseline" and found["run"]["name"] == "good"
    assert found["config"]["optim.batch_size"] == str(GOOD_CONFIG.optim.batch_size)
    assert found["commit"] == tracking._commit() and found["code_sha256"] == tracking._code_sha256()
    folder = Path(registered_models.data)
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert found["data"]["manifest_sha256"] == digest and found["data"]["gone"] is None
    for shard in found["shards"]:
        content = (folder / f"{shard['name']}.tar").read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    assert sum(shard["samples"] for shard in found["shards"]) == 16 + 13
    other = write_shard_set(tmp_path / "other", train=(8, 8), val=(7, 6), seed=1)
    for data, told in ((other, "is another set now"), (str(tmp_path / "none"), "pass --data")):
        lost = json.loads(printed(capsys, "show", GOOD, "--json", "--data", data)[1])
        assert lost["shards"] is None and told in lost["data"]["gone"]


# What goes wrong


def test_empty_registry_has_no_candidate_and_an_empty_list(used_home, capsys):
    code, out, _ = printed(capsys, "list")
    assert code == 0 and len(out.splitlines()) == 1
    for words, expected in ((["promote"], 2), (["rollback"], 1), (["promote", "1"], 2)):
        code, out, err = printed(capsys, *words)
        assert (code, out, err.count("\n")) == (expected, "", 1)


def test_mlflow_that_fails_is_one_line(client, capsys, monkeypatch):
    def failing(*_):
        raise MlflowException("no answer\nand more lines")

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", failing)
    code, _, err = printed(capsys, "promote")
    assert (code, champion(client)) == (2, None)
    assert re.fullmatch(r"error: MLflow at sqlite:///\S+ .*\(no answer\).*\n", err)
