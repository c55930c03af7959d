"""pipelines/sources/folders.py: pictures in class folders."""

from pathlib import Path

import pytest
from drawn import A, B, C, imagefolder, jpeg

from alexnet.errors import UserError
from pipelines import sources

BOTH = ("train", "val")


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
    source = sources.scan(str(tmp_path), BOTH)
    assert source.wnids == (A, B, C)
    assert source.class_names == ("tench, Tinca tinca", B, "crane")
    assert [label for _, label in labels(source).values()] == [0, 2, 1, 2]
    assert source.notes == (f"ignored 1 files that are no pictures, first train/{C}/.DS_Store",)
    # The same labels when only one split is built.
    assert list(labels(sources.scan(str(tmp_path), ["val"])).values()) == [(B, 1), (C, 2)]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"val/ILSVRC2012_val_00000001.JPEG": b"x"}, "lies in no class folder"),
        ({f"train/{A}/{B}_1.JPEG": b"x"}, "contradicts its folder"),
        ({f"train/{A}/deeper/{A}_1.JPEG": b"x"}, "contradicts its folder"),
        ({f"train/{A}/a.b.JPEG": b"x"}, "a dot before the extension"),
        ({f"train/{A}/{'x' * 91}.JPEG": b"x"}, "at most 90"),
        ({f"train/{A}/1.JPEG": b"x", f"train/{B}/1.JPEG": b"x"}, "2 train files are named 1"),
        ({f"train/{A}/notes.txt": b"x"}, r"needs pictures in train/WNID/, not there"),
    ],
)
def test_strange_class_folders_are_refused(
    tmp_path: Path, files: dict[str, bytes], named: str
) -> None:
    imagefolder(tmp_path, {f"val/{A}/v1.JPEG": b"x"} | files)
    with pytest.raises(UserError, match=named):
        sources.scan(str(tmp_path), BOTH)
