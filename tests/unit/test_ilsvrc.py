"""pipelines/sources/ilsvrc.py, the archives of 2012: where each image lies, what its label is."""

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from drawn import A, B, C, archives, devkit, imagefolder, jpeg, tar

from alexnet.errors import UserError
from pipelines import sources, storage
from pipelines.sources import devkit as devkits
from pipelines.sources import ilsvrc

BOTH = ("train", "val")
ZEROS = bytes(1024)


def labels(source: sources.Source) -> dict[str, tuple[str, int]]:
    rows = source.table.to_pylist()
    return {row["name"]: (row["wnid"], row["label"]) for row in rows}


def test_labels_are_ranks_of_sorted_wnids_not_ids(tmp_path: Path) -> None:
    source = sources.scan(str(archives(tmp_path)), BOTH)
    assert source.wnids == (A, B, C)
    assert source.class_names == (f"name of {A}", f"name of {B}", f"name of {C}")
    assert labels(source) == {
        f"{A}_3.JPEG": (A, 0),
        f"{A}_7.JPEG": (A, 0),
        f"{B}_3.JPEG": (B, 1),
        f"{B}_7.JPEG": (B, 1),
        f"{C}_3.JPEG": (C, 2),
        f"{C}_7.JPEG": (C, 2),
        # ground truth 3, 1, 2 by number in the name; IDs: C = 1, A = 2, B = 3
        "ILSVRC2012_val_00000001.JPEG": (B, 1),
        "ILSVRC2012_val_00000002.JPEG": (C, 2),
        "ILSVRC2012_val_00000003.JPEG": (A, 0),
    }


