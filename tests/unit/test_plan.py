"""pipelines/plan.py: which image goes where, and the plan's identity."""

import hashlib
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from planned import UNEVEN, by_shard, changed, drawn_source

from alexnet.errors import UserError
from pipelines import plan, sources

TRAIN = plan.Recipe(samples_per_shard=26, splits=("train",))


@pytest.mark.parametrize("per_shard", [1, 7, 34, 101, 102, 5005])
def test_every_image_is_in_one_shard_and_sizes_differ_by_at_most_one(per_shard):
    made = plan.make(drawn_source(UNEVEN, val=13), plan.Recipe(samples_per_shard=per_shard))
    for split, total in (("train", 102), ("val", 13)):
        shards = [shard for shard in made.shards if shard.split == split]
        assert len(shards) == -(-total // per_shard)
        assert [shard.name for shard in shards] == [f"{split}-{i:06d}" for i in range(len(shards))]
        sizes = {shard.samples for shard in shards}
        assert max(sizes) - min(sizes) <= 1
    keys = made.table["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 115


def test_the_order_inside_a_shard_is_shuffled_by_seed_and_differs_between_shards():
    source = drawn_source({"n00000001": 400})

    def orders(seed: int) -> list[list[int]]:
        made = plan.make(source, replace(TRAIN, samples_per_shard=100, seed=seed))
        numbers = [int(key.split("_")[1]) for key in made.table["key"].to_pylist()]
        return [[n - 100 * i for n in numbers[100 * i :][:100]] for i in range(4)]

    first, second = orders(0), orders(1)
    assert orders(0) == first
    assert all(sorted(order) == list(range(100)) for order in first + second)
    assert len({tuple(order) for order in first + second}) == 8
    # Neighbours in the source are no neighbours any more: no rank correlation.
    assert abs(np.corrcoef(first[0], range(100))[0, 1]) < 0.4


def test_plan_id_depends_on_everything_that_decides_the_bytes_and_nothing_else():
    source, recipe = drawn_source(UNEVEN, val=3), plan.Recipe()
    original = plan.make(source, recipe).plan_id
    assert plan.make(replace(source, raw="s3://elsewhere/raw"), recipe).plan_id == original
    assert plan.make(source, replace(recipe, splits=("val", "train"))).plan_id == original
    changes = [{"resize": 300}, {"crop": 256}, {"quality": 91}, {"seed": 1}]
    changes += [{"samples_per_shard": 50}, {"splits": ("train",)}, {"partial": True}]
    changes += [{"shuffle": "global"}, {"exif_orientation": "apply"}, {"per_class": 9}]
    changes += [{"subset": ("n00000001",)}, {"val_share": 0.1}]
    ids = [plan.make(source, replace(recipe, **change)).plan_id for change in changes]
    other_name = replace(source, class_names=("a", "b", "c"))
    other_size = replace(source, containers=(("train.tar", 10),))
    other_file = drawn_source(UNEVEN | {"n00000003": 68}, val=3)
    ids += [plan.make(other, recipe).plan_id for other in (other_name, other_size, other_file)]
    assert len({original, *ids}) == 16


@pytest.mark.parametrize(
    ("shuffle", "plan_id", "shard_ids"),
    [
        ("classes", "c60201a33d475de3", "ea1cca9bbb6d3b74"),
        ("global", "e9381624f50cfeb3", "8c48d3260e0f66b4"),
        ("source", "de5ae49fca2ce4d1", "a091ef0590501b68"),
    ],
)
def test_identities_and_orders_are_pinned_for_ever(shuffle, plan_id, shard_ids):
    """Or every set that exists would be another one: then change ORDERING or FORMAT_VERSION."""
    recipe = plan.Recipe(samples_per_shard=26, shuffle=shuffle)
    made = plan.make(drawn_source(UNEVEN, val=13), recipe)
    ids = "".join(shard.id for shard in made.shards)  # hashes of their rows, in order
    assert made.plan_id[:16] == plan_id
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == shard_ids


def test_classes_are_spread_as_if_each_image_stood_in_the_middle_of_its_share():
    places = sorted(
        (Fraction(2 * rank + 1, 2 * count), wnid, f"{wnid}_{rank}")
        for wnid, count in UNEVEN.items()
        for rank in range(count)
    )
    for rows in by_shard(plan.make(drawn_source(UNEVEN), TRAIN)).values():
        expected, places = places[: len(rows)], places[len(rows) :]
        assert {row["key"] for row in rows} == {key for _, _, key in expected}


def test_names_that_read_alike_one_after_the_other_are_told_apart():
    source, ids = drawn_source({"n00000001": 2}), set()
    for names in (["ab", "c"], ["a", "bc"]):
        made = plan.make(changed(source, "name", names), TRAIN)
        ids |= {made.plan_id, *(shard.id for shard in made.shards)}
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 226}, "227 <= crop <= resize"),
        ({"crop": 257}, "227 <= crop <= resize"),
        ({"quality": 0}, "choose 1 to 100"),
        ({"samples_per_shard": 0}, "at least 1"),
        ({"samples_per_shard": 300_000}, "5 GiB of one upload"),
        ({"per_class": 0}, "--per-class 0 must be at least 1"),
        ({"shuffle": "much"}, "choose from classes, global, source"),
        ({"exif_orientation": "yes"}, "choose from ignore, apply"),
        ({"splits": ("dev",)}, "choose from train,val"),
        ({"splits": ()}, "choose from train,val"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        plan.Recipe(**change)


def test_a_global_shuffle_takes_every_image_once_and_mixes_the_classes():
    source = drawn_source({f"n0000000{k}": 100 for k in range(8)})
    recipe = replace(TRAIN, samples_per_shard=100, shuffle="global")
    made = plan.make(source, recipe)
    assert sorted(made.table["key"].to_pylist()) == sorted(source.table["key"].to_pylist())
    counts = [Counter(row["wnid"] for row in rows) for rows in by_shard(made).values()]
    # 12.5 of each class expected; six standard deviations of a hypergeometric draw are 19.
    assert all(1 <= count[wnid] <= 31 for count in counts for wnid in source.wnids)
    offsets = made.table["offset"].to_pylist()  # which grow in the order of the source
    assert abs(np.corrcoef(offsets, range(800))[0, 1]) < 0.15
    assert plan.make(source, replace(recipe, seed=1)).table["key"] != made.table["key"]


def test_the_order_of_the_source_gives_each_shard_one_stretch_of_it():
    start = 0
    made = plan.make(drawn_source(UNEVEN), replace(TRAIN, shuffle="source"))
    for rows in by_shard(made).values():
        offsets = sorted(row["offset"] for row in rows)
        assert offsets == list(range(1000 * start, 1000 * (start + len(rows)), 1000))
        start += len(rows)


def test_a_shard_s_identity_changes_with_its_images_and_recipe_alone():
    source, recipe = drawn_source(UNEVEN, val=5), plan.Recipe(samples_per_shard=26)
    ids = [shard.id for shard in plan.make(source, recipe).shards]
    assert len(set(ids)) == 5
    mended = plan.make(changed(source, "size", [901]), recipe)
    differing = [a != b for a, b in zip(ids, (s.id for s in mended.shards), strict=True)]
    assert differing == [True, False, False, False, False]
    better = plan.make(source, replace(recipe, quality=95))
    assert not {shard.id for shard in better.shards} & set(ids)


def test_stored_images_scale_as_the_raw_ones_would_and_are_never_enlarged():
    stored = sources.StoredAs(resize=256, crop=256, quality=90, digest="d")
    assert plan.geometry(plan.Recipe(crop=256), stored) == (256, True)
    assert plan.geometry(plan.Recipe(crop=227), stored) == (256, False)
    assert plan.geometry(plan.Recipe(resize=240, crop=227), stored) == (240, False)
    assert plan.geometry(plan.Recipe(crop=256, quality=95), stored) == (256, False)
    assert plan.geometry(plan.Recipe(), None) == (256, False)
    source = replace(drawn_source(UNEVEN), stored=replace(stored, crop=227))
    for change in ({"crop": 256}, {"resize": 300}, {"resize": 240}):
        with pytest.raises(UserError, match=r"needs more than these shards hold \(resize 256, cro"):
            plan.make(source, replace(TRAIN, **change))


def test_a_split_without_images_is_refused():
    with pytest.raises(UserError, match="there is no val image"):
        plan.make(drawn_source(UNEVEN), plan.Recipe())
