"""pipelines/duplicates.py against a count with Python's own dictionaries."""

from collections import defaultdict

import numpy as np
import pyarrow as pa

from pipelines.duplicates import Tally, find

Row = tuple[str, str, int, str, str]  # split, key, label, source_sha256, sha256


def tables(rows: list[Row]) -> dict[str, pa.Table]:
    found = {}
    for split in dict.fromkeys(row[0] for row in rows):
        of_split = [row for row in rows if row[0] == split]
        found[split] = pa.table(
            {
                "key": [row[1] for row in of_split],
                "label": [row[2] for row in of_split],
                "wnid": [f"n{row[2]}" if row[2] >= 0 else "" for row in of_split],
                "source_sha256": [row[3] for row in of_split],
                "sha256": [row[4] for row in of_split],
            }
        )
    return found


def test_nothing_repeats_in_a_set_of_different_pictures() -> None:
    found = find(tables([("train", "a", 0, "f1", "p1"), ("val", "b", 0, "f2", "p2")]))
    assert found.lines() == [] and found.files.groups == 0 and found.pictures.examples == ()
    empty = find({"train": tables([("train", "a", 0, "f", "p")])["train"].slice(0, 0)})
    assert empty.lines() == []


def test_each_kind_is_counted_apart_and_shown() -> None:
    rows = [
        ("train", "a", 0, "f1", "p1"),
        ("train", "b", 0, "f1", "p1"),  # the same file, the same label
        ("train", "c", 1, "f2", "p2"),
        ("train", "d", 0, "f3", "p2"),  # other files, one picture, two labels
        ("train", "e", 2, "f4", "p4"),
        ("val", "x", 2, "f4", "p4"),  # in both splits
        ("train", "f", 2, "f5", "p5"),
        ("train", "g", 2, "f5", "p5"),
        ("val", "y", 1, "f5", "p5"),  # in both splits with two labels: counted as that alone
    ]
    found = find(tables(rows))
    assert found.files.within_same_label == Tally(1, 2)
    assert found.files.within_other_labels == Tally(0, 0)
    assert found.pictures.within_other_labels == Tally(1, 2)
    assert found.files.across_same_label == found.pictures.across_same_label == Tally(1, 2)
    assert found.files.across_other_labels == found.pictures.across_other_labels == Tally(1, 3)
    assert (found.pictures.groups, found.pictures.samples) == (4, 9)
    assert [group.sha256 for group in found.pictures.examples] == ["p5", "p4", "p2", "p1"]
    gravest = found.pictures.examples[0]
    assert (gravest.size, gravest.across_splits, gravest.other_labels) == (3, True, True)
    assert gravest.samples == (("train", "f", "n2"), ("train", "g", "n2"), ("val", "y", "n1"))
    assert found.lines()[0] == (
        "1 raw file more than once across splits, with different labels (3 samples), such as "
        "train f (n2) and val y (n1)"
    )
    assert len(found.lines()) == 3 + 4


def test_an_unlabelled_picture_contradicts_no_label() -> None:
    rows = [("train", "a", 1, "f", "p"), ("test", "b", -1, "f", "p"), ("test", "c", -1, "f", "p")]
    found = find(tables(rows)).files
    assert found.across_same_label == Tally(1, 3) and found.groups == 1
    both = find(tables([("test", "b", -1, "f", "p"), ("test", "c", -1, "f", "p")]))
    assert both.files.within_same_label == Tally(1, 2)
    assert "test b (unlabelled)" in both.lines()[0]


def test_examples_are_few_however_often_a_picture_repeats() -> None:
    rows: list[Row] = [("train", f"k{i:04}", 0, "f", f"p{i % 100:02}") for i in range(2000)]
    found = find(tables(rows), examples=3)
    assert found.files.within_same_label == Tally(1, 2000)
    assert [len(group.samples) for group in found.files.examples] == [5]
    assert [group.sha256 for group in found.pictures.examples] == ["p00", "p01", "p02"]


def test_the_columns_count_what_a_dictionary_counts() -> None:
    rng = np.random.default_rng(0)
    rows: list[Row] = [
        (str(rng.choice(["train", "val", "test"])), str(i), int(rng.integers(3)), str(f), str(p))
        for i, (f, p) in enumerate(rng.integers(0, 3000, (4000, 2)))
    ]
    found = find(tables(rows))
    for repeats, column in ((found.files, 3), (found.pictures, 4)):
        groups = defaultdict(list)
        for row in rows:
            groups[row[column]].append(row)
        expected: dict[tuple[bool, bool], list[int]] = defaultdict(lambda: [0, 0])
        for group in groups.values():
            if len(group) > 1:
                kind = (len({row[0] for row in group}) > 1, len({row[2] for row in group}) > 1)
                expected[kind][0] += 1
                expected[kind][1] += len(group)
        assert {
            (False, False): repeats.within_same_label,
            (False, True): repeats.within_other_labels,
            (True, False): repeats.across_same_label,
            (True, True): repeats.across_other_labels,
        } == {kind: Tally(*counts) for kind, counts in expected.items()}
