"""pipelines/sources/huggingface.py: parquet files with embedded images."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn import A, B, C
from drawn_layouts import NAMES, TRAIN, VAL, Row, hugging_face, parquet, train_row, val_row

from alexnet.errors import UserError
from pipelines import reads, sources

BOTH = ("train", "val")
TEST = "data/test-00000-of-00001.parquet"
FIRST, SECOND = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
VALIDATION = "data/validation-00000-of-00001.parquet"


def test_rows_name_file_and_row_and_have_the_canonical_name(tmp_path):
    source = sources.scan(str(hugging_face(tmp_path)), (*BOTH, "test"))
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
            ("test", "ILSVRC2012_test_00000001.JPEG", -1, "", TEST, 0),
            ("test", "ILSVRC2012_test_00000002.JPEG", -1, "", TEST, 1),
        ]
    ]
    assert source.table["size"].null_count == 9
    assert (source.class_names, source.shuffle) == (NAMES, "source")
    names = (FIRST, SECOND, VALIDATION, TEST)
    assert source.containers == tuple((name, (tmp_path / name).stat().st_size) for name in names)


def test_files_that_are_sorted_by_class_are_mixed(tmp_path):
    rows = [train_row(wnid, n, label) for label, wnid in enumerate((A, B, C)) for n in range(12)]
    assert sources.scan(str(hugging_face(tmp_path, train=rows)), BOTH).shuffle == "classes"


def test_images_are_not_read(tmp_path):
    raw = hugging_face(tmp_path, size=3000)
    expected = sources.scan(str(raw), BOTH).table
    for path in raw.rglob("*.parquet"):
        data = bytearray(path.read_bytes())
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                chunk = file.metadata.row_group(group).column(0)
                assert chunk.path_in_schema == "image.bytes"
                start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
                size = chunk.total_compressed_size
                data[start : start + size] = b"\xff" * size
        path.write_bytes(data)
    assert sources.scan(str(raw), BOTH).table.equals(expected)


SWAPPED = [train_row(A, 1, 2), train_row(C, 1, 0)]
A_1, VAL_1 = train_row(A, 1, 0), "ILSVRC2012_val_00000001.JPEG"


@pytest.mark.parametrize(
    ("train", "val", "named"),
    [
        ([*TRAIN[:2], train_row(C, 2, 1)], VAL, rf"{B} with label 1, {SECOND} row 0 has {C} with"),
        ([A_1], [val_row(1, A, 1)], rf"{FIRST} row 0 has {A} with .*{VALIDATION} row 0 has {A}"),
        (SWAPPED, [val_row(1, B, 1)], r"label 0, .* with label 1; labels must be ranks of sorted"),
        ([(f"{A}_1_{B}.JPEG", 0)], VAL, rf"row 0 \({A}_1_{B}\.JPEG, label 0\) has two WNIDs"),
        ([TRAIN[0], train_row(A, 1, -1)], VAL, "row 0 .* is in train without a label"),
        (TRAIN, [val_row(1, A, None)], "row 0 .* is in val without a label"),
        (TRAIN, [(VAL_1, 0)], "or a WNID in its paths where that has none"),
        ([*TRAIN[:3], (None, 0)], VAL, r"row 1 \(None, label 0\) has no image\.path"),
        ([train_row(A, 1, -2)], VAL, "impossible label"),
        (TRAIN, VAL, "has a WNID in its path, but no label"),  # in test
    ],
)
def test_contradictions_are_refused_with_file_and_row(tmp_path, train, val, named):
    raw = hugging_face(tmp_path, train=train, val=val)
    if "in its path, but" in named:
        parquet(raw / TEST, [train_row(A, 9, -1)])
    with pytest.raises(UserError, match=named):
        sources.scan(str(raw), BOTH, partial=True)


def test_all_parts_must_be_there_unless_partial(tmp_path):
    raw = hugging_face(tmp_path)
    (raw / SECOND).unlink()
    with pytest.raises(UserError, match=rf"{SECOND} is not there \(1 of 2 missing\).*--partial"):
        sources.scan(str(raw), BOTH)
    assert sources.scan(str(raw), BOTH, partial=True).count("train") == 2
    (raw / VALIDATION).unlink()
    with pytest.raises(UserError, match=r"needs validation-\*\.parquet, not there"):
        sources.scan(str(raw), BOTH, partial=True)


def test_labels_are_ranks_among_the_classes_of_train_and_val_whichever_are_built(tmp_path):
    names = tuple(f"name {label}" for label in range(1000))
    rows = [train_row(C, 1, 700), train_row(A, 1, 3)]
    raw = str(hugging_face(tmp_path, train=rows, val=[val_row(1, B, 40)], names=names))
    with pytest.raises(UserError, match=r"3 classes have images, but the labels go to 700"):
        sources.scan(raw, BOTH)
    source = sources.scan(raw, ["train"], partial=True)
    rows = source.table.select(["wnid", "label"]).to_pylist()
    assert rows == [{"wnid": C, "label": 2}, {"wnid": A, "label": 0}]
    assert source.class_names == ("name 3", "name 40", "name 700")
    assert source.notes[0].startswith("labels are ranks among the 3 classes")
    assert sources.scan(raw, ["val"], partial=True).table["label"].to_pylist() == [1]


def test_class_names_are_the_wnids_when_the_files_tell_none(tmp_path):
    raw = str(hugging_face(tmp_path, names=()))
    assert sources.scan(raw, BOTH).class_names == (A, B, C)


def test_files_may_lie_in_raw_itself_and_have_a_hash(tmp_path):
    parquet(tmp_path / "train-00000-of-00001-0123456789abcdef.parquet", [A_1])
    assert sources.scan(str(tmp_path), ["train"]).table.num_rows == 1
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [A_1])
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
def test_other_columns_are_refused(tmp_path, columns, named):
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=named):
        sources.scan(str(tmp_path), ["train"])


def own_set(folder: Path, train: list[Row], names: Sequence[str]) -> str:
    parquet(folder / "data" / "train-00000-of-00001.parquet", train, names=names)
    return str(folder)


def test_own_classes_are_the_names_of_the_labels_and_keys_come_from_file_and_row(tmp_path):
    train = [(None, 1), ("1.jpg", 0), (None, 0), ("x/1.jpg", 1), ("only one.png", 1)]
    raw = own_set(tmp_path, train, ["dog", "cat"])
    parquet(tmp_path / VALIDATION, [(None, 0)], names=["dog", "cat"])
    source = sources.scan(raw, BOTH, partial=True)
    rows = source.table.to_pylist()
    assert source.wnids == source.class_names == ("cat", "dog")
    ranks = [0, 1, 1, 0, 0, 1]
    assert [(row["wnid"], row["label"]) for row in rows] == [(source.wnids[k], k) for k in ranks]
    keys = [row["key"] for row in rows]
    assert keys[0] == "train-00000-of-00001-0" and keys[5] == "validation-00000-of-00001-0"
    assert keys[1].startswith("data_1-") and keys[4].startswith("data_only_")
    assert len(set(keys)) == 6 and "ranks of the sorted class names" in source.notes[0]
    with reads.Reader(raw, rows) as reader:
        assert sorted(position for position, _ in reader) == [*range(6)]


def test_images_may_have_bytes_and_no_path_at_all(tmp_path):
    table = pa.table({"image": [{"bytes": b"x"}, {"bytes": b"yy"}], "label": [0, 0]})
    label = '{"info": {"features": {"label": {"names": ["a"]}}}}'
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
def test_own_labels_without_a_class_are_refused(tmp_path, train, names, named):
    with pytest.raises(UserError, match=named):
        sources.scan(own_set(tmp_path, train, names), ["train"])


def in_no_utf8(raw: Path) -> bytes:
    """The first train file with paths that are no text."""
    table = pq.read_table(raw / FIRST)
    image = table["image"].combine_chunks()
    paths = [b"\x80" + path.encode() for path in image.field("path").to_pylist()]
    wrong = pa.array(paths, pa.binary()).cast(pa.string(), safe=False)
    image = pa.StructArray.from_arrays([image.field("bytes"), wrong], ["bytes", "path"])
    buffer = pa.BufferOutputStream()
    pq.write_table(table.set_column(0, "image", image), buffer)
    return buffer.getvalue().to_pybytes()


def test_a_damaged_file_is_refused(tmp_path):
    raw = hugging_face(tmp_path)
    data = (raw / FIRST).read_bytes()
    wrong_text = [data.replace(b"label", b"\x80abel"), in_no_utf8(raw)]
    for damaged in (b"", b"PAR1" + bytes(200), data[: len(data) // 2], *wrong_text):
        (raw / FIRST).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{FIRST} is damaged .*fetch it again"):
            sources.scan(str(raw), BOTH)
