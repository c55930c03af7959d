"""pipelines/sources/folders.py: images in class folders."""

import hashlib
import re
from pathlib import Path

import pytest
from drawn import A, B, C, devkit, imagefolder

from alexnet.errors import UserError
from pipelines import entries, sources
from pipelines.sources import folders

BOTH = ("train", "val")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
KIT = {DEVKIT: devkit([C, A, B], 2, "3\n1\n2\n")}  # of val: B, C, A
VAL = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 2, 3)]
FLAT = {f"val/{name}": b"x" for name in VAL}
TRAIN = {f"train/{wnid}/{wnid}_{n}.JPEG": b"x" for wnid in (A, B, C) for n in (1, 2)}


def labels(source: sources.Source, split: str) -> list[tuple[str, str, int]]:
    rows = source.table.to_pylist()
    return [(row["name"], row["wnid"], row["label"]) for row in rows if row["split"] == split]


def test_class_folders_rank_in_the_union_of_both_splits_whichever_are_built(tmp_path):
    images = [f"train/{A}/{A}_1.JPEG", f"train/{C}/{C}_1.jpg", f"val/{B}/1.png", f"val/{C}/2.JPG"]
    files = {name: name.encode() for name in images} | {f"train/{C}/.DS_Store": b"litter"}
    names = f"{A} tench, Tinca tinca\n{C} crane\n".encode()
    imagefolder(tmp_path, files | {"LOC_synset_mapping.txt": names})
    source = sources.scan(str(tmp_path), BOTH, partial=True)
    assert source.wnids == (A, B, C)
    assert source.class_names == ("tench, Tinca tinca", B, "crane")
    assert labels(source, "train") == [(f"{A}_1.JPEG", A, 0), (f"{C}_1.jpg", C, 2)]
    assert source.notes == (f"ignored 1 entry: 1 hidden (first train/{C}/.DS_Store)",)
    rows = source.table.to_pylist()
    assert [row["source"] for row in rows] == images
    assert {(row["offset"], row["size"] - len(row["source"])) for row in rows} == {(0, 0)}
    val = sources.scan(str(tmp_path), ["val"], partial=True)
    assert labels(val, "val") == labels(source, "val") == [("1.png", B, 1), ("2.JPG", C, 2)]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (TRAIN | FLAT, rf"val/{VAL[0]} lies in no class folder"),
        ({"train/1.JPEG": b"x"}, r"train/1\.JPEG lies in no class folder.*expected train/WNID/"),
        ({f"train/{A}/{B}_1.JPEG": b"x"}, rf"train/{A}/{B}_1\.JPEG contradicts .* name says {B}"),
        ({f"train/{A}/deeper/{A}_1.JPEG": b"x"}, "lies too deep"),
        ({}, r"needs images in train/WNID/ or training/WNID/, not there"),
        ({f"train/{B}/{B}_1.JPEG": b"x"}, rf"val/{A} is no class of train.*--partial"),
    ],
)
def test_strange_class_folders_are_refused(tmp_path, files, named):
    imagefolder(tmp_path, {f"val/{A}/v1.JPEG": b"x"} | files)
    with pytest.raises(UserError, match=named):
        sources.scan(str(tmp_path), BOTH)


def test_flat_val_takes_its_labels_from_the_ground_truth(tmp_path):
    imagefolder(tmp_path, TRAIN | FLAT)
    with pytest.raises(UserError, match=rf"val has no class folders.*add {DEVKIT}"):
        sources.scan(str(tmp_path), BOTH, partial=True)
    imagefolder(tmp_path, KIT)
    source = sources.scan(str(tmp_path), BOTH)
    assert labels(source, "val") == [(VAL[0], B, 1), (VAL[1], C, 2), (VAL[2], A, 0)]
    assert source.class_names == (f"name of {A}", f"name of {B}", f"name of {C}")
    assert source.announced == {"train": 6, "val": 3}
    assert "ground truth" in source.labels_from["val"]


def test_a_val_folder_that_contradicts_the_ground_truth_is_refused(tmp_path):
    places = [f"val/{wnid}/{name}" for wnid, name in zip((B, C, A), VAL, strict=True)]
    imagefolder(tmp_path, TRAIN | KIT | dict.fromkeys(places, b"x"))
    assert sources.scan(str(tmp_path), BOTH).count("val") == 3
    (tmp_path / places[1]).rename(tmp_path / "val" / B / VAL[1])
    (tmp_path / "val" / C).rmdir()
    with pytest.raises(UserError, match=rf"val/{B}/\S+ in .* devkit, whose .* truth says {C}"):
        sources.scan(str(tmp_path), BOTH)


