"""The set with shuffled labels has the same images and no memory of their classes."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.shuffled import main


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for split, count in (("train", 40), ("val", 5)):
        for name in ("n01", "n02", "n03"):
            folder = tmp_path / "raw" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{name}_{number}.JPEG").write_text(f"{split} {name} {number}")
    return tmp_path / "raw"


def classes_of(root: Path) -> dict[str, str]:
    return {path.read_text(): path.parent.name for path in root.glob("*/*")}


def test_train_images_are_all_there_under_classes_of_the_same_sizes(raw, tmp_path, capsys):
    assert main([str(raw), str(tmp_path / "out")]) == 0
    before, after = classes_of(raw / "train"), classes_of(tmp_path / "out" / "train")
    assert before.keys() == after.keys()
    assert (
        Counter(before.values())
        == Counter(after.values())
        == dict.fromkeys(set(after.values()), 40)
    )
    moved = sum(before[image] != after[image] for image in before)
    assert f": {moved} train images" in capsys.readouterr().out
    assert 60 < moved < 100  # two thirds of 120
    names = [path.name for path in (tmp_path / "out" / "train").glob("*/*")]
    assert not any("n0" in name for name in names) and len(set(names)) == 120


def test_val_images_keep_their_classes(raw, tmp_path):
    main([str(raw), str(tmp_path / "out")])
    assert classes_of(tmp_path / "out" / "val") == classes_of(raw / "val")


def test_seed_decides_which_class_a_image_gets(raw, tmp_path):
    found = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main([str(raw), str(tmp_path / name), "--seed", seed])
        found.append(classes_of(tmp_path / name / "train"))
    assert found[0] == found[1] != found[2]
