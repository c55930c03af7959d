"""pipelines/sources/folders.py: images in class folders."""

import re
from pathlib import Path

import pytest
from drawn import A, B, C, devkit, imagefolder, jpeg

from alexnet.errors import UserError
from pipelines import entries, sources
from pipelines.sources import folders

BOTH = ("train", "val")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL = [f"val/ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 2, 3)]
TRAIN = {f"train/{wnid}/{wnid}_{n}.JPEG": b"x" for wnid in (A, B, C) for n in (1, 2)}


def labels(source: sources.Source) -> dict[str, tuple[str, int]]:
    rows = source.table.to_pylist()
    return {row["name"]: (row["wnid"], row["label"]) for row in rows}


def test_class_folders_rank_in_the_union_of_both_splits(tmp_path: Path) -> None:
    imagefolder(
        tmp_path,
        {
            f"train/{A}/{A}_1.JPEG": jpeg(1),
            f"train/{C}/{C}_1.jpg": jpeg(2),
            f"train/{C}/.DS_Store": b"litter",
            f"val/{B}/ILSVRC2012_val_00000001.png": jpeg(3),
            f"val/{C}/ILSVRC2012_val_00000002.JPG": jpeg(4),
            "LOC_synset_mapping.txt": f"{A} tench, Tinca tinca\n{C} crane\n".encode(),
        },
    )
    source = sources.scan(str(tmp_path), BOTH, partial=True)
    assert source.wnids == (A, B, C)
    assert source.class_names == ("tench, Tinca tinca", B, "crane")
    assert [label for _, label in labels(source).values()] == [0, 2, 1, 2]
    assert source.notes == (f"ignored 1 entry: 1 hidden (first train/{C}/.DS_Store)",)
    # The same labels when only one split is built.
    val = sources.scan(str(tmp_path), ["val"], partial=True)
    assert list(labels(val).values()) == [(B, 1), (C, 2)]


def test_every_row_is_a_whole_file(tmp_path: Path) -> None:
    imagefolder(tmp_path, {name: name.encode() for name in TRAIN})
    rows = sources.scan(str(tmp_path), ["train"]).table.to_pylist()
    assert [row["source"] for row in rows] == sorted(TRAIN)
    assert {(row["offset"], row["size"] - len(row["source"])) for row in rows} == {(0, 0)}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (TRAIN | {VAL[0]: b"x"}, rf"{VAL[0]} lies in no class folder"),
        ({"train/1.JPEG": b"x"}, r"train/1\.JPEG lies in no class folder.*expected train/WNID/"),
        ({f"train/{A}/{B}_1.JPEG": b"x"}, rf"train/{A}/{B}_1\.JPEG contradicts .* name says {B}"),
        ({f"train/{A}/deeper/{A}_1.JPEG": b"x"}, "lies too deep"),
        ({f"train/{A}/notes.txt": b"x"}, rf"1 class folder without an image: train/{A} \(no file"),
        ({}, r"needs images in train/WNID/ or training/WNID/, not there"),
        ({"train/n1.tar": b"x"}, r"train/n1\.tar is an archive among class folders"),
        ({f"train/{B}/{B}_1.JPEG": b"x"}, rf"val/{A} is no class of train.*--partial"),
    ],
)
def test_strange_class_folders_are_refused(
    tmp_path: Path, files: dict[str, bytes], named: str
) -> None:
    imagefolder(tmp_path, {f"val/{A}/v1.JPEG": b"x"} | files)
    with pytest.raises(UserError, match=named):
        sources.scan(str(tmp_path), BOTH)