def test_the_devkit_counts_the_images_unless_partial(tmp_path):
    imagefolder(tmp_path, TRAIN | {DEVKIT: devkit([C, A, B], 1300, "3\n1\n2\n")})
    with pytest.raises(UserError, match=r"has 2 train images, the devkit announces 1,300"):
        sources.scan(str(tmp_path), ["train"])
    assert sources.scan(str(tmp_path), ["train"], partial=True).count("train") == 6
    imagefolder(tmp_path, {"train/n99999999/1.JPEG": b"x"})
    with pytest.raises(UserError, match="n99999999 is no class of the devkit"):
        sources.scan(str(tmp_path), ["train"], partial=True)


def test_test_images_are_unlabelled_unless_in_class_folders(tmp_path):
    flat = imagefolder(tmp_path / "flat", TRAIN | {"test/b.JPEG": b"x", "test/a.JPEG": b"x"})
    source = sources.scan(str(flat), ["train", "test"])
    assert labels(source, "test") == [("a.JPEG", "", -1), ("b.JPEG", "", -1)]
    assert "unlabelled" in source.labels_from["test"]
    raw = imagefolder(tmp_path / "sorted", TRAIN | {f"test/{C}/a.JPEG": b"x"})
    assert labels(sources.scan(str(raw), ["test"]), "test") == [("a.JPEG", C, 2)]
    imagefolder(raw, {"test/dummy/b.JPEG": b"x"})
    with pytest.raises(UserError, match="test/dummy is no class of train"):
        sources.scan(str(raw), ["test"])


def test_classes_may_have_any_name_and_images_any_usual_extension(tmp_path):
    kinds = ("jpeg", "JPG", "Png", "webp", "BMP", "gif")
    files = [f"train/hot dog/{number}.{kind}" for number, kind in enumerate(kinds)]
    files += ["train/cat/100.jpg", "train/cat/notes.txt", "train/cat/._1.jpg", "train/list.csv"]
    files += ["train/.ipynb_checkpoints/1.jpg", "train/__MACOSX/1.jpg"]
    source = sources.scan(str(imagefolder(tmp_path, dict.fromkeys(files, b"x"))), ["train"])
    assert source.wnids == source.class_names == ("cat", "hot dog")
    assert ("5.gif", "hot dog", 1) in labels(source, "train")
    assert source.table.num_rows == 7
    assert source.accounts.ignored == {"hidden": 2, "system": 1, "documents": 2}


def test_a_full_train_set_needs_a_val_of_the_same_thousand_classes(tmp_path):
    wnids = [f"n{number:08d}" for number in range(1000)]
    files = {f"train/{wnid}/{wnid}_1.JPEG": 1 for wnid in wnids}
    files |= {f"val/{wnid}/v{wnid}.JPEG": 1 for wnid in wnids[1:]}
    listing = entries.Listing(files)
    with pytest.raises(UserError, match=r"train has 1000 classes and val 999, without n00000000"):
        folders.LAYOUT.scan(str(tmp_path), listing, BOTH, False)
    assert folders.LAYOUT.scan(str(tmp_path), listing, BOTH, True).count("val") == 999
    files[f"val/{wnids[0]}/v.JPEG"] = 1
    listing = entries.Listing(dict(sorted(files.items())))
    assert folders.LAYOUT.scan(str(tmp_path), listing, BOTH, False).count("val") == 1000


def test_names_that_serve_are_keys_and_others_get_safe_ones_of_their_own(tmp_path):
    odd = ["cat/1.jpg", "dog/1.jpg", "cat/apple (1).jpg", "cat/苹果0.jpg", "cat/a.jpg", "cat/a.png"]
    odd += ["dog/v1.2.jpg", f"dog/{'x' * 91}.jpg", "größe/Größe.jpg"]
    good = [f"{A}/{A}_10026.JPEG", "dog/only.jpg"]

    def keys_with(*names: str) -> dict[str, str]:
        imagefolder(tmp_path / "raw", {f"train/{name}": b"x" for name in names})
        rows = sources.scan(str(tmp_path / "raw"), ["train"]).table.to_pylist()
        assert {row["name"] for row in rows} == {Path(row["source"]).name for row in rows}
        return {row["source"].removeprefix("train/"): row["key"] for row in rows}

    keys = keys_with(*odd, *good)
    assert len(set(keys.values())) == len(keys) == len(odd + good)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys.values())
    assert (keys[good[0]], keys[good[1]]) == (f"{A}_10026", "only")
    assert keys["cat/1.jpg"].startswith("cat_1-") and keys["dog/1.jpg"].startswith("dog_1-")
    assert keys["größe/Größe.jpg"].startswith("groe_Groe-")
    # Another file's coming changes no key but that of its namesake.
    later = keys_with("dog/new.jpg", "cat/only.jpg")
    assert {name for name in keys if later[name] != keys[name]} == {"dog/only.jpg"}


