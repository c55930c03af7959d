"""pipelines/sources/ilsvrc.py, the archives of 2012 and of 2010 with their replacements."""

import tarfile

import pytest
from drawn import A, B, C, archives, archives_2010, devkit, imagefolder, jpeg, tar

from alexnet.errors import UserError
from pipelines import sources, storage

BOTH, ALL = ("train", "val"), ("train", "val", "test")
OLD, NEW = "ILSVRC2012_img_test.tar", "ILSVRC2012_img_test_v10102019.tar"
PATCHES = "patch_images.tar"


def test_labels_are_ranks_of_sorted_wnids_not_ids(tmp_path):
    source = sources.scan(str(archives(tmp_path)), BOTH)
    assert source.wnids == (A, B, C)
    assert source.class_names == (f"name of {A}", f"name of {B}", f"name of {C}")
    found = {row["name"]: (row["wnid"], row["label"]) for row in source.table.to_pylist()}
    train = {f"{w}_{n}.JPEG": (w, k) for k, w in enumerate((A, B, C)) for n in (3, 7)}
    # ground truth 3, 1, 2 by number in the name; IDs: C = 1, A = 2, B = 3
    val = {1: (B, 1), 2: (C, 2), 3: (A, 0)}
    assert found == train | {f"ILSVRC2012_val_{n:08d}.JPEG": told for n, told in val.items()}


def test_every_byte_range_is_the_image_that_tarfile_extracts(drawn_raw):
    expected = {}
    with tarfile.open(f"{drawn_raw}/ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                expected |= {info.name: inner.extractfile(info).read() for info in inner}
    with tarfile.open(f"{drawn_raw}/ILSVRC2012_img_val.tar") as val:
        expected |= {info.name: val.extractfile(info).read() for info in val}
    rows = sources.scan(drawn_raw, BOTH).table.to_pylist()
    assert {
        row["name"]: storage.read(f"{drawn_raw}/{row['source']}", row["offset"], row["size"])
        for row in rows
    } == expected


def test_the_train_archive_alone_is_enough_for_train(tmp_path):
    raw = str(archives(tmp_path, val=None, devkit=None))
    source = sources.scan(raw, ["train"], partial=True)
    assert source.wnids == source.class_names == (A, B, C)
    assert source.announced is None and not source.official
    with pytest.raises(UserError, match=r"bytes, the published one 147,897,477,120; .*--partial"):
        sources.scan(raw, ["train"])


@pytest.mark.parametrize(
    ("draw", "left_out", "named"),
    [
        (archives, "devkit", "ILSVRC2012_devkit_t12.tar.gz"),
        (archives, "val", "ILSVRC2012_img_val.tar"),
        (archives, "train", "ILSVRC2012_img_train.tar"),
        (archives_2010, "truth", "ILSVRC2010_test_ground_truth.txt"),
        (archives_2010, "devkit", "ILSVRC2010_devkit-1.0.tar.gz"),
    ],
)
def test_what_is_missing_is_named(tmp_path, draw, left_out, named):
    raw, splits = str(draw(tmp_path, **{left_out: None})), BOTH if draw == archives else ALL
    with pytest.raises(UserError, match=rf"--splits {','.join(splits)} needs {named}, not there"):
        sources.scan(raw, splits)


def test_two_layouts_or_years_at_once_and_an_unknown_one_are_refused(tmp_path):
    for name, named in (
        (f"train/{A}/{A}_1.JPEG", "ambiguous: it holds ILSVRC archives and also class fold"),
        ("ILSVRC2010_images_val.tar", "archives of ILSVRC2012 and of ILSVRC2010"),
    ):
        raw = imagefolder(archives(tmp_path / name[:6]), {name: b"x"})
        with pytest.raises(UserError, match=named):
            sources.scan(str(raw), BOTH)
    raw = archives(tmp_path / "kit", devkit=None)
    imagefolder(raw, {"ILSVRC2010_devkit-1.0.tar.gz": b"x"})
    with pytest.raises(UserError, match=r"2010_devkit-1\.0\.tar\.gz is the devkit of another year"):
        sources.scan(str(raw), ["train"], partial=True)
    raw = imagefolder(tmp_path / "unknown", {"data/readme.md": b"x"})
    with pytest.raises(UserError, match=r"no known layout; expected ILSVRC2012.*found data$"):
        sources.scan(str(raw), BOTH)
    with pytest.raises(UserError, match=r"no folder with files of that name"):
        sources.scan(str(tmp_path / "missing"), BOTH)


def kit(announced: int | list[int], truth: str) -> dict[str, bytes]:
    return {"devkit": devkit([C, A, B], announced, truth)}


KIT_2010 = {"devkit": devkit([B, A], 3, "2\n1\n", year=2010)}


@pytest.mark.parametrize(
    ("draw", "replaced", "named"),
    [
        (archives, kit(1300, "3\n1\n2\n"), "has 2 train .* 1,300 .*6 of 3,900.*--partial"),
        # One too many: nobody knows which of them is the stranger.
        (archives, kit([2, 1, 2], "3\n1\n2\n"), rf"{A} has 2 train .* announces 1 \(1 of 3"),
        (archives, kit(2, "3\n1\n2\n2\n"), r"3 images, .* ground truth has 4 lines.*--partial"),
        (archives, kit(2, "3\n1\n"), r"3 images in all, but .* ground truth has 2 lines"),
        (archives_2010, {"truth": b"1\n2\n2\n"}, "test has 2 images, .* truth has 3 lines"),
        (archives_2010, {"truth": b"1\n"}, "2 images in all, but the ground truth has 1 lines"),
        (archives_2010, KIT_2010, "has 2 train .* announces 3"),
    ],
    ids=range(7),
)
def test_other_counts_than_the_devkits_are_refused_with_both(tmp_path, draw, replaced, named):
    raw, splits = str(draw(tmp_path, **replaced)), BOTH if draw == archives else ALL
    with pytest.raises(UserError, match=named):
        sources.scan(raw, splits)
    if "in all, but" not in named:  # else an image has no label
        assert sources.scan(raw, splits, partial=True).table.num_rows in (8, 9)


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([(f"{A}.tar", tar([(f"{B}_1.JPEG", b"x")]))], rf"{A}\.tar holds {B}_1\.JPEG"),
        ([(f"{A}.tar", tar([("readme.txt", b"x")]))], r"holds readme\.txt"),
        ([("._x.tar", b"x")], r"img_train\.tar holds no image"),
        ([("n1.tar", tar([("n1_1.JPEG", b"x")]))], r"holds n1\.tar; expected only nXXXXXXXX"),
        ([("n99999999.tar", tar([("n99999999_1.JPEG", b"x")]))], "no class of the devkit"),
    ],
)
def test_strange_members_of_the_train_archive_are_refused(tmp_path, members, named):
    raw = archives(tmp_path, train=tar(members))
    with pytest.raises(UserError, match=named):
        sources.scan(str(raw), ["train"], partial=True)