def test_flat_val_takes_its_labels_from_the_ground_truth(tmp_path: Path) -> None:
    # IDs: C = 1, A = 2, B = 3
    kit = {DEVKIT: devkit([C, A, B], 2, "3\n1\n2\n")}
    imagefolder(tmp_path, TRAIN | kit | dict.fromkeys(VAL, b"x"))
    source = sources.scan(str(tmp_path), BOTH)
    val = source.table.filter(sources.table.pc.equal(source.table["split"], "val"))
    assert val["wnid"].to_pylist() == [B, C, A]
    assert val["label"].to_pylist() == [1, 2, 0]
    assert source.class_names == (f"name of {A}", f"name of {B}", f"name of {C}")
    assert source.announced == {"train": 6, "val": 3}
    assert "ground truth" in source.labels_from["val"]


def test_flat_val_without_a_devkit_says_what_to_add(tmp_path: Path) -> None:
    imagefolder(tmp_path, TRAIN | dict.fromkeys(VAL, b"x"))
    with pytest.raises(UserError, match=rf"val has no class folders.*add {DEVKIT}"):
        sources.scan(str(tmp_path), BOTH, partial=True)


def test_a_val_folder_that_contradicts_the_ground_truth_is_refused(tmp_path: Path) -> None:
    kit = {DEVKIT: devkit([C, A, B], 2, "3\n1\n2\n")}
    sorted_val = [f"val/{wnid}/{name[4:]}" for wnid, name in zip((B, C, A), VAL, strict=True)]
    imagefolder(tmp_path, TRAIN | kit | dict.fromkeys(sorted_val, b"x"))
    assert sources.scan(str(tmp_path), BOTH).count("val") == 3
    (tmp_path / sorted_val[1]).rename(tmp_path / "val" / B / Path(sorted_val[1]).name)
    (tmp_path / "val" / C).rmdir()
    with pytest.raises(UserError, match=rf"val/{B}/\S+ in .* devkit, whose .* truth says {C}"):
        sources.scan(str(tmp_path), BOTH)


def test_the_devkit_counts_the_images_unless_partial(tmp_path: Path) -> None:
    kit = {DEVKIT: devkit([C, A, B], 1300, "3\n1\n2\n")}
    imagefolder(tmp_path, TRAIN | kit)
    with pytest.raises(UserError, match=r"has 2 train images, the devkit announces 1,300"):
        sources.scan(str(tmp_path), ["train"])
    assert sources.scan(str(tmp_path), ["train"], partial=True).count("train") == 6
    imagefolder(tmp_path, {"train/n99999999/1.JPEG": b"x"})
    with pytest.raises(UserError, match="n99999999 is no class of the devkit"):
        sources.scan(str(tmp_path), ["train"], partial=True)


def test_test_images_are_unlabelled_unless_in_class_folders(tmp_path: Path) -> None:
    imagefolder(tmp_path / "flat", TRAIN | {"test/b.JPEG": b"x", "test/a.JPEG": b"x"})
    source = sources.scan(str(tmp_path / "flat"), ["train", "test"])
    test = source.table.filter(sources.table.pc.equal(source.table["split"], "test"))
    assert test.select(["key", "label", "wnid"]).to_pylist() == [
        {"key": "a", "label": -1, "wnid": ""},
        {"key": "b", "label": -1, "wnid": ""},
    ]
    assert "unlabelled" in source.labels_from["test"]
    imagefolder(tmp_path / "sorted", TRAIN | {f"test/{C}/a.JPEG": b"x"})
    source = sources.scan(str(tmp_path / "sorted"), ["test"])
    assert labels(source) == {"a.JPEG": (C, 2)}
    imagefolder(tmp_path / "sorted", {"test/dummy/b.JPEG": b"x"})
    with pytest.raises(UserError, match="test/dummy is no class of train"):
        sources.scan(str(tmp_path / "sorted"), ["test"])


