"""The gate on real MLflow versions of small models: what it lets through, and what it says."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from gated import FORCED, champion, enter_candidate_copy, files_of, tags
from mlflow.tracking import MlflowClient
from registered import AGAIN, FOREIGN, GOOD, GOOD_CONFIG, POOR, Built
from shard_sets import write_shard_set
from small_training import CPU

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import checkpoint, tracking
from training.evaluate import evaluate
from training.loader import Loader
from training.network import build_model, input_spec
from training.registry import champions, gate
from training.registry.checks import SHIPPED
from training.registry.gate import Asked, Verdict
from training.registry.versions import DESCRIPTION, NAME, WEIGHTS

CHECKS = ["files", "signature", "data set", "classes", "as logged", "top-1", "worst class"]
CHECKS += ["latency", "size", "as used"]


@pytest.fixture
def client(registered_models: Built, home: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    return enter_candidate_copy(registered_models, home, monkeypatch)


def failed(found: Verdict) -> list[str]:
    return [check.name for check in found.checks if not check.passed]


def refused(client: MlflowClient, version: str | None, asked: Asked = Asked()) -> Verdict:  # noqa: B008
    """The verdict of a promotion that must change nothing but the tags of the version."""
    before = champion(client)
    found = gate.promote(client, version, asked)
    assert found.outcome == "refused" and champion(client) == before
    assert "\n" not in found.reason
    remembered = tags(client, found.version)
    assert (remembered["gate"], remembered["gate_reason"]) == ("refused", found.reason[:500])
    assert remembered["validation_status"] == "rejected" and "promoted_at" not in remembered
    return found


# What passes


def test_first_champion_is_measured_anew_and_promoted(client, registered_models):
    found = gate.promote(client, None, Asked())
    assert (found.outcome, found.champion_before, champion(client)) == ("passed", None, GOOD)
    manifest = load_manifest(registered_models.data)
    model = build_model(GOOD_CONFIG, 4).eval()
    model.load_state_dict(checkpoint.load_tensors(registered_models.checkpoint, "model"))
    with Loader(registered_models.data, manifest, "val", threads=1, cache_gb=1) as loader:
        own = evaluate(model, loader, input_spec(manifest, GOOD_CONFIG), device=CPU)
    assert own.top1 == 1.0 and found.metrics.images == 13
    assert (found.metrics.correct1, found.metrics.correct5) == (own.correct1, own.correct5)
    assert found.metrics.loss == pytest.approx(own.loss, rel=1e-4)
    remembered = tags(client, GOOD)
    assert (remembered["gate"], float(remembered["gate_val_top1"])) == ("passed", own.top1)
    assert remembered["promoted_at"] == found.at
    assert not {"previous_champion", "gate_reason"} & remembered.keys()
    assert gate.promote(client, None, Asked()) is None, "it is the champion already"


def test_verdict_lies_with_the_run_as_json_and_as_a_table(client, tmp_path):
    found = gate.promote(client, None, Asked())
    run_id = client.get_model_version(NAME, GOOD).run_id
    names = sorted(file.path for file in client.list_artifacts(run_id, "gate"))
    assert [re.sub(r"\d{8}T\d{6}Z", "UTC", name) for name in names] == [
        "gate/verdict-v1-UTC.json",
        "gate/verdict-v1-UTC.txt",
    ]
    paths = [Path(client.download_artifacts(run_id, name, str(tmp_path))) for name in names]
    document = json.loads(paths[0].read_text())
    assert (document["version"], document["outcome"], document["forced"]) == ("1", "passed", False)
    assert document["manifest_sha256"] == found.manifest_sha256
    told = {check["name"]: check["passed"] for check in document["checks"]}
    assert told == dict.fromkeys(CHECKS, True)
    lines = paths[1].read_text().splitlines()
    assert lines[0].startswith("version 1 as the first champion, on the val split of")
    assert [line.split()[-1] for line in lines[2:]] == ["ok"] * len(found.checks)


def test_equal_model_is_no_worse_and_takes_over(client):
    gate.promote(client, GOOD, Asked())
    found = gate.promote(client, AGAIN, Asked())
    assert champion(client) == AGAIN and tags(client, AGAIN)["previous_champion"] == GOOD
    assert found.checks[-1].name == "champion" and "the same answers" in found.checks[-1].value
    assert (found.paired.only_first, found.paired.only_second, found.paired.p) == (0, 0, 1.0)
    assert found.champion_metrics == found.metrics


def test_better_model_takes_over(client):
    gate.promote(client, POOR, FORCED)
    found = gate.promote(client, GOOD, Asked())
    assert champion(client) == GOOD and found.paired.low > 0
    assert found.paired.only_first == 13 - found.champion_metrics.correct1


# The best champion so far


@pytest.fixture
def worse(client: MlflowClient) -> str:
    """GOOD was the champion, POOR is it; a version with the answers of POOR."""
    poor = client.get_model_version(NAME, POOR)
    made = client.create_model_version(NAME, poor.source, poor.run_id, tags=poor.tags)
    for version in (GOOD, POOR):
        gate.promote(client, version, FORCED)
    assert champion(client) == POOR
    return str(made.version)


def test_no_worse_than_the_champion_is_refused_where_the_best_so_far_was_better(client, worse):
    seen = gate.promote(client, worse, Asked(dry_run=True))
    found = refused(client, worse)
    assert (seen.outcome, seen.checks) == ("refused", found.checks)
    by_name = {check.name: check for check in found.checks}
    assert by_name["champion"].passed and "the same answers" in by_name["champion"].value
    assert f"best champion, {GOOD}" in failed(found) and found.best_before == GOOD
    good, poor = found.best_metrics, found.champion_metrics
    assert found.best_paired.difference == pytest.approx(poor.top1 - good.top1)
    assert found.paired.difference == 0 and found.best_paired.only_first == 0
    assert f"against champion {POOR} and {GOOD}, the best so far" in found.table()


def test_policy_may_forget_the_best_champion(client, worse, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text(SHIPPED.read_text().replace("best_champion = true", "best_champion = false"))
    found = refused(client, worse, Asked(policy=str(policy)))
    assert found.best_before is None and found.checks[-1].name == "champion"
    assert "champion" not in failed(found)


def test_best_champion_whose_files_changed_is_refused_in_a_line_unless_forced(client, worse):
    path = files_of(client, GOOD) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    found = refused(client, worse)
    check = found.checks[-1]
    assert check.name == f"best champion, {GOOD}" and check.value.startswith("cannot be scored: ")
    assert "not those that were registered" in check.value and "--force" in check.limit
    assert gate.promote(client, worse, FORCED).outcome == "forced"


def test_deleted_champions_are_told_and_the_best_of_the_others_counts(client, worse):
    client.delete_model_version(NAME, GOOD)
    found = refused(client, worse)
    assert found.best_before is None and f"{GOOD} deleted" in found.checks[-1].value
    assert found.checks[-1].passed and "champion" not in failed(found)


def test_champion_that_a_rollback_took_back_is_not_among_the_best(client):
    for version in (POOR, GOOD):
        gate.promote(client, version, FORCED)
    assert champions.rollback(client) == (GOOD, POOR)
    assert gate.promote(client, AGAIN, Asked(dry_run=True)).best_before is None


def test_best_champion_is_the_last_of_the_most_accurate_on_the_same_data(client, registered_models):
    manifest = load_manifest(registered_models.data).digest
    history = {"champions_before": f"{GOOD} {AGAIN} {FOREIGN}"}
    champions.move_champion(client, None, POOR, history)

    def best(*measured: str | None) -> str:
        for version, top1 in zip((GOOD, AGAIN, FOREIGN, POOR), measured, strict=True):
            champions.write_tags(client, NAME, version, {"gate_val_top1": top1})
        return gate.best_champion(client, NAME, POOR, manifest)[0]

    assert best("0.5", "0.7", "0.6", "0.4") == AGAIN
    assert best("0.5", "0.7", "0.7", "0.4") == FOREIGN
    assert best("0.5", "0.7", "0.7", "0.7") == POOR
    assert best("0.5", None, "nan", "0.4") in (AGAIN, FOREIGN), "what their runs logged: 1"
    client.set_tag(client.get_model_version(NAME, AGAIN).run_id, "manifest_sha256", "0" * 64)
    assert best("0.5", "0.7", "0.6", "0.4") == FOREIGN
    assert gate.best_champion(client, NAME, POOR, "1" * 64) == (POOR, [])


def test_best_champion_stays_in_a_history_that_is_cut():
    numbers = [str(number) for number in range(1, 151)]
    kept = champions.history(numbers, "7")["champions_before"].split()
    assert kept == ["7", *numbers[-99:]]
    assert champions.history(numbers, "90")["champions_before"].split() == numbers[-100:]


# What else passes


def test_moved_shards_are_accepted(client, tmp_path):
    moved = write_shard_set(tmp_path / "moved", train=(8, 8), val=(7, 6))
    assert gate.promote(client, None, Asked(data=moved)).data == moved


# What is refused


def test_worse_model_is_refused(client):
    gate.promote(client, GOOD, Asked())
    found = refused(client, POOR)
    assert "champion" in failed(found) and found.paired.high < 0
    assert re.search(r"champion: -0\.\d{4} top-1, 95 % -0\.\d{4} to -0\.\d{4}", found.reason)
    assert "(asked for: interval above -0.0100)" in found.reason


@pytest.mark.parametrize(
    ("metric", "change"), [("val/top1", -0.2), ("val/loss", 0.02), ("val/loss", float("nan"))]
)
def test_model_that_is_not_what_its_run_logged_is_refused(client, metric, change):
    run_id = client.get_model_version(NAME, GOOD).run_id
    known = client.get_run(run_id).data.metrics[metric]
    client.log_metric(run_id, metric, known + change, step=10_000)
    assert failed(refused(client, None)) == ["as logged"]


def test_run_without_metrics_is_refused(client, registered_models):
    config = dataclasses.replace(GOOD_CONFIG, name="silent")
    data = registered_models.data
    run = tracking.open_run(client, config, load_manifest(data), data)
    good = client.get_model_version(NAME, GOOD)
    made = client.create_model_version(NAME, good.source, run.info.run_id, tags=good.tags)
    found = refused(client, str(made.version))
    assert failed(found) == ["as logged"] and "which has none" in found.reason


def test_version_whose_run_was_deleted_is_told_with_the_way_back(client):
    run_id = client.get_model_version(NAME, GOOD).run_id
    client.delete_run(run_id)
    with pytest.raises(UserError, match=f"mlflow runs restore --run-id {run_id}`"):
        gate.promote(client, None, Asked())


@pytest.mark.parametrize("asked", [Asked(), FORCED], ids=["asked", "forced"])
def test_other_data_set_is_refused_also_by_force(client, tmp_path, asked):
    other = write_shard_set(tmp_path / "other", train=(8, 8), val=(7, 6), seed=1)
    found = refused(client, None, dataclasses.replace(asked, data=other))
    assert failed(found) == ["data set"] and found.metrics is None
    assert found.checks[2].limit.endswith(other)


@pytest.mark.parametrize("which", ["description", "run"])
def test_model_that_names_two_data_sets_is_refused_also_by_force(client, monkeypatch, which):
    """Where only one of the two names the set on which it is to be judged."""
    if which == "run":
        run_id = client.get_model_version(NAME, GOOD).run_id
        client.set_tag(run_id, "manifest_sha256", "0" * 64)
    else:
        model = gate.load(f"models:/{NAME}/{GOOD}")
        other = model.description | {"manifest_sha256": "0" * 64}
        other_model = dataclasses.replace(model, description=other)
        monkeypatch.setattr(gate, "load", lambda uri: other_model)
    found = refused(client, GOOD, FORCED)
    assert failed(found) == ["data set"] and "learned from 000000000000" in found.reason


def test_mislabelled_model_is_refused_also_by_force(client):
    found = refused(client, FOREIGN, FORCED)
    assert failed(found) == ["classes"]
    assert "label 0 is n00000000, where it has n90" in found.reason


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION, "code/alexnet/model.py"])
def test_tampered_model_is_refused_also_by_force_and_its_code_not_run(client, name):
    path = files_of(client, GOOD) / name
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    found = refused(client, None, FORCED)
    assert failed(found) == ["files"]
    assert f"not those that were registered ({name} changed)" in found.reason


def test_model_whose_files_are_gone_is_refused(client):
    shutil.rmtree(files_of(client, GOOD))
    assert failed(refused(client, None)) == ["files"]


def test_every_limit_is_told_not_only_the_first(client, tmp_path):
    strict = tmp_path / "strict.toml"
    strict.write_text(
        "[default]\ntop1 = 0.5\ntop5 = 0.5\nabove_chance = 0.25\nworst_class = 0.02\n"
        "margin = 0.02\nlatency_ms = 1e-6\nsize_mb = 0.001\n"
    )
    found = refused(client, None, Asked(policy=str(strict)))
    assert failed(found) == ["latency", "size"]
    assert "0.001 MB or less" in found.reason and "1e-06 ms or less" in found.reason


def test_shards_that_are_gone_are_told_with_the_remedy(client, tmp_path):
    with pytest.raises(UserError, match="if the shards were moved, pass --data") as told:
        gate.promote(client, None, Asked(data=str(tmp_path / "nowhere")))
    assert "\n" not in str(told.value) and "gate" not in tags(client, GOOD)
