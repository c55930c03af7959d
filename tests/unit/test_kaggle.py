"""pipelines/sources/kaggle.py: the layout of Kaggle's challenge."""

import pytest
from drawn import A, B, C, imagefolder
from drawn_layouts import DATA, SETS, csv, kaggle

from alexnet.errors import UserError
from pipelines import sources, storage

BOTH = ("train", "val")
VAL = [f"ILSVRC2012_val_{n:08d}" for n in (1, 2, 3)]
SYNSETS, SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"


def test_val_labels_come_from_the_csv_train_labels_from_the_folder(tmp_path):
    source = sources.scan(str(kaggle(tmp_path)), (*BOTH, "test"))
    rows = source.table.to_pylist()
    assert {(row["split"], row["key"]): (row["label"], row["wnid"]) for row in rows} == {
        **{("train", f"{w}_{n}"): (k, w) for k, w in enumerate((A, B, C)) for n in (3, 7)},
        ("val", VAL[0]): (2, C),
        ("val", VAL[1]): (1, B),
        ("val", VAL[2]): (0, A),
        ("test", "ILSVRC2012_test_00000001"): (-1, ""),
        ("test", "ILSVRC2012_test_00000002"): (-1, ""),
    }
    assert source.class_names == ("tench, Tinca tinca", "jacamar", "yurt")
    assert source.announced == {"train": 6, "val": 3, "test": 2}
    assert source.labels_from["val"] == SOLUTION
    for row in rows:
        data = storage.read(f"{tmp_path}/{row['source']}", row["offset"], row["size"])
        assert data.decode() == row["key"]


def mapping(*classes: str) -> dict[str, bytes]:
    return {SYNSETS: "".join(f"{wnid} name\n" for wnid in classes).encode()}


GOOD = f"{VAL[0]},{C} 1 2 3 4\n{VAL[1]},{B} 1 2 3 4\n"
TWO = {SOLUTION: csv(f"{GOOD}{VAL[2]},{A} 1 2 3 4 {B} 1 2 3 4\n")}
OTHER = {"LOC_train_solution.csv": csv(f"{A}_7,{B} 1 2 3 4 \n")}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (OTHER, rf"train/{A}/{A}_7\.JPEG contradicts LOC_train_solution\.csv, which says {B}"),
        (TWO, rf"row of {VAL[2]} names {A} and {B}"),
        ({SOLUTION: csv(GOOD)}, rf"{VAL[2]} has no row in LOC_val_solution"),
        ({SOLUTION: None}, rf"{VAL[0]} has no row .*3 val images without"),
        ({SOLUTION: csv(GOOD * 2)}, "several rows for"),
        ({SOLUTION: csv(f"{VAL[0]};{C}\n")}, "is no row KEY,WNID"),
        ({SOLUTION: csv(f"{VAL[0]},{C} 1 2 3\n")}, "is no row KEY,WNID"),
        ({SYNSETS: None}, r"LOC_synset_mapping\.txt is not there"),
        (mapping(B, A, C), rf"{A} is out of order"),
        (mapping(A, C), rf"{B} is no class of LOC_synset"),
        ({f"{DATA}/train/{A}/{B}_9.JPEG": b"x"}, rf"{B}_9\.JPEG contradicts its folder"),
        ({f"{DATA}/val/{VAL[0]}.JPEG": None, f"{DATA}/val/{A}/{VAL[0]}.JPEG": b"x"}, "no class fo"),
    ],
)
def test_contradictions_are_refused_even_when_partial(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        sources.scan(str(kaggle(tmp_path, changes)), BOTH, partial=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({f"{DATA}/train/{A}/{A}_7.JPEG": None}, rf"{A}_7 of LOC_train_sol.*1 of 2.*--partial"),
        ({f"{DATA}/train/{B}/{B}_7.JPEG": None}, rf"{B}_7 of {SETS}/train_cls\.txt.*1 of 6"),
        ({f"{DATA}/val/{VAL[1]}.JPEG": None}, rf"{VAL[1]} of LOC_val_solution\.csv.*1 of 3"),
        ({f"{DATA}/train/{B}/{B}_9.JPEG": b"x"}, rf"{B}_9 in .* is not in {SETS}/train_cls\.txt"),
        (mapping(A, B, C, "n99999999"), "n99999999 of LOC_synset_mapping.txt has no train images"),
    ],
)
def test_missing_or_extra_images_are_refused_unless_partial(tmp_path, changes, named):
    raw = str(kaggle(tmp_path, changes))
    with pytest.raises(UserError, match=named):
        sources.scan(raw, BOTH)
    assert sources.scan(raw, BOTH, partial=True).table.num_rows in {8, 9, 10}


def test_a_val_sorted_into_folders_is_checked_against_the_csv(tmp_path):
    def sorted_into(name: str, *wnids: str) -> str:
        changes: dict[str, bytes | None] = {f"{DATA}/val/{key}.JPEG": None for key in VAL}
        places = zip(wnids, VAL, strict=True)
        changes |= {f"{DATA}/val/{wnid}/{key}.JPEG": b"x" for wnid, key in places}
        return str(kaggle(tmp_path / name, changes))

    source = sources.scan(sorted_into("good", C, B, A), ["val"])
    assert source.table["wnid"].to_pylist() == [A, B, C]
    with pytest.raises(UserError, match=rf"val/{A}/{VAL[1]}\.JPEG contradicts .* says {B} \(2"):
        sources.scan(sorted_into("bad", C, A, B), ["val"], partial=True)


def test_lists_and_train_csv_may_be_absent(tmp_path):
    absent = [f"{SETS}/{name}.txt" for name in ("train_cls", "val", "test")]
    raw = kaggle(tmp_path, dict.fromkeys([*absent, "LOC_train_solution.csv"]))
    source = sources.scan(str(raw), BOTH)
    assert (source.announced, source.table.num_rows) == (None, 9)
    assert source.labels_from["train"] == "name of the class folder"


@pytest.mark.parametrize("name", ["localization-challenge.zip", "localization_patched2019.tar.gz"])
def test_the_download_as_it_came_is_to_be_extracted(tmp_path, name):
    name = f"imagenet-object-{name}" if "zip" in name else f"imagenet_object_{name}"
    imagefolder(tmp_path, {name: b"x", SOLUTION: b"x"})
    with pytest.raises(UserError, match=rf"holds {name} as it was downloaded; extract it"):
        sources.scan(str(tmp_path), BOTH)
    # Once extracted, the archive may stay.
    assert sources.scan(str(kaggle(tmp_path)), BOTH).layout == "kaggle"
