"""pipelines/plan.py: which picture goes where, and the plan's identity."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from alexnet.errors import UserError
from pipelines import plan, sources, storage


def drawn_source(counts: dict[str, int], *, raw: str = "/raw", val: int = 0) -> sources.Source:
    """A source whose class k has counts[k] train pictures, one after the other in one file."""
    wnids = sorted(counts)
    rows = [
        ("train", f"{wnid}_{n}", f"{wnid}_{n}.JPEG", wnids.index(wnid), wnid, "train.tar")
        for wnid in wnids
        for n in range(counts[wnid])
    ]
    rows += [("val", f"val_{n}", f"val_{n}.JPEG", 0, wnids[0], "val.tar") for n in range(val)]
    columns = [*zip(*rows, strict=True), range(0, 1000 * len(rows), 1000), [900] * len(rows)]
    table = pa.Table.from_arrays(
        [pa.array(column, f.type) for column, f in zip(columns, sources.TABLE, strict=True)],
        schema=sources.TABLE,
    )
    names = tuple(wnids)
    return sources.Source(raw, "archives", table, names, names, {}, (("train.tar", 9),), None, ())


UNEVEN = {"n00000001": 10, "n00000002": 25, "n00000003": 67}


def by_shard(made: plan.Plan) -> dict[str, list[dict[str, object]]]:
    rows = made.table.to_pylist()
    shards = {}
    for shard in made.shards:
        shards[shard.name], rows = rows[: shard.samples], rows[shard.samples :]
    assert rows == []
    return shards


@pytest.mark.parametrize("per_shard", [1, 7, 34, 101, 102, 5005])
def test_every_picture_is_in_one_shard_and_sizes_differ_by_at_most_one(per_shard: int) -> None:
    recipe = plan.Recipe(samples_per_shard=per_shard)
    made = plan.make(drawn_source(UNEVEN, val=13), recipe)
    for split, total in (("train", 102), ("val", 13)):
        shards = [shard for shard in made.shards if shard.split == split]
        assert len(shards) == -(-total // per_shard)
        assert [shard.name for shard in shards] == [f"{split}-{i:06d}" for i in range(len(shards))]
        sizes = {shard.samples for shard in shards}
        assert max(sizes) - min(sizes) <= 1
    keys = made.table["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 115


def test_each_shard_has_its_share_of_every_class_as_one_contiguous_run() -> None:
    made = plan.make(drawn_source(UNEVEN), plan.Recipe(samples_per_shard=26, splits=("train",)))
    for rows in by_shard(made).values():
        counts = Counter(row["wnid"] for row in rows)
        for wnid, total in UNEVEN.items():
            assert abs(counts[wnid] - total / 4) <= 1
            numbers = sorted(int(row["key"].split("_")[1]) for row in rows if row["wnid"] == wnid)
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_the_order_inside_a_shard_is_shuffled_by_seed_and_differs_between_shards() -> None:
    source = drawn_source({"n00000001": 400})

    def orders(seed: int) -> list[list[int]]:
        made = plan.make(source, plan.Recipe(samples_per_shard=100, seed=seed, splits=("train",)))
        numbers = [int(key.split("_")[1]) for key in made.table["key"].to_pylist()]
        return [[n - 100 * i for n in numbers[100 * i :][:100]] for i in range(4)]

    first, second = orders(0), orders(1)
    assert orders(0) == first
    assert all(sorted(order) == list(range(100)) for order in first + second)
    assert len({tuple(order) for order in first + second}) == 8
    # Neighbours in the source are no neighbours any more: no rank correlation.
    assert abs(np.corrcoef(first[0], range(100))[0, 1]) < 0.4


def test_the_shuffle_is_pinned_for_ever() -> None:
    assert plan._permutation(8, 0, "train", 3).tolist() == [2, 5, 7, 1, 3, 4, 6, 0]


def test_plan_id_depends_on_everything_that_decides_the_bytes_and_nothing_else() -> None:
    source, recipe = drawn_source(UNEVEN, val=3), plan.Recipe()
    original = plan.make(source, recipe).plan_id
    assert plan.make(replace(source, raw="s3://elsewhere/raw"), recipe).plan_id == original
    assert plan.make(source, replace(recipe, splits=("val", "train"))).plan_id == original
    changed = [
        plan.make(source, replace(recipe, **change)).plan_id
        for change in (
            {"resize": 300},
            {"crop": 256},
            {"quality": 91},
            {"seed": 1},
            {"samples_per_shard": 50},
            {"splits": ("train",)},
            {"partial": True},
        )
    ]
    other_name = replace(source, class_names=("a", "b", "c"))
    other_size = replace(source, containers=(("train.tar", 10),))
    other_file = drawn_source(UNEVEN | {"n00000003": 68}, val=3)
    changed += [plan.make(other, recipe).plan_id for other in (other_name, other_size, other_file)]
    assert len({original, *changed}) == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 226}, "227 <= crop <= resize"),
        ({"crop": 257}, "227 <= crop <= resize"),
        ({"quality": 0}, "choose 1 to 100"),
        ({"samples_per_shard": 0}, "at least 1"),
        ({"splits": ("test",)}, "choose from train,val"),
        ({"splits": ()}, "choose from train,val"),
    ],
)
def test_impossible_recipes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.Recipe(**change)


def test_a_task_reads_the_rows_of_its_own_shard(tmp_path: Path) -> None:
    source = drawn_source(UNEVEN, val=13)
    made = plan.make(source, plan.Recipe(samples_per_shard=30))
    plan.begin(str(tmp_path), source, made)
    for number, rows in enumerate(by_shard(made).values()):
        assert plan.read_rows(str(tmp_path), number) == rows


def test_another_plan_in_the_same_folder_is_refused_with_both_ids_and_the_difference(
    tmp_path: Path,
) -> None:
    source = drawn_source(UNEVEN)
    first = plan.make(source, plan.Recipe(splits=("train",)))
    second = plan.make(source, plan.Recipe(splits=("train",), quality=95, seed=3))
    plan.begin(str(tmp_path), source, first)
    plan.begin(str(tmp_path), source, first)
    with pytest.raises(UserError) as error:
        plan.begin(str(tmp_path), source, second)
    for part in (first.plan_id[:12], second.plan_id[:12], "quality 90 → 95", "seed 0 → 3"):
        assert part in str(error.value)


def test_a_claim_cut_short_is_completed_by_the_next_run(tmp_path: Path) -> None:
    source = drawn_source(UNEVEN)
    made = plan.make(source, plan.Recipe(splits=("train",)))
    plan.begin(str(tmp_path), source, made)
    storage.delete(str(tmp_path / "_meta" / "plan.parquet"))
    plan.begin(str(tmp_path), source, made)
    assert len(plan.read_rows(str(tmp_path), 0)) == 102


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    source = drawn_source(UNEVEN)
    with pytest.raises(UserError, match=r"is not empty \(thesis\.tex"):
        plan.begin(str(tmp_path), source, plan.make(source, plan.Recipe(splits=("train",))))