@pytest.mark.parametrize(("name", "prefix"), [(NEW, ""), (OLD, "test/")])
def test_the_test_split_has_no_labels(tmp_path, name, prefix):
    images = [(f"{prefix}ILSVRC2012_test_{n:08d}.JPEG", jpeg(n)) for n in (2, 1)]
    source = sources.scan(str(imagefolder(archives(tmp_path), {name: tar(images)})), ALL)
    rows = [row for row in source.table.to_pylist() if row["split"] == "test"]
    assert [(row["name"], row["wnid"], row["label"], row["source"]) for row in rows] == [
        (f"ILSVRC2012_test_{n:08d}.JPEG", "", -1, name) for n in (2, 1)
    ]
    assert source.wnids == (A, B, C)
    assert source.announced == {"train": 6, "val": 3}
    assert "without labels" in source.labels_from["test"]
    told = [note for note in source.notes if "before its patch of 10 October 2019" in note]
    assert len(told) == (name == OLD)


def test_the_archive_after_the_patch_is_preferred(tmp_path):
    data = tar([("ILSVRC2012_test_00000001.JPEG", b"x")])
    source = sources.scan(str(imagefolder(archives(tmp_path), {NEW: data, OLD: data})), ["test"])
    assert source.containers == ((NEW, len(data)),)
    assert source.notes == (f"ignored 1 entry: 1 unused (first {OLD})",)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["ILSVRC2012_test_00000001"], "expected only ILSVRC2012_val_"),
        (["ILSVRC2012_val_1"], "holds ILSVRC2012_val_1.JPEG; expected only ILSVRC2012_val_"),
        ([f"{folder}/ILSVRC2012_val_00000001" for folder in "ab"], "1 names are those of several"),
    ],
)
def test_foreign_members_and_names_twice_in_flat_archives_are_refused(tmp_path, names, named):
    raw = archives(tmp_path, val=tar([(f"{name}.JPEG", b"x") for name in names]))
    with pytest.raises(UserError, match=named):
        sources.scan(str(raw), ["val"], partial=True)


