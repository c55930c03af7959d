"""The registry's command line: what each command prints, and how it ends."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from gated import champion, enter_candidate_copy
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from registered import AGAIN, FOREIGN, GOOD, GOOD_CONFIG, MLFLOW_WARNINGS, POOR, Built
from shard_sets import write_shard_set

from training import tracking
from training.registry import __main__ as command
from training.registry import gate
from training.registry.versions import NAME

pytestmark = [pytest.mark.filterwarnings(line) for line in MLFLOW_WARNINGS]


@pytest.fixture
def client(registered_models: Built, home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    return enter_candidate_copy(registered_models, home, monkeypatch)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = command.main(list(words))
    told = capsys.readouterr()
    return code, told.out, told.err


# promote and rollback


def test_promote_prints_the_checks_and_the_new_champion(client, capsys):
    code, out, err = printed(capsys, "promote")
    assert (code, err, champion(client)) == (0, "", GOOD)
    assert out.splitlines()[-1] == "version 1 is the champion: models:/alexnet@champion"
    assert re.search(r"^top-1 +1\.0000 +0\.4375 or more .* ok$", out, re.MULTILINE)
    assert printed(capsys, "promote") == (0, "version 1 is the champion already\n", "")


def test_refusal_prints_all_checks_and_the_reason_in_one_line(client, capsys):
    printed(capsys, "promote")
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


def test_force_needs_a_reason_and_a_reason_force(client, capsys):
    for words in (["--force"], ["--reason", "why"], ["--force", "--reason", " "]):
        code, _, err = printed(capsys, "promote", POOR, *words)
        assert code == 2 and err.startswith("error: --force and --reason go together")
    code, out, _ = printed(capsys, "promote", POOR, "--force", "--reason", "for a demonstration")
    assert code == 0 and "forced: for a demonstration" in out and champion(client) == POOR


def test_rollback_tells_who_is_champion_again(client, capsys):
    code, _, err = printed(capsys, "rollback")
    assert code == 1 and err.startswith("refused: there is no champion to roll back")
    printed(capsys, "promote", GOOD)
    printed(capsys, "promote", AGAIN)
    assert printed(capsys, "rollback", "--dry-run")[1] == (
        "version 1 would be the champion again, 2 would not\n"
    )
    assert champion(client) == AGAIN
    code, out, _ = printed(capsys, "rollback", "--json")
    assert (code, json.loads(out)) == (0, {"from": AGAIN, "to": GOOD, "dry_run": False})
    assert champion(client) == GOOD


# list and show


def test_list_shows_versions_newest_first_with_aliases_and_accuracy(client, capsys):
    printed(capsys, "promote", POOR, "--force", "--reason", "why")
    printed(capsys, "promote", GOOD)
    code, out, _ = printed(capsys, "list")
    head, *rows = out.splitlines()
    assert code == 0 and head.split()[:4] == ["version", "alias", "recipe", "val"]
    assert [row.split()[0] for row in rows] == [FOREIGN, POOR, AGAIN, GOOD]
    assert re.fullmatch(r"1 +candidate, champion +baseline +1\.0000 +passed +good +3", rows[3])
    assert re.fullmatch(r"2 +baseline +1\.0000 +again", rows[2])
    found = json.loads(printed(capsys, "list", "--json")[1])
    assert found[3] == {
        "version": GOOD,
        "aliases": ["candidate", "champion"],
        "recipe": "baseline",
        "val_top1": 1.0,
        "gate": "passed",
        "run": "good",
        "previous_champion": POOR,
    }


def test_list_of_many_versions_takes_few_queries(client, capsys, monkeypatch):
    run_id = client.get_model_version(NAME, GOOD).run_id
    for _ in range(40):
        client.create_model_version(NAME, "somewhere", run_id)
    calls = []
    for name in ("get_run", "search_runs", "search_model_versions", "get_model_version"):
        real = getattr(MlflowClient, name)

        def counting(self, *args, real=real, name=name, **rest):
            calls.append(name)
            return real(self, *args, **rest)

        monkeypatch.setattr(MlflowClient, name, counting)
    assert len(json.loads(printed(capsys, "list", "--json")[1])) == 44
    assert sorted(calls) == ["search_model_versions", "search_runs"]


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


def test_empty_registry_has_no_candidate_and_an_empty_list(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'empty' / 'mlflow.db'}")
    code, out, _ = printed(capsys, "list")
    assert code == 0 and len(out.splitlines()) == 1
    for words, expected in ((["promote"], 2), (["rollback"], 1), (["promote", "1"], 2)):
        code, out, err = printed(capsys, *words)
        assert (code, out, err.count("\n")) == (expected, "", 1)


def test_interruption_ends_with_130(client, capsys, monkeypatch):
    def interrupted(*args, **rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(gate, "score", interrupted)
    code, out, err = printed(capsys, "promote")
    assert (code, out) == (130, "") and err.startswith("interrupted")


def test_mlflow_that_fails_at_any_call_of_promote_leaves_before_or_after(
    client, capsys, monkeypatch
):
    """The verdict is taken once and given again: the calls around it are what fails here."""
    version = gate.resolve(client, GOOD)
    judged = gate._judge(version, gate.run_of(client, version), None, gate.Asked())
    monkeypatch.setattr(gate, "_judge", lambda *args: judged)
    k, outcomes = 0, set()
    while True:
        k += 1
        failing = Failing(client, k)
        monkeypatch.setattr(tracking, "connect", lambda uri, failing=failing: failing)
        code, _, err = printed(capsys, "promote")
        outcomes.add((code, champion(client)))
        if failing.calls < k:
            break
        assert code == 2 and err.splitlines()[-1].startswith("error: MLflow at sqlite:///")
        assert "(no answer)" in err and "Traceback" not in err
        if champion(client) is not None:
            client.delete_registered_model_alias(NAME, "champion")
    assert outcomes >= {(2, None), (0, GOOD)} and k > 10


class Failing:
    """A client whose call number k fails; `calls` counts."""

    def __init__(self, client: MlflowClient, k: int) -> None:
        self._client, self._k, self.calls = client, k, 0

    def __getattr__(self, name: str):
        def call(*args, **rest):
            self.calls += 1
            if self.calls == self._k:
                raise MlflowException("no answer\nand more lines")
            return getattr(self._client, name)(*args, **rest)

        return call