def test_classes_may_have_any_name_and_images_any_usual_extension(tmp_path: Path) -> None:
    kinds = ("jpeg", "JPG", "Png", "webp", "BMP", "gif")
    files = {f"train/hot dog/{number}.{kind}": b"x" for number, kind in enumerate(kinds)}
    litter = {
        "train/cat/notes.txt": b"x",
        "train/cat/._1.jpg": b"x",
        "train/.ipynb_checkpoints/1.jpg": b"x",
        "train/__MACOSX/1.jpg": b"x",
        "train/list.csv": b"x",
    }
    imagefolder(tmp_path, files | litter | {"train/cat/100.jpg": b"x"})
    source = sources.scan(str(tmp_path), ["train"])
    assert source.wnids == source.class_names == ("cat", "hot dog")
    assert labels(source)["5.gif"] == ("hot dog", 1)
    assert source.table.num_rows == 7
    assert source.accounts.ignored == {"hidden": 2, "system": 1, "documents": 2}


def test_a_full_train_set_needs_a_val_of_the_same_thousand_classes(tmp_path: Path) -> None:
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


def test_names_that_serve_are_keys_and_others_get_safe_ones_of_their_own(tmp_path: Path) -> None:
    odd = ["cat/1.jpg", "dog/1.jpg", "cat/apple (1).jpg", "cat/苹果0.jpg", "cat/a.jpg", "cat/a.png"]
    odd += ["dog/v1.2.jpg", f"dog/{'x' * 91}.jpg", "größe/Größe.jpg"]
    good = [f"{A}/{A}_10026.JPEG", "dog/only.jpg"]
    imagefolder(tmp_path / "raw", {f"train/{name}": b"x" for name in odd + good})
    rows = sources.scan(str(tmp_path / "raw"), ["train"]).table.to_pylist()
    keys = {row["source"].removeprefix("train/"): row["key"] for row in rows}
    assert len(set(keys.values())) == len(rows) == len(odd + good)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key) for key in keys.values())
    assert (keys[good[0]], keys[good[1]]) == (f"{A}_10026", "only")
    assert keys["cat/1.jpg"].startswith("cat_1-") and keys["dog/1.jpg"].startswith("dog_1-")
    assert keys["größe/Größe.jpg"].startswith("groe_Groe-")
    assert {row["source"]: row["name"] for row in rows}["train/cat/苹果0.jpg"] == "苹果0.jpg"
    # Another file's coming changes no key but that of its namesake.
    imagefolder(tmp_path / "raw", {"train/dog/new.jpg": b"x", "train/cat/only.jpg": b"x"})
    later = sources.scan(str(tmp_path / "raw"), ["train"]).table.to_pylist()
    later = {row["source"].removeprefix("train/"): row["key"] for row in later}
    assert {name for name in keys if later[name] != keys[name]} == {"dog/only.jpg"}


@pytest.mark.parametrize("folder", ["validation", "valid", "Val"])
def test_other_names_of_the_splits_are_known(tmp_path: Path, folder: str) -> None:
    imagefolder(tmp_path, TRAIN | {f"{folder}/{C}/1.jpg": b"x"})
    assert sources.scan(str(tmp_path), BOTH).count("val") == 1
    imagefolder(tmp_path, {f"val/{C}/2.jpg": b"x"})
    with pytest.raises(UserError, match=r"is ambiguous: .* both are val; keep one"):
        sources.scan(str(tmp_path), BOTH)


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_names_of_classes_are_read_as_excel_writes_them(tmp_path: Path, mark: str) -> None:
    names = f"{A} tench, Tinca tinca\r\n{B} jacamar\r\n".encode(mark)
    imagefolder(tmp_path, TRAIN | {"LOC_synset_mapping.txt": names})
    found = sources.scan(str(tmp_path), ["train"]).class_names
    assert found == ("tench, Tinca tinca", "jacamar", C)


def test_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    raw = imagefolder(tmp_path, {f"train/{A}/{A}_1.JPEG": b"x"})
    (raw / "train" / A / "\udcf4.JPEG").write_bytes(b"x")
    with pytest.raises(UserError, match=r"1 names are not UTF-8 \('train/.*\\udcf4\.JPEG'\)"):
        sources.scan(str(raw), ("train",))
