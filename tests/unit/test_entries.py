"""pipelines/entries.py: every entry of RAW is accounted for, once."""

import os
import tempfile
from pathlib import Path

import pytest
from drawn import A, B, C, devkit, imagefolder, jpeg, tar
from drawn_layouts import DATA, hugging_face, kaggle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alexnet.errors import UserError
from pipelines import entries, sources
from pipelines.sources import Source

BOTH = ("train", "val")
FOREIGN = {"__macosx", "lost+found", "@eadir"}
SET = {f"{split}/{c}/{c}{n}.jpg": b"x" for split in BOTH for c in "abc" for n in (1, 2)}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return imagefolder(tmp_path / "raw", SET)


def link(path: Path, target: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(str(target))


# A tree of files, links and folders, drawn at random

NAMES = ["a", "b", "c", "deep", ".git", "__MACOSX", "lost+found", "größe", "苹果"]
FILES = ["1.jpg", "1.png", "2.JPEG", "x.tif", "bare", ".DS_Store", "notes.txt", "apple (1).jpg"]
PLACES = st.lists(st.sampled_from(NAMES), max_size=3)
TOPS = st.sampled_from(["train", "val", "valid", "test", "other", ""])
KINDS = st.sampled_from(["file", "file", "file", "folder", "dangling", "loop", "link", "fifo"])
TREES = st.lists(st.tuples(TOPS, PLACES, st.sampled_from(FILES), KINDS), min_size=1, max_size=25)


def grow(root: Path, tree: list[tuple[str, list[str], str, str]]) -> None:
    for number, (top, place, name, kind) in enumerate(tree):
        folder = root.joinpath(top, *place)
        path = folder / (name if kind in ("file", "dangling") else f"{kind}{number}")
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            continue
        if kind == "file":
            path.write_bytes(b"x")
        elif kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to({"dangling": "nowhere", "loop": folder, "link": __file__}[kind])


def walked(root: Path) -> int:
    """Leaves of the tree; a folder that desktop systems leave, or a hidden one, is a leaf."""
    count = 0
    for place, folders, files in os.walk(root, followlinks=True):
        count += len(files)
        for name in list(folders):
            path = Path(place, name)
            foreign = name.startswith(".") or name.lower() in FOREIGN
            loops = path.is_symlink() and Path(place).resolve().is_relative_to(path.resolve())
            if foreign or loops or not any(path.iterdir()):
                folders.remove(name)
                count += 1
    return count


def outcome(root: Path, splits: tuple[str, ...]) -> Source | str:
    try:
        return sources.scan(str(root), splits, partial=True)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tree=TREES, splits=st.sampled_from([("train",), ("val",), BOTH]))
def test_accounts_of_any_tree_add_up_to_what_an_independent_walk_counts(tree, splits):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "raw"
        root.mkdir()
        grow(root, tree)
        assert entries.listing(str(root)).total == walked(root)
        found = outcome(root, splits)
        if isinstance(found, str):
            assert outcome(root, splits) == found
            return
        accounts = found.accounts
        told = accounts.images + accounts.used + sum(accounts.ignored.values())
        assert told + len(accounts.left_out) == accounts.total == walked(root)
        assert accounts.images == found.table.num_rows == len(set(found.table["key"].to_pylist()))
        again = outcome(root, splits)
        assert isinstance(again, Source) and again.accounts == accounts
        assert again.table.equals(found.table)


# What is refused, with its name, and what --partial makes of it


