"""pipelines/sources/table.py: fewer classes, or fewer images of each."""

from collections import Counter
from pathlib import Path

import pytest
from drawn import A, B, C, imagefolder
from drawn_layouts import hugging_face, kaggle

from alexnet.errors import UserError
from pipelines import sources


@pytest.fixture
def source(tmp_path: Path) -> sources.Source:
    return sources.scan(str(kaggle(tmp_path)), ("train", "val", "test"))


def keys(source: sources.Source, split: str) -> list[str]:
    return [row["key"] for row in source.table.to_pylist() if row["split"] == split]


def test_labels_become_ranks_within_the_subset(source):
    less = sources.select(source, (C, B), None)
    assert less.wnids == (B, C)
    assert less.class_names == ("jacamar", "yurt")
    assert Counter((r["split"], r["wnid"], r["label"]) for r in less.table.to_pylist()) == {
        ("train", B, 0): 2,
        ("train", C, 1): 2,
        ("val", B, 0): 1,
        ("val", C, 1): 1,
        ("test", "", -1): 2,  # nobody can tell their classes
    }
    assert less.notes == ("subset: 2 of 3 classes, 8 of 11 images; the rest is left out",)
    assert less.announced is None
    assert sources.select(source, (), None) is source


def test_the_first_images_of_each_class_and_split_stay_in_the_order_of_the_source(source, tmp_path):
    less = sources.select(source, (), 1)
    assert less.wnids == source.wnids
    assert keys(less, "train") == [f"{A}_3", f"{B}_3", f"{C}_3"]
    assert keys(less, "val") == keys(source, "val")
    assert keys(less, "test") == keys(source, "test")  # at most 1 of each of 3 classes
    assert keys(sources.select(source, (A,), 1), "test") == ["ILSVRC2012_test_00000001"]
    source = sources.scan(str(hugging_face(tmp_path / "parquet")), ["train"])
    assert keys(source, "train") == [f"{B}_1", f"{A}_5", f"{C}_2", f"{A}_4"]
    assert keys(sources.select(source, (A,), 1), "train") == [f"{A}_5"]


def test_an_unknown_class_and_an_empty_split_are_refused(source, tmp_path):
    with pytest.raises(UserError, match=r"--subset: n99999999 is none of the 3 classes"):
        sources.select(source, (A, "n99999999"), None)
    names = [f"train/{A}/1.jpg", f"train/{B}/2.jpg", f"val/{A}/1.jpg"]
    raw = imagefolder(tmp_path / "other", dict.fromkeys(names, b"x"))
    with pytest.raises(UserError, match=r"--subset: no val image is left of 1"):
        sources.select(sources.scan(str(raw), ("train", "val")), (B,), None)


def test_a_list_or_a_file_with_one_wnid_a_line(tmp_path):
    assert sources.parse_subset(f"{B}, {A},{B}") == (A, B)
    mapping = tmp_path / "mapping.txt"
    mapping.write_text(f"{B} jacamar\n\n{A} tench, Tinca tinca\n")
    assert sources.parse_subset(str(mapping)) == (A, B)
    for text, told in (("missing.txt", "txt: not there"), (",", "no class"), (" ", "no class")):
        with pytest.raises(UserError, match=told):
            sources.parse_subset(text)