def test_every_byte_range_is_the_image_that_tarfile_extracts(drawn_raw: str) -> None:
    rows = sources.scan(drawn_raw, BOTH).table.to_pylist()
    expected = {}
    with tarfile.open(f"{drawn_raw}/ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                expected |= {info.name: inner.extractfile(info).read() for info in inner}
    with tarfile.open(f"{drawn_raw}/ILSVRC2012_img_val.tar") as val:
        expected |= {info.name: val.extractfile(info).read() for info in val}
    assert {row["name"] for row in rows} == expected.keys()
    for row in rows:
        data = storage.read(f"{drawn_raw}/{row['source']}", row["offset"], row["size"])
        assert data == expected[row["name"]]


def test_the_train_archive_alone_is_enough_for_train(tmp_path: Path) -> None:
    raw = str(archives(tmp_path, val=None, devkit=None))
    source = sources.scan(raw, ["train"], partial=True)
    assert source.wnids == source.class_names == (A, B, C)
    assert source.announced is None
    assert not source.official
    with pytest.raises(UserError, match=r"bytes, the published one 147,897,477,120; .*--partial"):
        sources.scan(raw, ["train"])


@pytest.mark.parametrize(
    ("left_out", "splits", "named"),
    [
        ("devkit", BOTH, "ILSVRC2012_devkit_t12.tar.gz"),
        ("val", BOTH, "ILSVRC2012_img_val.tar"),
        ("train", ["train"], "ILSVRC2012_img_train.tar"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, left_out: str, splits: list[str], named: str
) -> None:
    raw = archives(tmp_path, **{left_out: None})
    with pytest.raises(UserError, match=rf"--splits {','.join(splits)} needs {named}, not there"):
        sources.scan(str(raw), splits)


def test_two_layouts_at_once_are_ambiguous(tmp_path: Path) -> None:
    imagefolder(archives(tmp_path), {f"train/{A}/{A}_1.JPEG": b"x"})
    with pytest.raises(UserError, match=r"ambiguous: it holds ILSVRC archives and also class fold"):
        sources.scan(str(tmp_path), BOTH)


def test_an_unknown_layout_says_what_is_expected_and_found(tmp_path: Path) -> None:
    imagefolder(tmp_path, {"data/readme.md": b"x"})
    with pytest.raises(UserError, match=r"no known layout; expected ILSVRC2012.*found data$"):
        sources.scan(str(tmp_path), BOTH)
    with pytest.raises(UserError, match=r"no folder with files of that name"):
        sources.scan(str(tmp_path / "missing"), BOTH)


def test_fewer_images_than_announced_are_refused_with_both_numbers(tmp_path: Path) -> None:
    raw = str(archives(tmp_path, devkit=devkit([C, A, B], 1300, "3\n1\n2\n")))
    with pytest.raises(UserError, match=r"has 2 train .* announces 1,300 .*6 of 3,900.*--partial"):
        sources.scan(raw, BOTH)
    source = sources.scan(raw, BOTH, partial=True)
    assert source.announced == {"train": 3900, "val": 3}
    assert source.table.num_rows == 9


def test_one_image_more_than_announced_is_refused_with_both_numbers(tmp_path: Path) -> None:
    """Nobody knows which of them is the stranger."""
    raw = str(archives(tmp_path, devkit=devkit([C, A, B], [2, 1, 2], "3\n1\n2\n")))
    with pytest.raises(
        UserError, match=rf"{A} has 2 train .* announces 1 \(1 of 3 .* 6 of 5 in al"
    ):
        sources.scan(raw, BOTH)
    assert sources.scan(raw, BOTH, partial=True).count("train") == 6


def test_ground_truth_of_another_length_is_refused_with_both_numbers(tmp_path: Path) -> None:
    short = archives(tmp_path / "short", devkit=devkit([C, A, B], 2, "3\n1\n"))
    with pytest.raises(UserError, match=r"3 images in all, but .* ground truth has 2 lines"):
        sources.scan(str(short), BOTH)
    long = archives(tmp_path / "long", devkit=devkit([C, A, B], 2, "3\n1\n2\n2\n"))
    with pytest.raises(UserError, match=r"3 images, .* ground truth has 4 lines.*--partial"):
        sources.scan(str(long), BOTH)
    assert sources.scan(str(long), BOTH, partial=True).count("val") == 3


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([(f"{A}.tar", tar([(f"{B}_1.JPEG", b"x")]))], rf"{A}\.tar holds {B}_1\.JPEG"),
        ([(f"{A}.tar", tar([("readme.txt", b"x")]))], r"holds readme\.txt"),
        ([("._x.tar", b"x")], r"img_train\.tar holds no image"),
        ([("n1.tar", tar([("n1_1.JPEG", b"x")]))], r"holds n1\.tar; expected only nXXXXXXXX"),
        ([("readme.txt", b"x")], r"holds readme\.txt"),
        ([("n99999999.tar", tar([("n99999999_1.JPEG", b"x")]))], "no class of the devkit"),
    ],
)
def test_strange_members_of_the_train_archive_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], named: str
) -> None:
    raw = archives(tmp_path, train=tar(members))
    with pytest.raises(UserError, match=named):
        sources.scan(str(raw), ["train"], partial=True)


def test_litter_of_desktop_systems_is_left_out_and_told(tmp_path: Path) -> None:
    inner = tar([(f"{A}_1.JPEG", jpeg(1)), (f"._{A}_1.JPEG", b"x"), (".DS_Store", b"x")])
    train = tar([(f"{A}.tar", inner), (f"__MACOSX/._{A}.tar", b"x")])
    source = sources.scan(str(archives(tmp_path, train=train)), ["train"], partial=True)
    assert source.table["name"].to_pylist() == [f"{A}_1.JPEG"]
    (note,) = source.notes
    assert "img_train.tar: ignored 3 files that desktop systems leave behind" in note
    assert source.accounts.ignored_members == {"ILSVRC2012_img_train.tar": 3}


@pytest.mark.parametrize(
    "name", ["ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar"], ids=["new", "old"]
)
@pytest.mark.parametrize("prefix", ["", "test/"], ids=["flat", "folder"])
def test_the_test_split_has_no_labels(tmp_path: Path, name: str, prefix: str) -> None:
    images = [(f"{prefix}ILSVRC2012_test_{n:08d}.JPEG", jpeg(n)) for n in (2, 1)]
    raw = imagefolder(archives(tmp_path), {name: tar(images)})
    source = sources.scan(str(raw), ("train", "val", "test"))
    rows = [row for row in source.table.to_pylist() if row["split"] == "test"]
    assert [(row["name"], row["wnid"], row["label"], row["source"]) for row in rows] == [
        ("ILSVRC2012_test_00000002.JPEG", "", -1, name),
        ("ILSVRC2012_test_00000001.JPEG", "", -1, name),
    ]
    assert source.wnids == (A, B, C)
    assert source.announced == {"train": 6, "val": 3}
    assert "without labels" in source.labels_from["test"]
    told = [note for note in source.notes if "before its patch of 10 October 2019" in note]
    assert len(told) == (name == "ILSVRC2012_img_test.tar")