@pytest.mark.parametrize(
    ("make", "named", "left_out"),
    [
        (
            lambda raw: link(raw / "train/a/a3.jpg", "../../.git/annex/objects/a3.jpg"),
            r"1 entry cannot be read: train/a/a3\.jpg \(a link that leads nowhere\); mend",
            {"train/a/a3.jpg"},
        ),
        (
            lambda raw: link(raw / "train/d", "/mnt/gone/d"),
            r"1 entry cannot be read: train/d \(a link that leads nowhere\); mend",
            {"train/d"},
        ),
        (
            lambda raw: link(raw / "train/a/up", raw / "train"),
            r"train/a/up \(a link to a folder that holds it\); mend",
            {"train/a/up"},
        ),
        (
            lambda raw: link(raw / "train/a/self", "self"),
            r"train/a/self \(Too many levels of symbolic links\)",
            {"train/a/self"},
        ),
        (
            lambda raw: os.mkfifo(raw / "val/b/pipe.jpg"),
            r"val/b/pipe\.jpg \(neither a file nor a folder\)",
            {"val/b/pipe.jpg"},
        ),
        (
            lambda raw: (raw / "train/d").mkdir(),
            r"1 class folder without an image: train/d \(it is empty\).*--partial",
            {"train/d"},
        ),
        (
            lambda raw: imagefolder(raw, {"train/d/notes.txt": b"x"}),
            r"train/d \(no file in it may be an image\)",
            set(),
        ),
        (
            lambda raw: imagefolder(raw, {"train/n02.tar": b"x", "train/n01.zip": b"x"}),
            r"train/n01\.zip is an archive among class folders \(2 such\); extract them",
            {"train/n01.zip", "train/n02.tar"},
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_or_left_out_by_name(raw, make, named, left_out):
    make(raw)
    with pytest.raises(UserError, match=named):
        sources.scan(str(raw), BOTH)
    source = sources.scan(str(raw), BOTH, partial=True)
    assert set(source.accounts.left_out) == left_out
    assert source.table.num_rows == len(SET)
    kept = ("d",) if (raw / "train/d").is_symlink() or (raw / "train/d").exists() else ()
    assert source.wnids == ("a", "b", "c", *kept)


def test_an_empty_class_shifts_no_label_of_either_split(raw: Path) -> None:
    for path in (raw / "train/b").iterdir():
        path.unlink()
    for splits in (["val"], ["train", "val"]):
        with pytest.raises(UserError, match="train/b"):
            sources.scan(str(raw), splits)
        rows = sources.scan(str(raw), splits, partial=True).table.to_pylist()
        assert {row["wnid"]: row["label"] for row in rows}["c"] == 2


def test_a_folder_that_nobody_may_open_is_named_and_not_the_root(raw, monkeypatch):
    scandir = os.scandir

    def forbidden(path):
        if str(path).rstrip("/").endswith(("train/b", "lost+found")):  # root may open everything
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    (raw / "lost+found").mkdir()
    with pytest.raises(
        UserError, match=r"1 entry cannot be read: train/b \(the folder cannot be opened: Perm"
    ):
        sources.scan(str(raw), BOTH)
    source = sources.scan(str(raw), BOTH, partial=True)
    assert source.wnids == ("a", "b", "c") and source.accounts.ignored == {"system": 1}


def test_a_split_behind_a_dangling_link_is_named(raw: Path) -> None:
    (raw / "val").rename(raw.parent / "elsewhere")
    link(raw / "val", "/mnt/gone/val")
    with pytest.raises(
        UserError, match=r"1 entry cannot be read: val \(a link that leads nowhere\)"
    ):
        sources.scan(str(raw), BOTH)
    assert sources.scan(str(raw), ["train"]).table.num_rows == 6


def test_links_to_folders_elsewhere_are_followed(raw: Path) -> None:
    (raw / "train").rename(raw.parent / "whole")
    for name in "ac":
        link(raw / "train" / name, raw.parent / "whole" / name)
    source = sources.scan(str(raw), ["train"], partial=True)
    assert source.accounts.images == 4 and source.accounts.left_out == {}


def test_other_layouts_name_their_broken_links_too(tmp_path: Path) -> None:
    raw = tmp_path / "archives"
    imagefolder(raw, {"ILSVRC2012_devkit_t12.tar.gz": devkit([C, A, B], 2, "3\n1\n2\n")})
    inner = tar([(f"{A}_1.JPEG", jpeg())])
    imagefolder(raw, {"ILSVRC2012_img_train.tar": tar([(f"{A}.tar", inner)])})
    link(raw / "ILSVRC2012_img_val.tar", "/mnt/gone/val.tar")
    with pytest.raises(UserError, match=r"ILSVRC2012_img_val\.tar \(a link that leads nowhere\)"):
        sources.scan(str(raw), BOTH)
    csv = kaggle(tmp_path / "kaggle") / "LOC_val_solution.csv"
    csv.unlink()
    link(csv, "/mnt/gone/csv")
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv \(a link that leads nowhere\)"):
        sources.scan(str(tmp_path / "kaggle"), BOTH)
    parquet = hugging_face(tmp_path / "hf") / "data/validation-00000-of-00001.parquet"
    parquet.unlink()
    link(parquet, "/mnt/gone/parquet")
    with pytest.raises(UserError, match=r"validation-00000.* \(a link that leads nowhere\)"):
        sources.scan(str(tmp_path / "hf"), BOTH)


# What is ignored, by rule


def test_what_is_ignored_is_counted_by_its_rule_and_told(raw: Path) -> None:
    imagefolder(
        raw,
        {
            "train/a/.DS_Store": b"x",
            "train/a/Thumbs.db": b"x",
            "train/a/labels.csv": b"x",
            "train/a/README": b"x",
            "train/__MACOSX/a.jpg": b"x",
            "train/a/empty/.keep": b"x",
            "extra/1.jpg": b"x",
            "test/t.jpg": b"x",
            "LOC_synset_mapping.txt": b"a first\n",
        },
    )
    (raw / "train/a/nothing").mkdir()
    accounts = sources.scan(str(raw), BOTH).accounts
    assert accounts.ignored == {
        "hidden": 2,
        "system": 2,
        "documents": 2,
        "empty_folders": 1,
        "other_splits": 1,
        "unused": 1,
    }
    assert (accounts.images, accounts.used) == (len(SET), 1)
    assert set(accounts.ignored) <= set(entries.RULES)
    (note,) = accounts.notes()
    assert note.startswith("ignored 8 entries: 2 hidden (first train/a/.DS_Store), ")
    assert "other" not in note


def test_what_may_be_an_image_is_tried_whatever_its_ending(raw: Path) -> None:
    names = ("1.jfif", "2.tif", "3.ppm", "4", "5.jpg.part")
    imagefolder(raw, {f"train/d/{name}": b"x" for name in names} | {"train/e/6": jpeg()})
    found = set(sources.scan(str(raw), ["train"]).table["source"].to_pylist())
    assert {"train/e/6", *(f"train/d/{name}" for name in names)} <= found
    imagefolder(raw, {"train/e/6": b"<html>", "train/e/7.mp4": b"x"})
    with pytest.raises(UserError, match=r"train/e \(none of its 2 files begins like an image\)"):
        sources.scan(str(raw), ["train"])


def test_what_our_own_commands_leave_beside_their_images_is_no_stranger(
    raw: Path, drawn_raw: str
) -> None:
    imagefolder(raw, {"fetch.json": b"{}"})
    assert Path(drawn_raw, "demo-raw.json").exists()
    for place in (str(raw), drawn_raw):
        source = sources.scan(place, BOTH)
        assert source.notes == () and source.accounts.ignored == {}


def test_kaggles_other_files_are_accounted_for(tmp_path: Path) -> None:
    raw = kaggle(tmp_path)
    imagefolder(raw, {"ILSVRC/Annotations/CLS-LOC/val/1.xml": b"x", f"{DATA}/train/{A}/x.txt": b""})
    accounts = sources.scan(str(raw), BOTH).accounts
    assert (accounts.images, accounts.used) == (9, 6)
    assert accounts.ignored == {"documents": 2, "other_splits": 2}
