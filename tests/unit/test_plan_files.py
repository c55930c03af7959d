"""pipelines/plan_files.py: one folder, one plan."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from planned import UNEVEN, by_shard, drawn_source

from alexnet.errors import UserError
from pipelines import plan, plan_files, shards, sources, storage


def test_a_task_reads_the_rows_of_its_own_shard(tmp_path: Path) -> None:
    source = drawn_source(UNEVEN, val=13)
    made = plan.make(source, plan.Recipe(samples_per_shard=30))
    plan_files.begin(str(tmp_path), source.raw, made)
    for number, rows in enumerate(by_shard(made).values()):
        assert plan_files.read_rows(str(tmp_path), made.plan_id, number) == rows


def test_another_plan_in_the_same_folder_is_refused_with_both_ids_and_the_difference(
    tmp_path: Path,
) -> None:
    source = drawn_source(UNEVEN)
    first = plan.make(source, plan.Recipe(splits=("train",)))
    second = plan.make(source, plan.Recipe(splits=("train",), quality=95, seed=3))
    plan_files.begin(str(tmp_path), source.raw, first)
    plan_files.begin(str(tmp_path), source.raw, first)
    with pytest.raises(UserError) as error:
        plan_files.begin(str(tmp_path), source.raw, second)
    for part in (first.plan_id[:12], second.plan_id[:12], "quality 90 → 95", "seed 0 → 3"):
        assert part in str(error.value)


def test_a_claim_cut_short_is_completed_by_the_next_run(tmp_path: Path) -> None:
    source = drawn_source(UNEVEN)
    made = plan.make(source, plan.Recipe(splits=("train",)))
    plan_files.begin(str(tmp_path), source.raw, made)
    storage.delete(str(tmp_path / "_meta" / "plan.parquet"))
    plan_files.begin(str(tmp_path), source.raw, made)
    assert len(plan_files.read_rows(str(tmp_path), made.plan_id, 0)) == 102


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    source = drawn_source(UNEVEN)
    with pytest.raises(UserError, match=r"is not empty \(thesis\.tex"):
        plan_files.begin(
            str(tmp_path), source.raw, plan.make(source, plan.Recipe(splits=("train",)))
        )


def mended(source: sources.Source, position: int) -> sources.Source:
    """The same source, one image of which has another size now."""
    column = source.table.schema.get_field_index("size")
    sizes = source.table["size"].to_pylist()
    sizes[position] += 1
    return replace(source, table=source.table.set_column(column, "size", pa.array(sizes)))


def test_a_plan_is_replaced_only_if_no_other_shard_changes(tmp_path: Path) -> None:
    source, recipe = drawn_source(UNEVEN), plan.Recipe(samples_per_shard=26, splits=("train",))
    before, after = plan.make(source, recipe), plan.make(mended(source, 0), recipe)
    plan_files.begin(str(tmp_path), source.raw, before)
    plan_files.check_replaceable(str(tmp_path), after, {"train-000000", "train-000003"})
    with pytest.raises(UserError, match="1 other shards, first train-000000"):
        plan_files.check_replaceable(str(tmp_path), after, {"train-000003"})
    plan_files.replace(str(tmp_path), "/mended", after)
    assert plan_files.load(str(tmp_path)).plan_id == after.plan_id
    assert plan_files.raw_of(str(tmp_path)) == "/mended"
    assert plan_files.read_rows(str(tmp_path), after.plan_id, 0) == next(
        iter(by_shard(after).values())
    )


def test_rows_of_a_plan_that_was_being_replaced_are_not_taken_for_the_old_one_s(
    tmp_path: Path,
) -> None:
    source, recipe = drawn_source(UNEVEN), plan.Recipe(samples_per_shard=26, splits=("train",))
    before, after = plan.make(source, recipe), plan.make(mended(source, 0), recipe)
    plan_files.begin(str(tmp_path), source.raw, before)
    document = storage.read(str(tmp_path / "_meta" / "plan.json"))
    plan_files.replace(str(tmp_path), source.raw, after)
    storage.write(str(tmp_path / "_meta" / "plan.json"), document)  # killed between the two files
    with pytest.raises(UserError, match="given another plan meanwhile"):
        plan_files.read_rows(str(tmp_path), before.plan_id, 0)
    plan_files.begin(str(tmp_path), source.raw, before)
    assert plan_files.read_rows(str(tmp_path), before.plan_id, 0) == next(
        iter(by_shard(before).values())
    )


def test_a_builder_that_comes_second_by_a_moment_joins_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = drawn_source(UNEVEN)
    made = plan.make(source, plan.Recipe(splits=("train",)))
    other = plan.make(source, plan.Recipe(splits=("train",), seed=1))
    exists, looked = storage.exists, []

    def too_early(uri: str) -> bool:
        if uri.endswith("plan.json") and not looked:
            looked.append(uri)
            out = uri.removesuffix("/_meta/plan.json")
            plan_files.begin(out, source.raw, made)  # the other one, just after this look
            return False
        return exists(uri)

    monkeypatch.setattr(storage, "exists", too_early)
    assert plan_files.begin(str(tmp_path / "a"), source.raw, made).plan_id == made.plan_id
    looked.clear()
    with pytest.raises(UserError, match="holds plan"):
        plan_files.begin(str(tmp_path / "b"), source.raw, other)


def test_a_plan_read_back_says_what_was_planned(tmp_path: Path) -> None:
    source = replace(drawn_source(UNEVEN), labels_from={"train": "folder"}, official=True)
    recipe = plan.Recipe(splits=("train",), subset=("n00000001",), per_class=4)
    made = plan.make(source, recipe)
    plan_files.begin(str(tmp_path), source.raw, made)
    found = plan_files.load(str(tmp_path))
    assert found == replace(made, table=None, identity=found.identity)
    assert found.recipe == recipe and found.images == 102
    with pytest.raises(UserError, match="no shard set was begun here"):
        plan_files.load(str(tmp_path / "elsewhere"))


def test_a_plan_that_is_not_the_one_of_its_name_is_damaged(tmp_path: Path) -> None:
    source = drawn_source(UNEVEN)
    plan_files.begin(str(tmp_path), source.raw, plan.make(source, plan.Recipe(splits=("train",))))
    path = tmp_path / "_meta" / "plan.json"
    document = json.loads(path.read_text())
    document["identity"]["recipe"]["seed"] = 7
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"plan\.json is damaged"):
        plan_files.load(str(tmp_path))


def test_a_disk_must_have_space_for_the_shards_that_are_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = plan.Recipe(samples_per_shard=26, splits=("train",))
    made, numbers = plan.make(drawn_source(UNEVEN), recipe), [0, 2]
    needed = sum(made.shards[n].samples for n in numbers) * recipe.bytes_per_sample
    for free in (None, int(needed) + 1, int(needed)):
        monkeypatch.setattr(storage, "free_bytes", lambda _, free=free: free)
        if free is None or free > needed:
            plan_files.refuse_full(str(tmp_path), made, numbers)
            continue
        with pytest.raises(UserError, match=r"MB are free and 2 shards take about .* make room"):
            plan_files.refuse_full(str(tmp_path), made, numbers)


def test_a_damaged_plan_is_told_and_written_anew_when_it_is_gone(tmp_path: Path) -> None:
    source = drawn_source(UNEVEN)
    made = plan.make(source, plan.Recipe(splits=("train",)))
    plan_files.begin(str(tmp_path), source.raw, made)
    before = {path: path.read_bytes() for path in (tmp_path / "_meta").iterdir()}
    status = dict.fromkeys(("shard", "split", "sha256", "md5", "dali_index_sha256"), "")
    status |= {"samples": 0, "bytes": 0, "rejected": [], "pixels": {}, "fixes": {}, "versions": {}}
    status["shard_id"] = made.shards[0].id
    sidecar = shards.pack_sidecar(shards.INDEX.empty_table(), status)
    storage.write(f"{tmp_path}/train-000000.tar", b"")
    (tmp_path / "_meta" / "plan.json").write_bytes(b'{"plan_id":')
    (tmp_path / "_meta" / "plan.parquet").write_bytes(b"PAR1 no more")
    for call in (plan_files.load, lambda out: plan_files.begin(out, source.raw, made)):
        with pytest.raises(UserError, match=r"plan\.json is damaged; delete it and start"):
            call(str(tmp_path))
    (tmp_path / "_meta" / "plan.json").unlink()
    other = plan.make(source, plan.Recipe(splits=("train",), seed=1))
    for unknown in (made, other):
        with pytest.raises(UserError, match=r"is not empty \(train-000000\.tar"):
            plan_files.begin(str(tmp_path), source.raw, unknown)
        storage.write(shards.sidecar_uri(str(tmp_path), "train-000000"), sidecar)
    plan_files.begin(str(tmp_path), source.raw, made)
    assert {path: path.read_bytes() for path in before} == before