def test_the_archive_after_the_patch_is_preferred(tmp_path: Path) -> None:
    new, old = "ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar"
    data = tar([("ILSVRC2012_test_00000001.JPEG", b"x")])
    raw = imagefolder(archives(tmp_path), {new: data, old: data})
    source = sources.scan(str(raw), ["test"])
    assert source.containers == ((new, len(data)),)
    assert source.notes == (f"ignored 1 entry: 1 unused (first {old})",)


@pytest.mark.parametrize("other", ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_test_1.JPEG", "x"])
def test_foreign_members_of_flat_archives_are_refused(tmp_path: Path, other: str) -> None:
    test = tar([("ILSVRC2012_test_00000001.JPEG", b"x"), (other, b"x")])
    raw = imagefolder(archives(tmp_path), {"ILSVRC2012_img_test.tar": test})
    with pytest.raises(UserError, match=f"holds {other}; expected only ILSVRC2012_test_"):
        sources.scan(str(raw), ["test"], partial=True)
    val = tar([("ILSVRC2012_test_00000001.JPEG", b"x")])
    with pytest.raises(UserError, match="expected only ILSVRC2012_val_"):
        sources.scan(str(archives(tmp_path, val=val)), ["val"], partial=True)


def test_the_same_name_in_two_folders_is_refused(tmp_path: Path) -> None:
    val = tar([(f"{folder}/ILSVRC2012_val_00000001.JPEG", b"x") for folder in "ab"])
    with pytest.raises(
        UserError, match=r"1 names are those of several val files \(ILSVRC2012_val_00000001;"
    ):
        sources.scan(str(archives(tmp_path, val=val)), ["val"], partial=True)


def test_archives_of_two_years_or_a_devkit_of_the_other_are_refused(tmp_path: Path) -> None:
    raw = archives(tmp_path / "kit", devkit=None)
    imagefolder(raw, {"ILSVRC2010_devkit-1.0.tar.gz": b"x"})
    with pytest.raises(UserError, match=r"2010_devkit-1\.0\.tar\.gz is the devkit of another year"):
        sources.scan(str(raw), ["train"], partial=True)
    raw = imagefolder(archives(tmp_path / "both"), {"ILSVRC2010_images_val.tar": b"x"})
    with pytest.raises(UserError, match="archives of ILSVRC2012 and of ILSVRC2010"):
        sources.scan(str(raw), BOTH)


def test_a_promise_is_checked_on_any_table_of_split_and_wnid(tmp_path: Path) -> None:
    kit = devkits.load(str(archives(tmp_path) / devkits.NAME))
    rows = sources.scan(str(tmp_path), BOTH).table
    assert ilsvrc.announced(kit, BOTH) == {"train": 6, "val": 3}
    assert ilsvrc.announced(None, BOTH) is None
    ilsvrc.check_promise("RAW", kit, rows, BOTH)
    with pytest.raises(UserError, match=f"RAW: {C} has 1 train images, the devkit announces 2"):
        ilsvrc.check_promise("RAW", kit, rows.filter(pc.not_equal(rows["key"], f"{C}_3")), BOTH)
    more = pa.concat_tables([rows, rows.filter(pc.equal(rows["split"], "val")).slice(0, 1)])
    with pytest.raises(UserError, match=r"RAW: val has 4 images, .* 3 lines"):
        ilsvrc.check_promise("RAW", kit, more, BOTH)
    without_val = rows.filter(pc.equal(rows["split"], "train"))
    ilsvrc.check_promise("RAW", kit, without_val, ["train"])
    with pytest.raises(UserError, match=r"RAW: val has 0 images, .* 3 lines"):
        ilsvrc.check_promise("RAW", kit, without_val, BOTH)
