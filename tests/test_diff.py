"""pipelines/diff.py: what differs between two sets is named, and nothing else."""

import json
from pathlib import Path

import pytest
from built import build_set, write_folders

from alexnet.errors import UserError
from pipelines import storage
from pipelines.diff import diff, text
from pipelines.plan import Recipe

PICTURES: dict[str, int | bytes] = {
    **{f"train/{c}/{c}{i}.jpg": 10 * k + i for k, c in enumerate("ab") for i in range(4)},
    **{f"val/{c}/v{c}{i}.jpg": 50 + 10 * k + i for k, c in enumerate("ab") for i in range(2)},
}
NAMES = "a first\nb second\n"


def built(folder: Path, changes: dict[str, int | bytes | None], recipe: Recipe) -> str:
    """PICTURES with other pictures, or without those that are None, as a set."""
    pictures = {"LOC_synset_mapping.txt": NAMES.encode(), **PICTURES, **changes}
    kept = {name: what for name, what in pictures.items() if what is not None}
    return build_set(write_folders(folder / "raw", kept), folder / "out", recipe)


RECIPE = Recipe(samples_per_shard=4, partial=True)


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> str:
    return built(tmp_path_factory.mktemp("a"), {}, RECIPE)


def compared(a: str, b: str) -> tuple[dict, str]:
    document = diff(a, b)
    assert json.loads(json.dumps(document)) == document  # --json prints it
    return document, text(document)


def test_a_set_and_its_equal_made_elsewhere_are_the_same(a: str, tmp_path: Path) -> None:
    document, said = compared(a, built(tmp_path, {}, RECIPE))
    assert document["same"] is True and "are the same set" in said
    assert document["shards"] == {"equal": 3, "other": 0, "only_a": 0, "only_b": 0, "names": []}


def test_another_recipe_is_told_by_its_names_and_values(a: str, tmp_path: Path) -> None:
    document, said = compared(a, built(tmp_path, {}, Recipe(crop=230, quality=80, partial=True)))
    assert document["same"] is False
    assert document["identity"]["codec.quality"] == [90, 80]
    assert "identity: recipe.crop: 227 -> 230" in said
    assert "identity: recipe.samples_per_shard: 4 -> 5005" in said
    assert document["splits"]["train"]["other_pixels"]["count"] == 8
    assert document["splits"]["train"]["other_raw"]["count"] == 0
    assert document["splits"]["val"]["other_pixels"]["first"] == ["va0", "va1", "vb0", "vb1"]
    assert document["shards"]["other"] == 2 and document["shards"]["only_a"] == 1
    assert "train samples added" not in said and "classes" not in said


def test_the_same_pictures_in_another_order_are_told_as_such(a: str, tmp_path: Path) -> None:
    document, said = compared(a, built(tmp_path, {}, Recipe(samples_per_shard=8, partial=True)))
    assert document["same"] is False and "every sample is the same" in said


def test_pictures_added_removed_moved_and_changed_are_listed(a: str, tmp_path: Path) -> None:
    changes: dict[str, int | bytes | None] = {
        "train/a/a0.jpg": None,
        "train/b/new.jpg": 30,
        "train/a/a1.jpg": None,
        "train/b/a1.jpg": 1,  # the same picture under another class
        "train/a/a2.jpg": 31,  # another picture under the same name
    }
    document, said = compared(a, built(tmp_path, changes, RECIPE))
    train = document["splits"]["train"]
    assert {name: part["first"] for name, part in train.items()} == {
        "added": ["new"],
        "removed": ["a0"],
        "relabelled": ["a1"],
        "other_pixels": [],
        "other_raw": ["a2"],
    }
    assert all(part["count"] == 0 for part in document["splits"]["val"].values())
    assert "train samples relabelled: 1 (a1)" in said


def test_classes_added_removed_and_renamed_are_listed(a: str, tmp_path: Path) -> None:
    changes: dict[str, int | bytes | None] = {
        **{name: None for name in PICTURES if "/b/" in name},
        "train/c/c0.jpg": 40,
        "val/c/vc0.jpg": 41,
        "LOC_synset_mapping.txt": b"a premier\nc third\n",
    }
    document, said = compared(a, built(tmp_path, changes, RECIPE))
    assert document["classes"] == {
        "added": {"count": 1, "first": ["c"]},
        "removed": {"count": 1, "first": ["b"]},
        "renamed": {"count": 1, "first": ["a: first -> premier"]},
    }
    assert document["splits"]["val"]["removed"]["first"] == ["vb0", "vb1"]
    assert document["splits"]["train"]["relabelled"]["count"] == 0
    assert "classes renamed: 1 (a: first -> premier)" in said


def test_verdicts_that_differ_are_counted(a: str, tmp_path: Path) -> None:
    from drawn import encoded, picture

    grey = encoded(picture(seed=3).convert("L"))
    cut = encoded(picture(seed=2), quality=95)[:-300]
    document, said = compared(
        a, built(tmp_path, {"train/a/a2.jpg": cut, "train/a/a3.jpg": grey}, RECIPE)
    )
    assert document["rejected"] == {"truncated": [None, 1]}
    assert document["fixes"] == {"grey": [None, 1]}
    assert "rejected: truncated: none -> 1" in said and "fixes: grey: none -> 1" in said
    assert document["splits"]["train"]["removed"]["first"] == ["a2"]


def test_a_split_that_one_set_lacks_is_told_whole(a: str, tmp_path: Path) -> None:
    recipe = Recipe(samples_per_shard=4, splits=("train",), partial=True)
    document, _ = compared(a, built(tmp_path, {}, recipe))
    assert document["splits"]["val"]["removed"]["count"] == 4
    assert document["shards"]["only_a"] == 1
    assert all(part["count"] == 0 for part in document["splits"]["train"].values())


def test_long_lists_are_counted_and_cut(a: str, tmp_path: Path) -> None:
    more: dict[str, int | bytes | None] = {f"train/a/n{i:02}.jpg": 60 + i for i in range(12)}
    document, said = compared(a, built(tmp_path, more, RECIPE))
    added = document["splits"]["train"]["added"]
    assert added == {"count": 12, "first": [f"n{i:02}" for i in range(10)]}
    assert "train samples added: 12 (n00, " in said and "n09, …)" in said


def test_sets_in_s3_are_compared(a: str, s3: str, tmp_path: Path) -> None:
    for name, _ in storage.list_files(a):
        storage.write(f"{s3}/{tmp_path.name}/{name}", Path(a, name).read_bytes())
    assert diff(a, f"{s3}/{tmp_path.name}")["same"] is True
    with pytest.raises(UserError, match="no finished shard set"):
        diff(a, f"{s3}/{tmp_path.name}/nothing")
