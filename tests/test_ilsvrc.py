"""pipelines/sources.py, tars.py, devkit.py: which picture lies where, and what its label is."""

import csv
import gzip
import io
import tarfile
from pathlib import Path

import pytest
from drawn import A, B, C, archives, devkit, imagefolder, jpeg, tar

from alexnet.errors import UserError
from pipelines import sources, storage, tars

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


def test_every_byte_range_is_the_picture_that_tarfile_extracts(drawn_raw: str) -> None:
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


@pytest.mark.parametrize("layout", ["ilsvrc", "imagefolder"])
def test_tiny20_has_the_labels_of_its_ground_truth(data_folder: Path, layout: str) -> None:
    source = sources.scan(str(data_folder / "tiny20" / layout), BOTH, partial=True)
    with (data_folder / "tiny20" / "ground_truth.csv").open() as file:
        truth = {
            (row["split"], row["file"]): (row["wnid"], int(row["index"]))
            for row in csv.DictReader(file)
        }
    found = {
        (row["split"], row["name"]): (row["wnid"], row["label"]) for row in source.table.to_pylist()
    }
    assert found == truth
    assert (source.count("train"), source.count("val"), len(source.wnids)) == (79, 30, 20)


def test_the_train_archive_alone_is_enough_for_train(tmp_path: Path) -> None:
    raw = str(archives(tmp_path, val=None, devkit=None))
    source = sources.scan(raw, ["train"])
    assert source.wnids == source.class_names == (A, B, C)
    assert source.announced is None


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


def test_both_layouts_at_once_are_ambiguous(tmp_path: Path) -> None:
    imagefolder(archives(tmp_path), {f"train/{A}/{A}_1.JPEG": b"x"})
    with pytest.raises(UserError, match=r"ambiguous.*img_train\.tar.*train/"):
        sources.scan(str(tmp_path), BOTH)


def test_an_unknown_layout_says_what_is_expected_and_found(tmp_path: Path) -> None:
    imagefolder(tmp_path, {"data/train-00000.parquet": b"x"})
    with pytest.raises(UserError, match=r"no known layout; expected ILSVRC2012.*found data$"):
        sources.scan(str(tmp_path), BOTH)
    with pytest.raises(UserError, match=r"found nothing$"):
        sources.scan(str(tmp_path / "missing"), BOTH)


def test_fewer_pictures_than_announced_are_refused_with_both_numbers(tmp_path: Path) -> None:
    raw = str(archives(tmp_path, devkit=devkit([C, A, B], 1300, "3\n1\n2\n")))
    with pytest.raises(UserError, match=r"has 2 train .* announces 1,300 .*6 of 3,900.*--partial"):
        sources.scan(raw, BOTH)
    source = sources.scan(raw, BOTH, partial=True)
    assert source.announced == {"train": 3900, "val": 3}
    assert source.table.num_rows == 9


def test_ground_truth_of_another_length_is_refused_with_both_numbers(tmp_path: Path) -> None:
    short = archives(tmp_path / "short", devkit=devkit([C, A, B], 2, "3\n1\n"))
    with pytest.raises(UserError, match=r"3 pictures in all, but .* ground truth has 2 lines"):
        sources.scan(str(short), BOTH)
    long = archives(tmp_path / "long", devkit=devkit([C, A, B], 2, "3\n1\n2\n2\n"))
    with pytest.raises(UserError, match=r"3 pictures, .* ground truth has 4 lines.*--partial"):
        sources.scan(str(long), BOTH)
    assert sources.scan(str(long), BOTH, partial=True).count("val") == 3


@pytest.mark.parametrize("line", ["0", "4", "-1", "x"])
def test_a_ground_truth_line_that_is_no_id_is_refused(tmp_path: Path, line: str) -> None:
    raw = archives(tmp_path, devkit=devkit([C, A, B], 2, f"3\n{line}\n2\n"))
    with pytest.raises(UserError, match=r"line 2 of .* not an ILSVRC2012_ID from 1 to 3"):
        sources.scan(str(raw), BOTH)


