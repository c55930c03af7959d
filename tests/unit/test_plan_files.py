"""pipelines/plan_files.py: one folder, one plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from planned import UNEVEN, by_shard, changed, drawn_source

from alexnet.errors import UserError
from pipelines import plan, plan_files, shards, sidecars, storage

SOURCE = drawn_source(UNEVEN)
RECIPE = plan.Recipe(samples_per_shard=26, splits=("train",))
MADE = plan.make(SOURCE, RECIPE)
OTHER = plan.make(SOURCE, replace(RECIPE, quality=95, seed=3))
MENDED = plan.make(changed(SOURCE, "size", [901]), RECIPE)  # one image, in the first shard
FIRST, MENDED_FIRST = (by_shard(made)["train-000000"] for made in (MADE, MENDED))


@pytest.fixture
def out(tmp_path: Path) -> str:
    plan_files.begin(str(tmp_path), "/raw", MADE)
    return str(tmp_path)


def test_a_task_reads_the_rows_of_its_own_shard(tmp_path):
    made = plan.make(drawn_source(UNEVEN, val=13), plan.Recipe(samples_per_shard=30))
    plan_files.begin(str(tmp_path), "/raw", made)
    for number, rows in enumerate(by_shard(made).values()):
        assert plan_files.read_rows(str(tmp_path), made.plan_id, number) == rows


def test_many_shards_have_their_rows_in_several_files_and_one_of_earlier_releases_is_read(
    tmp_path, monkeypatch
):
    made = plan.make(drawn_source(UNEVEN, val=13), plan.Recipe(samples_per_shard=13))
    whole, out = str(tmp_path / "whole"), str(tmp_path / "out")
    plan_files.begin(whole, "/raw", made)
    monkeypatch.setattr(plan_files, "_SHARDS", 2)
    plan_files.begin(out, "/raw", made)
    meta = Path(out, "_meta")
    assert len(made.shards) > 4
    files = {path.name for path in meta.glob("plan*.parquet")}
    assert files == {
        "plan.parquet",
        *(f"plan-{n}.parquet" for n in range(1, -(-len(made.shards) // 2))),
    }
    for uri in (whole, out):
        for number, rows in enumerate(by_shard(made).values()):
            assert plan_files.read_rows(uri, made.plan_id, number) == rows
        assert plan_files.load_rows(uri, ("key",)).equals(made.table.select(["key"]))
    (meta / "plan-1.parquet").unlink()
    with pytest.raises(shards.Damaged, match=r"plan-1\.parquet is missing"):
        plan_files.load_rows(out, ("key",))
    plan_files.begin(out, "/raw", made)
    assert plan_files.load_rows(out, ("key",)).num_rows == made.images


def test_another_plan_in_the_same_folder_is_refused_with_both_ids_and_the_difference(out):
    plan_files.begin(out, "/raw", MADE)
    with pytest.raises(UserError) as error:
        plan_files.begin(out, "/raw", OTHER)
    for part in (MADE.plan_id[:12], OTHER.plan_id[:12], "quality 90 → 95", "seed 0 → 3"):
        assert part in str(error.value)


def test_a_claim_cut_short_is_completed_by_the_next_run(out):
    storage.delete(f"{out}/_meta/plan.parquet")
    plan_files.begin(out, "/raw", MADE)
    assert plan_files.read_rows(out, MADE.plan_id, 0) == FIRST


def test_a_plan_is_replaced_only_if_no_other_shard_changes(out):
    plan_files.check_replaceable(out, MENDED, {"train-000000", "train-000003"})
    with pytest.raises(UserError, match="1 other shards, first train-000000"):
        plan_files.check_replaceable(out, MENDED, {"train-000003"})
    plan_files.replace(out, "/mended", MENDED)
    assert plan_files.load(out).plan_id == MENDED.plan_id
    assert plan_files.raw_of(out) == "/mended"
    assert plan_files.read_rows(out, MENDED.plan_id, 0) == MENDED_FIRST


def test_rows_of_a_plan_that_was_being_replaced_are_not_taken_for_the_old_one_s(out):
    document = storage.read(f"{out}/_meta/plan.json")
    plan_files.replace(out, "/raw", MENDED)
    storage.write(f"{out}/_meta/plan.json", document)  # killed between the two files
    with pytest.raises(UserError, match="given another plan meanwhile"):
        plan_files.read_rows(out, MADE.plan_id, 0)
    plan_files.begin(out, "/raw", MADE)
    assert plan_files.read_rows(out, MADE.plan_id, 0) == FIRST


def test_a_builder_that_comes_second_by_a_moment_joins_or_is_refused(tmp_path, monkeypatch):
    exists, looked = storage.exists, []

    def too_early(uri: str) -> bool:
        if uri.endswith("plan.json") and not looked:
            looked.append(uri)
            # the other one, just after this look
            plan_files.begin(uri.removesuffix("/_meta/plan.json"), "/raw", MADE)
            return False
        return exists(uri)

    monkeypatch.setattr(storage, "exists", too_early)
    assert plan_files.begin(str(tmp_path / "a"), "/raw", MADE).plan_id == MADE.plan_id
    looked.clear()
    with pytest.raises(UserError, match="holds plan"):
        plan_files.begin(str(tmp_path / "b"), "/raw", OTHER)


def test_a_plan_read_back_says_what_was_planned(tmp_path):
    source = replace(SOURCE, labels_from={"train": "folder"}, official=True)
    recipe = plan.Recipe(splits=("train",), subset=("n00000001",), per_class=4)
    made = plan.make(source, recipe)
    plan_files.begin(str(tmp_path), "/raw", made)
    found = plan_files.load(str(tmp_path))
    assert found == replace(made, table=None, identity=found.identity)
    assert found.recipe == recipe and found.images == 102
    with pytest.raises(UserError, match="no shard set was begun here"):
        plan_files.load(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"plan_id": 1}', ""], ids=range(5))
def test_a_plan_that_is_not_the_one_of_its_name_is_damaged(out, text):
    path = Path(out, "_meta", "plan.json")
    document = json.loads(path.read_text())
    document["identity"]["recipe"]["seed"] = 7
    path.write_text(text or json.dumps(document))
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        plan_files.load(out)


def test_a_disk_must_have_space_for_the_shards_that_are_to_be_made(tmp_path, monkeypatch):
    numbers = [0, 2]
    needed = sum(MADE.shards[n].samples for n in numbers) * RECIPE.bytes_per_sample
    for free in (None, int(needed) + 1):
        monkeypatch.setattr(storage, "free_bytes", lambda _, free=free: free)
        plan_files.refuse_full(str(tmp_path), MADE, numbers)
    monkeypatch.setattr(storage, "free_bytes", lambda _: int(needed))
    with pytest.raises(UserError, match=r"MB are free and 2 shards take about .* make room"):
        plan_files.refuse_full(str(tmp_path), MADE, numbers)


def test_a_damaged_plan_is_told_and_written_anew_when_it_is_gone(out):
    meta = Path(out, "_meta")
    before = {path: path.read_bytes() for path in meta.iterdir()}
    status = dict.fromkeys(("shard", "split", "sha256", "md5", "dali_index_sha256"), "")
    status |= {"samples": 0, "bytes": 0, "rejected": [], "pixels": {}, "fixes": {}, "versions": {}}
    status["shard_id"] = MADE.shards[0].id
    sidecar = sidecars.pack(shards.INDEX.empty_table(), status)
    storage.write(f"{out}/train-000000.tar", b"")
    (meta / "plan.json").write_bytes(b'{"plan_id":')
    (meta / "plan.parquet").write_bytes(b"PAR1 no more")
    for call in (plan_files.load, lambda out: plan_files.begin(out, "/raw", MADE)):
        with pytest.raises(UserError, match=r"plan\.json is damaged; delete it and start"):
            call(out)
    (meta / "plan.json").unlink()
    for unknown in (MADE, OTHER):
        with pytest.raises(UserError, match=r"is not empty \(train-000000\.tar"):
            plan_files.begin(out, "/raw", unknown)
        storage.write(sidecars.place(out, "train-000000"), sidecar)
    plan_files.begin(out, "/raw", MADE)
    assert {path: path.read_bytes() for path in before} == before
