"""pipelines/sources/ilsvrc.py: the archives of 2010 with their replacements."""

from pathlib import Path

import pytest
from drawn import A, B, archives_2010, devkit, jpeg, tar

from alexnet.errors import UserError
from pipelines import sources, storage

SPLITS = ("train", "val", "test")
PATCHES = "patch_images.tar"


def images(source: sources.Source) -> dict[str, tuple[str, str, int, bytes]]:
    return {
        row["name"]: (
            row["split"],
            row["wnid"],
            row["label"],
            storage.read(f"{source.raw}/{row['source']}", row["offset"], row["size"]),
        )
        for row in source.table.to_pylist()
    }


def test_every_split_is_labelled_and_every_patch_applied(tmp_path: Path) -> None:
    source = sources.scan(str(archives_2010(tmp_path)), SPLITS)
    assert source.layout == "ilsvrc2010"
    assert source.wnids == (A, B)
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
    assert source.notes == tuple(f"{PATCHES}: replaced 1 images of {split}" for split in SPLITS)
    assert PATCHES in dict(source.containers)
    assert "ILSVRC2010_ID" in source.labels_from["test"]
    assert not source.official


def test_patches_of_a_split_that_is_not_built_are_left_out(tmp_path: Path) -> None:
    source = sources.scan(str(archives_2010(tmp_path, train=None, truth=None)), ["val"])
    assert source.table["source"].to_pylist() == ["ILSVRC2010_images_val.tar", PATCHES]


def test_blank_images_are_not_taken_for_good_ones_without_the_patches(tmp_path: Path) -> None:
    raw = str(archives_2010(tmp_path, patches=None))
    with pytest.raises(UserError, match=rf"{PATCHES} is not there, .* blank; add it or pass --par"):
        sources.scan(raw, SPLITS)
    assert images(sources.scan(raw, SPLITS, partial=True))[f"{B}_2.JPEG"][3] == jpeg(12)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([(f"patch_images/train/{A}_9.JPEG", b"x")], rf"replaces train/{A}_9\.JPEG, which the tr"),
        (
            [(f"train/{A}_1.JPEG", b"x"), (f"p/train/{A}_1.JPEG", b"x")],
            "two images of one name in train",
        ),
        ([(f"patch_images/valid/{A}_1.JPEG", b"x")], r"expected train/, val/ or test/"),
        ([(f"{A}_1.JPEG", b"x")], r"expected train/, val/ or test/"),
    ],
)
def test_a_patch_that_fits_no_image_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sources.scan(str(archives_2010(tmp_path, patches=tar(members))), SPLITS)


def test_what_is_no_image_in_the_patches_is_ignored_and_a_part_may_lack_some(
    tmp_path: Path,
) -> None:
    patches = tar([("patch_images/readme.txt", b"x"), (f"patch_images/train/{A}_9.JPEG", b"x")])
    source = sources.scan(str(archives_2010(tmp_path, patches=patches)), SPLITS, partial=True)
    told = "ignored 1 members that are no images, first patch_images/readme.txt"
    assert source.notes[0] == f"{PATCHES}: {told}"
    assert source.accounts.ignored_members == {PATCHES: 1}
    assert PATCHES not in source.table["source"].to_pylist()


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("truth", "ILSVRC2010_test_ground_truth.txt"),
        ("devkit", "ILSVRC2010_devkit-1.0.tar.gz"),
        ("test", "ILSVRC2010_images_test.tar"),
    ],
)
def test_what_the_labels_need_is_named(tmp_path: Path, left_out: str, named: str) -> None:
    raw = archives_2010(tmp_path, **{left_out: None})
    with pytest.raises(UserError, match=f"--splits train,val,test needs {named}, not there"):
        sources.scan(str(raw), SPLITS)


def test_counts_are_checked_in_every_split(tmp_path: Path) -> None:
    for replaced, message in [
        ({"truth": b"1\n2\n2\n"}, "test has 2 images, .* ground truth has 3 lines"),
        ({"truth": b"1\n"}, "2 images in all, but the ground truth has 1 lines"),
        ({"devkit": devkit([B, A], 3, "2\n1\n", year=2010)}, "has 2 train .* announces 3"),
    ]:
        with pytest.raises(UserError, match=message):
            sources.scan(str(archives_2010(tmp_path, **replaced)), SPLITS)