# 2010


def images(source: sources.Source) -> dict[str, tuple[str, str, int, bytes]]:
    found = {}
    for row in source.table.to_pylist():
        data = storage.read(f"{source.raw}/{row['source']}", row["offset"], row["size"])
        found[row["name"]] = (row["split"], row["wnid"], row["label"], data)
    return found


def test_every_split_of_2010_is_labelled_and_every_patch_applied(tmp_path):
    source = sources.scan(str(archives_2010(tmp_path)), ALL)
    assert (source.layout, source.wnids, source.official) == ("ilsvrc2010", (A, B), False)
    assert images(source) == {
        f"{A}_1.JPEG": ("train", A, 0, jpeg(1)),
        f"{A}_2.JPEG": ("train", A, 0, jpeg(2)),
        f"{B}_1.JPEG": ("train", B, 1, jpeg(11)),
        f"{B}_2.JPEG": ("train", B, 1, jpeg(301)),
        # IDs: B = 1, A = 2; ground truth of val 2, 1, of test 1, 2
        "ILSVRC2010_val_00000001.JPEG": ("val", A, 0, jpeg(302)),
        "ILSVRC2010_val_00000002.JPEG": ("val", B, 1, jpeg(102)),
        "ILSVRC2010_test_00000001.JPEG": ("test", B, 1, jpeg(201)),
        "ILSVRC2010_test_00000002.JPEG": ("test", A, 0, jpeg(303)),
    }
    assert source.announced == {"train": 4, "val": 2, "test": 2}
    assert source.notes == tuple(f"{PATCHES}: replaced 1 images of {split}" for split in ALL)
    assert PATCHES in dict(source.containers)
    assert "ILSVRC2010_ID" in source.labels_from["test"]


def test_patches_of_a_split_that_is_not_built_are_left_out(tmp_path):
    source = sources.scan(str(archives_2010(tmp_path, train=None, truth=None)), ["val"])
    assert source.table["source"].to_pylist() == ["ILSVRC2010_images_val.tar", PATCHES]


def test_blank_images_are_not_taken_for_good_ones_without_the_patches(tmp_path):
    raw = str(archives_2010(tmp_path, patches=None))
    with pytest.raises(UserError, match=rf"{PATCHES} is not there, .* blank; add it or pass --par"):
        sources.scan(raw, ALL)
    assert images(sources.scan(raw, ALL, partial=True))[f"{B}_2.JPEG"][3] == jpeg(12)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"patch_images/train/{A}_9"], rf"replaces train/{A}_9\.JPEG, which the tr"),
        ([f"train/{A}_1", f"p/train/{A}_1"], "two images of one name in train"),
        ([f"patch_images/valid/{A}_1"], r"expected train/, val/ or test/"),
        ([f"{A}_1"], r"expected train/, val/ or test/"),
    ],
)
def test_a_patch_that_fits_no_image_is_refused(tmp_path, names, message):
    patches = tar([(f"{name}.JPEG", b"x") for name in names])
    with pytest.raises(UserError, match=message):
        sources.scan(str(archives_2010(tmp_path, patches=patches)), ALL)


def test_what_is_no_image_in_the_patches_is_ignored_and_a_part_may_lack_some(tmp_path):
    patches = tar([("patch_images/readme.txt", b"x"), (f"patch_images/train/{A}_9.JPEG", b"x")])
    source = sources.scan(str(archives_2010(tmp_path, patches=patches)), ALL, partial=True)
    told = "ignored 1 members that are no images, first patch_images/readme.txt"
    assert source.notes[0] == f"{PATCHES}: {told}"
    assert source.accounts.ignored_members == {PATCHES: 1}
    assert PATCHES not in source.table["source"].to_pylist()