@pytest.mark.parametrize("folder", ["validation", "valid", "Val"])
def test_other_names_of_the_splits_are_known(tmp_path, folder):
    imagefolder(tmp_path, TRAIN | {f"{folder}/{C}/1.jpg": b"x"})
    assert sources.scan(str(tmp_path), BOTH).count("val") == 1
    imagefolder(tmp_path, {f"val/{C}/2.jpg": b"x"})
    with pytest.raises(UserError, match=r"is ambiguous: .* both are val; keep one"):
        sources.scan(str(tmp_path), BOTH)


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_names_of_classes_are_read_as_excel_writes_them(tmp_path, mark):
    names = f"{A} tench, Tinca tinca\r\n{B} jacamar\r\n".encode(mark)
    imagefolder(tmp_path, TRAIN | {"LOC_synset_mapping.txt": names})
    found = sources.scan(str(tmp_path), ["train"]).class_names
    assert found == ("tench, Tinca tinca", "jacamar", C)


def test_file_name_that_is_no_text_is_refused(tmp_path):
    raw = imagefolder(tmp_path, {f"train/{A}/{A}_1.JPEG": b"x"})
    (raw / "train" / A / "\udcf4.JPEG").write_bytes(b"x")
    with pytest.raises(UserError, match=r"1 names are not UTF-8 \('train/.*\\udcf4\.JPEG'\)"):
        sources.scan(str(raw), ("train",))


def test_folders_without_splits_hold_out_the_same_share_of_each_class_again_and_again(tmp_path):
    classes = {"red fox": 20, "狐狸": 11, "n01": 2}
    names = [f"{name}/{n}.jpg" for name, count in classes.items() for n in range(count)]
    imagefolder(tmp_path, dict.fromkeys(names, b"x") | {"README.md": b"mine"})
    with pytest.raises(UserError, match=r"needs images in val/.*--val-share 0\.1"):
        sources.scan(str(tmp_path), BOTH)

    held = held_out(tmp_path)
    assert {name: len(of) for name, of in held.items()} == {"red fox": 4, "狐狸": 2, "n01": 1}
    for name, images in held.items():  # those with the lowest hashes
        everyone = [f"{name}/{n}.jpg" for n in range(classes[name])]
        order = sorted(everyone, key=lambda x: hashlib.sha256(f"{x}#0".encode()).digest())
        assert images == {*order[: len(images)]}
    assert held_out(tmp_path) == held
    (tmp_path / "red fox" / "new.jpg").write_bytes(b"x")
    assert len(held["red fox"] - held_out(tmp_path)["red fox"]) <= 1


def held_out(raw: Path) -> dict[str, set[str]]:
    source = sources.hold_out(sources.scan(str(raw), ["train"]), 0.2)
    rows = source.table.to_pylist()
    assert (
        source.count("train") + source.count("val")
        == len(rows)
        == len({row["source"] for row in rows})
    )
    held = {name: set() for name in source.wnids}
    for row in rows:
        if row["split"] == "val":
            held[row["wnid"]].add(row["source"])
    return held


def test_what_cannot_be_held_out_is_refused(tmp_path):
    imagefolder(tmp_path, TRAIN)
    imagefolder(tmp_path, {f"train/{A}/{A}_2.JPEG": b"x", "val/x/1.jpg": b"x"})
    with pytest.raises(UserError, match="has a val split of its own; leave --val-share away"):
        sources.hold_out(sources.scan(str(tmp_path), ["train"], partial=True), 0.1)
    imagefolder(tmp_path / "alone", {"a/1.jpg": b"x", "b/1.jpg": b"x", "b/2.jpg": b"x"})
    with pytest.raises(UserError, match=r"class a has one train image, .* both train and val"):
        sources.hold_out(sources.scan(str(tmp_path / "alone"), ["train"]), 0.1)


def test_a_folder_around_raw_is_refused_with_the_name_of_the_right_one(tmp_path):
    imagefolder(tmp_path, {"notes.txt": b"", f"set/train/{A}/{A}_1.JPEG": b"x"})
    with pytest.raises(UserError, match="did you mean the folder set in it"):
        sources.scan(str(tmp_path), BOTH)