def test_a_damaged_devkit_is_refused(tmp_path: Path) -> None:
    good = devkit([C, A, B], 2, "3\n1\n2\n")
    no_meta = gzip.compress(tar([("ILSVRC2012_validation_ground_truth.txt", b"1\n")]))
    bad_meta = gzip.compress(
        tar([("meta.mat", b"x" * 500), ("ILSVRC2012_validation_ground_truth.txt", b"1\n")])
    )
    for number, data in enumerate((good[: len(good) // 2], b"not gzip", no_meta, bad_meta)):
        raw = archives(tmp_path / str(number), devkit=data)
        with pytest.raises(UserError, match=r"devkit_t12\.tar\.gz.*(damaged|holds no meta)"):
            sources.scan(str(raw), BOTH)


def test_no_path_in_a_devkit_reaches_the_disk(tmp_path: Path) -> None:
    inner = gzip.decompress(devkit([C, A, B], 2, "3\n1\n2\n"))
    with tarfile.open(fileobj=io.BytesIO(inner)) as source:
        members = [(info.name, source.extractfile(info).read()) for info in source]
    evil = [(f"../../../{name}", data) for name, data in members] + [("/etc/evil", b"x")]
    raw = archives(tmp_path / "raw", devkit=gzip.compress(tar(evil)))
    before = sorted(tmp_path.rglob("*"))
    assert sources.scan(str(raw), BOTH).wnids == (A, B, C)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tar([(f"ILSVRC2012_val_{n:08d}.JPEG", jpeg(n)) for n in range(1, 4)])
    ends = [member.offset for member in tars.members(str(written(tmp_path, whole)), "it")]
    last_end = ends[-1] + len(jpeg(3))
    for length in [0, 300, *(end - 512 for end in ends), *(end + 5 for end in ends), last_end]:
        path = written(tmp_path, whole[:length])
        with pytest.raises(UserError, match=r"cut|no uncompressed tar"):
            tars.members(str(path), "it")


def written(folder: Path, data: bytes) -> Path:
    (folder / "it.tar").write_bytes(data)
    return folder / "it.tar"


def test_zeros_or_rubbish_inside_a_tar_are_not_taken_for_its_end(tmp_path: Path) -> None:
    whole = bytearray(tar([(f"ILSVRC2012_val_{n:08d}.JPEG", jpeg(n)) for n in range(1, 4)]))
    second = tars.members(str(written(tmp_path, bytes(whole))), "it")[1].offset - 512
    for rubbish in (bytes(1024), b"\xff" * 1024):
        whole[second : second + 1024] = rubbish
        with pytest.raises(UserError, match=rf"no valid member at byte {second:,}"):
            tars.members(str(written(tmp_path, bytes(whole))), "it")


def test_a_cut_inner_tar_is_refused_by_its_name(tmp_path: Path) -> None:
    inner = tar([(f"{A}_1.JPEG", jpeg(1)), (f"{A}_2.JPEG", jpeg(2))])
    raw = archives(tmp_path, train=tar([(f"{A}.tar", inner[: len(inner) // 2])]))
    with pytest.raises(UserError, match=rf"{A}\.tar is cut"):
        sources.scan(str(raw), ["train"], partial=True)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    raw = archives(tmp_path, train=gzip.compress(tar([(f"{A}.tar", ZEROS)])))
    with pytest.raises(UserError, match="no uncompressed tar"):
        sources.scan(str(raw), ["train"])


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([(f"{A}.tar", tar([(f"{B}_1.JPEG", b"x")]))], rf"{A}\.tar holds {B}_1\.JPEG"),
        ([(f"{A}.tar", tar([("readme.txt", b"x")]))], r"holds readme\.txt"),
        ([(f"{A}.tar", tar([]))], "holds no picture"),
        ([("readme.txt", b"x")], r"holds readme\.txt"),
        ([(f"{A}.tar", tar([(f"{A}_1.JPEG", b"x")]))] * 2, rf"holds {A}\.tar twice"),
        ([(f"{A}.tar", tar([(f"{A}_1.JPEG", b"x")] * 2))], rf"2 train files are named {A}_1"),
        ([("n99999999.tar", tar([("n99999999_1.JPEG", b"x")]))], "no class of the devkit"),
    ],
)
def test_strange_members_of_the_train_archive_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], named: str
) -> None:
    raw = archives(tmp_path, train=tar(members))
    with pytest.raises(UserError, match=named):
        sources.scan(str(raw), ["train"], partial=True)


def test_a_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(UserError, match="is a link"):
        sources.scan(str(archives(tmp_path, val=buffer.getvalue())), ["val"])


def test_s3_gives_the_same_table_as_the_disk(drawn_raw: str, s3: str) -> None:
    for name, _ in storage.list_files(drawn_raw):
        storage.write(f"{s3}/drawn/{name}", Path(drawn_raw, name).read_bytes())
    assert sources.scan(f"{s3}/drawn", BOTH).table.equals(sources.scan(drawn_raw, BOTH).table)
