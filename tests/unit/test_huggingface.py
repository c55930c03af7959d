"""pipelines/sources/huggingface.py: parquet files with embedded images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn import A, B, C
from drawn_layouts import TRAIN, VAL, Row, hugging_face, parquet, train_row, val_row

from alexnet.errors import UserError
from pipelines import reads, sources

BOTH = ("train", "val")
ALL = ("train", "val", "test")
TEST = "data/test-00000-of-00001.parquet"
FIRST, SECOND = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
VALIDATION = "data/validation-00000-of-00001.parquet"


def test_rows_name_file_and_row_and_have_the_canonical_name(tmp_path: Path) -> None:
    source = sources.scan(str(hugging_face(tmp_path)), ALL)
    assert source.table.drop_columns(["size", "key"]).to_pylist() == [
        {"split": split, "name": name, "label": label, "wnid": wnid, "source": file, "offset": row}
        for split, name, label, wnid, file, row in [
            ("train", f"{B}_1.JPEG", 1, B, FIRST, 0),
            ("train", f"{A}_5.JPEG", 0, A, FIRST, 1),
            ("train", f"{C}_2.JPEG", 2, C, SECOND, 0),
            ("train", f"{A}_4.JPEG", 0, A, SECOND, 1),
            ("val", "ILSVRC2012_val_00000001.JPEG", 2, C, VALIDATION, 0),
            ("val", "ILSVRC2012_val_00000002.JPEG", 0, A, VALIDATION, 1),
            ("val", "ILSVRC2012_val_00000003.JPEG", 1, B, VALIDATION, 2),
            (
                "test",
                "ILSVRC2012_test_00000001.JPEG",
                -1,
                "",
                "data/test-00000-of-00001.parquet",
                0,
            ),
            (
                "test",
                "ILSVRC2012_test_00000002.JPEG",
                -1,
                "",
                "data/test-00000-of-00001.parquet",
                1,
            ),
        ]
    ]
    assert source.table["size"].null_count == 9
    assert source.class_names == ("tench", "jacamar", "yurt")
    assert source.shuffle == "source"
    names = (FIRST, SECOND, VALIDATION, TEST)
    assert source.containers == tuple((name, (tmp_path / name).stat().st_size) for name in names)


def test_images_are_not_read(tmp_path: Path) -> None:
    raw = hugging_face(tmp_path, size=3000)
    expected = sources.scan(str(raw), BOTH).table
    for path in raw.rglob("*.parquet"):
        data = bytearray(path.read_bytes())
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                chunk = file.metadata.row_group(group).column(0)
                assert chunk.path_in_schema == "image.bytes"
                start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
                data[start : start + chunk.total_compressed_size] = b"\xff" * (
                    chunk.total_compressed_size
                )
        path.write_bytes(data)
    assert sources.scan(str(raw), BOTH).table.equals(expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"train": [*TRAIN[:2], train_row(C, 2, 1), TRAIN[3]]},
            rf"{FIRST} row 0 has {B} with label 1, {SECOND} row 0 has {C} with label 1",
        ),
        (
            {"train": [train_row(A, 1, 0)], "val": [val_row(1, A, 1)]},
            rf"{FIRST} row 0 has {A} with label 0, {VALIDATION} row 0 has {A} with label 1",
        ),
        (
            {"train": [train_row(A, 1, 2), train_row(C, 1, 0)], "val": [val_row(1, B, 1)]},
            rf"has {C} with label 0, .* has {B} with label 1; labels must be ranks of sorted",
        ),
        ({"train": [(f"{A}_1_{B}.JPEG", 0)]}, rf"row 0 \({A}_1_{B}\.JPEG, label 0\) has two WNIDs"),
        ({"train": [TRAIN[0], train_row(A, 1, -1)]}, "row 0 .* is in train without a label"),
        ({"val": [val_row(1, A, None)]}, "row 0 .* is in val without a label"),
        (
            {"val": [("ILSVRC2012_val_00000001.JPEG", 0)]},
            "or a WNID in its paths where that has none",
        ),
        (
            {"train": [*TRAIN[:2], TRAIN[2], (None, 0)]},
            r"row 1 \(None, label 0\) has no image\.path",
        ),
        ({"train": [train_row(A, 1, -2)]}, "impossible label"),
    ],
)
def test_contradictions_are_refused_with_file_and_row(
    tmp_path: Path, options: dict[str, list[Row]], named: str
) -> None:
    raw = str(hugging_face(tmp_path, **options))
    with pytest.raises(UserError, match=named):
        sources.scan(raw, BOTH, partial=True)


def test_an_unlabelled_image_with_a_wnid_is_refused(tmp_path: Path) -> None:
    raw = hugging_face(tmp_path)
    parquet(tmp_path / TEST, [train_row(A, 9, -1)])
    with pytest.raises(UserError, match="has a WNID in its path, but no label"):
        sources.scan(str(raw), BOTH, partial=True)


def test_all_parts_must_be_there_unless_partial(tmp_path: Path) -> None:
    raw = hugging_face(tmp_path)
    (raw / SECOND).unlink()
    with pytest.raises(UserError, match=rf"{SECOND} is not there \(1 of 2 missing\).*--partial"):
        sources.scan(str(raw), BOTH)
    assert sources.scan(str(raw), BOTH, partial=True).count("train") == 2
    (raw / VALIDATION).unlink()
    with pytest.raises(UserError, match=r"needs validation-\*\.parquet, not there"):
        sources.scan(str(raw), BOTH, partial=True)


def test_labels_of_a_partial_set_are_ranks_among_its_classes(tmp_path: Path) -> None:
    names = tuple(f"name {label}" for label in range(1000))
    rows = [train_row(C, 1, 700), train_row(A, 1, 3)]
    raw = str(hugging_face(tmp_path, train=rows, val=[val_row(1, B, 40)], names=names))
    with pytest.raises(UserError, match=r"3 classes have images, but the labels go to 700"):
        sources.scan(raw, BOTH)
    source = sources.scan(raw, ["train"], partial=True)
    assert source.table.select(["wnid", "label"]).to_pylist() == [
        {"wnid": C, "label": 2},
        {"wnid": A, "label": 0},
    ]
    assert source.class_names == ("name 3", "name 40", "name 700")
    assert source.notes[0].startswith("labels are ranks among the 3 classes")


def test_class_names_are_the_wnids_when_the_files_tell_none(tmp_path: Path) -> None:
    raw = str(hugging_face(tmp_path, names=()))
    assert sources.scan(raw, BOTH).class_names == (A, B, C)


def test_files_may_lie_in_raw_itself_and_have_a_hash(tmp_path: Path) -> None:
    parquet(tmp_path / "train-00000-of-00001-0123456789abcdef.parquet", [train_row(A, 1, 0)])
    assert sources.scan(str(tmp_path), ["train"]).table.num_rows == 1
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [train_row(A, 1, 0)])
    with pytest.raises(UserError, match="several sets of train files"):
        sources.scan(str(tmp_path), ["train"])


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"image": ["a.JPEG"], "label": [0]}, "column image is string, expected a struct"),
        ({"label": [0]}, "column image is not there"),
        ({"image": [{"path": "a"}], "label": [0]}, r"column image is struct<path: string>"),
        ({"image": [{"bytes": b"x", "path": "a"}]}, "column label is not there"),
        ({"image": [{"bytes": b"x", "path": "a"}], "label": ["a"]}, "column label is string"),
    ],
)
def test_other_columns_are_refused(
    tmp_path: Path, columns: dict[str, list[Any]], named: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=named):
        sources.scan(str(tmp_path), ["train"])


def own_set(folder: Path, train: list[Row], names: Sequence[str], val: list[Row] = []) -> str:  # noqa: B006
    for split, rows in (("train", train), ("validation", val)):
        if rows:
            parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows, names=names)
    return str(folder)


def test_own_classes_are_the_names_of_the_labels_and_keys_come_from_file_and_row(
    tmp_path: Path,
) -> None:
    train = [(None, 1), ("1.jpg", 0), (None, 0), ("x/1.jpg", 1), ("only one.png", 1)]
    raw = own_set(tmp_path, train, ["dog", "cat"], [(None, 0)])
    source = sources.scan(raw, BOTH, partial=True)
    rows = source.table.to_pylist()
    assert source.wnids == source.class_names == ("cat", "dog")
    assert [(row["wnid"], row["label"]) for row in rows] == [
        *[("cat", 0), ("dog", 1), ("dog", 1), ("cat", 0), ("cat", 0)],
        ("dog", 1),
    ]
    keys = [row["key"] for row in rows]
    assert keys[0] == "train-00000-of-00001-0" and keys[5] == "validation-00000-of-00001-0"
    assert (
        len(set(keys)) == 6 and keys[1].startswith("data_1-") and keys[4].startswith("data_only_")
    )
    assert "ranks of the sorted class names" in source.notes[0]
    with reads.Reader(raw, rows) as reader:
        assert sorted(position for position, _ in reader) == [*range(6)]


def test_images_may_have_bytes_and_no_path_at_all(tmp_path: Path) -> None:
    label = json.dumps({"info": {"features": {"label": {"names": ["a"]}}}})
    table = pa.table({"image": [{"bytes": b"x"}, {"bytes": b"yy"}], "label": [0, 0]})
    table = table.replace_schema_metadata({"huggingface": label})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    rows = sources.scan(str(tmp_path), ["train"]).table.to_pylist()
    with reads.Reader(str(tmp_path), rows) as reader:
        assert dict(reader) == {0: b"x", 1: b"yy"}


@pytest.mark.parametrize(
    ("train", "names", "named"),
    [
        ([(None, 0)], ("a", "b"), "1 of 2 classes have no image, first b; .*--partial"),
        ([(None, 0), (None, 2)], ("a", "b"), r"row 1 has label 2 \(1 such rows\); expected 0 to 1"),
        ([(None, 0), (None, None)], ("a",), r"row 1 has label -1"),
        ([(None, 0), (None, 1)], ("a", "a"), "two classes have one name"),
        ([(None, 0)], (), r"has no image\.path.*or names of the labels in a ClassLabel feature"),
    ],
)
def test_own_labels_without_a_class_are_refused(tmp_path: Path, train, names, named) -> None:
    with pytest.raises(UserError, match=named):
        sources.scan(own_set(tmp_path, train, names), ["train"])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    raw = hugging_face(tmp_path)
    data = (raw / FIRST).read_bytes()
    for damaged in (b"", b"PAR1" + bytes(200), data[: len(data) // 2]):
        (raw / FIRST).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{FIRST} is damaged .*fetch it again"):
            sources.scan(str(raw), BOTH)


def test_a_name_of_a_column_that_is_no_utf_8_is_damage(tmp_path: Path) -> None:
    raw = hugging_face(tmp_path)
    data = (raw / FIRST).read_bytes()
    (raw / FIRST).write_bytes(data.replace(b"label", b"\x80abel"))
    with pytest.raises(UserError, match=rf"{FIRST} is damaged .*fetch it again"):
        sources.scan(str(raw), BOTH)


def test_rows_of_val_and_train_rank_together(tmp_path: Path) -> None:
    """The same labels whichever splits are built."""
    raw = str(hugging_face(tmp_path, train=TRAIN[:2], val=VAL[:1]))
    assert sources.scan(raw, ["val"]).table["label"].to_pylist() == [2]


def test_a_path_that_is_no_utf_8_is_damage_and_not_a_name(tmp_path: Path) -> None:
    raw = hugging_face(tmp_path / "raw")
    table = pq.read_table(raw / FIRST)
    image = table["image"].combine_chunks()
    paths = [b"\x80" + path.encode() for path in image.field("path").to_pylist()]
    wrong = pa.array(paths, pa.binary()).cast(pa.string(), safe=False)
    image = pa.StructArray.from_arrays([image.field("bytes"), wrong], ["bytes", "path"])
    pq.write_table(
        table.set_column(table.schema.get_field_index("image"), "image", image), raw / FIRST
    )
    with pytest.raises(UserError, match=rf"{FIRST} is damaged .*fetch it again"):
        sources.scan(str(raw), ("train", "val"))
