"""The set with shuffled labels has the same images and no memory of their classes."""

from collections import Counter
from pathlib import Path

from benchmarks.shuffled import main


def classes_of(root: Path) -> dict[str, str]:
    return {path.read_text(): path.parent.name for path in root.glob("*/*")}


def test_train_images_get_other_classes_of_the_same_sizes_by_the_seed_and_val_keeps_them(
    tmp_path, capsys
):
    for split, count in (("train", 40), ("val", 5)):
        for name in ("n01", "n02", "n03"):
            folder = tmp_path / "raw" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{name}_{number}.JPEG").write_text(f"{split} {name} {number}")
    before, found = classes_of(tmp_path / "raw" / "train"), []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = tmp_path / name
        assert main([str(tmp_path / "raw"), str(out), "--seed", seed]) == 0
        after = classes_of(out / "train")
        assert before.keys() == after.keys()
        assert Counter(before.values()) == Counter(after.values())
        moved = sum(before[image] != after[image] for image in before)
        assert f": {moved} train images" in capsys.readouterr().out
        assert 60 < moved < 100  # two thirds of 120
        assert not any("n0" in path.name for path in (out / "train").glob("*/*"))
        assert classes_of(out / "val") == classes_of(tmp_path / "raw" / "val")
        found.append(after)
    assert found[0] == found[1] != found[2]
