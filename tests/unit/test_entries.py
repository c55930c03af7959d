"""pipelines/entries.py: every entry of RAW is accounted for, once."""

import os
import tempfile
from pathlib import Path

import pytest
from drawn import A, archives, imagefolder, jpeg
from drawn_layouts import DATA, hugging_face, kaggle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alexnet.errors import UserError
from pipelines import entries, sources

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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tree=TREES, splits=st.sampled_from([("train",), ("val",), BOTH]))
def test_accounts_of_any_tree_add_up_to_what_an_independent_walk_counts(tree, splits):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "raw"
        root.mkdir()
        grow(root, tree)
        assert entries.listing(str(root)).total == walked(root)
        try:
            found = sources.scan(str(root), splits, partial=True)
        except UserError as error:
            assert "\n" not in str(error)
            return
        accounts = found.accounts
        told = accounts.images + accounts.used + sum(accounts.ignored.values())
        assert told + len(accounts.left_out) == accounts.total == walked(root)
        assert accounts.images == found.table.num_rows == len(set(found.table["key"].to_pylist()))
        again = sources.scan(str(root), splits, partial=True)
        assert again.accounts == accounts and again.table.equals(found.table)


# What is refused, with its name, and what --partial makes of it


NOWHERE = "a link that leads nowhere"


@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        ("train/a/a3.jpg", "../../.git/annex/objects/a3.jpg", NOWHERE),
        ("train/d", "/mnt/gone/d", NOWHERE),
        ("train/a/up", "..", "a link to a folder that holds it"),
        ("train/a/self", "self", "Too many levels of symbolic links"),
        ("val/b/pipe.jpg", os.mkfifo, "neither a file nor a folder"),
        ("train/d", os.mkdir, "it is empty"),
        ("train/n01.zip", Path.touch, "an archive among class folders"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_or_left_out_by_name(raw, name, target, why):
    if isinstance(target, str):
        link(raw / name, target)
    else:
        target(raw / name)
    with pytest.raises(UserError, match=rf"{name} (\({why}\)|is {why})"):
        sources.scan(str(raw), BOTH)
    source = sources.scan(str(raw), BOTH, partial=True)
    assert set(source.accounts.left_out) == {name}
    assert source.table.num_rows == len(SET)
    assert source.wnids == ("a", "b", "c", *(["d"] if name == "train/d" else []))


def test_a_class_without_images_shifts_no_label_of_either_split(raw):
    for path in (raw / "train/b").iterdir():
        path.unlink()
    for reason in ("it is empty", "no file in it may be an image"):
        for splits in (["val"], ["train", "val"]):
            with pytest.raises(UserError, match=rf"train/b \({reason}\)"):
                sources.scan(str(raw), splits)
            rows = sources.scan(str(raw), splits, partial=True).table.to_pylist()
            assert {row["wnid"]: row["label"] for row in rows}["c"] == 2
        (raw / "train/b/notes.txt").write_text("x")


def test_a_folder_that_nobody_may_open_is_named_and_not_the_root(raw, monkeypatch):
    scandir = os.scandir

    def forbidden(path):
        if str(path).rstrip("/").endswith(("train/b", "lost+found")):  # root may open everything
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    (raw / "lost+found").mkdir()
    with pytest.raises(UserError, match=r"1 entry .*: train/b \(the folder cannot be opened: Perm"):
        sources.scan(str(raw), BOTH)
    source = sources.scan(str(raw), BOTH, partial=True)
    assert source.wnids == ("a", "b", "c") and source.accounts.ignored == {"system": 1}


def test_links_to_folders_elsewhere_are_followed(raw):
    (raw / "train").rename(raw.parent / "whole")
    for name in "ac":
        link(raw / "train" / name, raw.parent / "whole" / name)
    source = sources.scan(str(raw), ["train"], partial=True)
    assert source.accounts.images == 4 and source.accounts.left_out == {}


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda raw: imagefolder(raw, SET), "val"),
        (archives, "ILSVRC2012_img_val.tar"),
        (kaggle, "LOC_val_solution.csv"),
        (hugging_face, "data/validation-00000-of-00001.parquet"),
    ],
)
def test_a_link_that_leads_nowhere_is_named_in_every_layout(draw, name, tmp_path):
    path = draw(tmp_path / "raw") / name
    path.rename(tmp_path / "elsewhere")
    link(path, "/mnt/gone/val")
    with pytest.raises(UserError, match=rf"{name} \(a link that leads nowhere\)"):
        sources.scan(str(tmp_path / "raw"), BOTH)


# What is ignored, by rule


def test_what_is_ignored_is_counted_by_its_rule_and_told(raw):
    names = [".DS_Store", "Thumbs.db", "labels.csv", "README", "empty/.keep"]
    files = [f"train/a/{name}" for name in names] + ["train/__MACOSX/a.jpg"]
    files += ["extra/1.jpg", "test/t.jpg"]
    imagefolder(raw, dict.fromkeys(files, b"x") | {"LOC_synset_mapping.txt": b"a first\n"})
    (raw / "train/a/nothing").mkdir()
    accounts = sources.scan(str(raw), BOTH).accounts
    counts = {"hidden": 2, "system": 2, "documents": 2, "empty_folders": 1}
    assert accounts.ignored == counts | {"other_splits": 1, "unused": 1}
    assert (accounts.images, accounts.used) == (len(SET), 1)
    assert set(accounts.ignored) <= set(entries.RULES)
    (note,) = accounts.notes()
    assert note.startswith("ignored 8 entries: 2 hidden (first train/a/.DS_Store), ")
    assert "other" not in note


def test_what_may_be_an_image_is_tried_whatever_its_ending(raw):
    names = ("1.jfif", "2.tif", "3.ppm", "4", "5.jpg.part")
    imagefolder(raw, {f"train/d/{name}": b"x" for name in names} | {"train/e/6": jpeg()})
    found = set(sources.scan(str(raw), ["train"]).table["source"].to_pylist())
    assert {"train/e/6", *(f"train/d/{name}" for name in names)} <= found
    imagefolder(raw, {"train/e/6": b"<html>", "train/e/7.mp4": b"x"})
    with pytest.raises(UserError, match=r"train/e \(none of its 2 files begins like an image\)"):
        sources.scan(str(raw), ["train"])


def test_what_our_own_commands_leave_beside_their_images_is_no_stranger(raw, drawn_raw):
    imagefolder(raw, {"fetch.json": b"{}"})
    assert Path(drawn_raw, "demo-raw.json").exists()
    for place in (str(raw), drawn_raw):
        source = sources.scan(place, BOTH)
        assert source.notes == () and source.accounts.ignored == {}


def test_kaggles_other_files_are_accounted_for(tmp_path):
    raw = kaggle(tmp_path)
    imagefolder(raw, {"ILSVRC/Annotations/CLS-LOC/val/1.xml": b"x", f"{DATA}/train/{A}/x.txt": b""})
    accounts = sources.scan(str(raw), BOTH).accounts
    assert (accounts.images, accounts.used) == (9, 6)
    assert accounts.ignored == {"documents": 2, "other_splits": 2}
