"""pipelines/demo_raw.py: true archives, the same for the same seed, and learnable."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from scipy.io import loadmat

from alexnet.errors import UserError
from pipelines import sources, storage
from pipelines.demo_raw import Drawing, draw
from pipelines.sources import devkit
from pipelines.transform import Rejected, to_stored

SMALL = Drawing(classes=2, per_class=3, val_per_class=1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_draws_the_same_bytes_also_after_an_interruption(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw(str(tmp_path / name), SMALL, seed)
    (tmp_path / "b" / "ILSVRC2012_img_train.tar").unlink()
    assert "drew" in draw(str(tmp_path / "b"), SMALL, 0)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


def test_drawing_again_says_so_and_another_set_is_refused(tmp_path, monkeypatch):
    draw(str(tmp_path), SMALL, 0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert "nothing to do" in draw(str(tmp_path), SMALL, 0)
    for drawing, seed in ((SMALL, 1), (Drawing(2, 4, 1), 0)):
        with pytest.raises(UserError, match="holds another set"):
            draw(str(tmp_path), drawing, seed)
    monkeypatch.setattr(storage, "list_files", lambda folder: [])  # it looked before this began
    with pytest.raises(UserError, match="already exists with different contents"):
        draw(str(tmp_path), SMALL, 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"138 GB")
    with pytest.raises(UserError, match="is not empty"):
        draw(str(tmp_path), SMALL, 0)
    assert files(tmp_path) == {"ILSVRC2012_img_train.tar": b"138 GB"}


def test_the_devkit_has_the_traps_of_the_real_one(drawn_raw):
    with tarfile.open(f"{drawn_raw}/{devkit.NAME}") as archive:
        (meta,) = [name for name in archive.getnames() if name.endswith("/data/meta.mat")]
        synsets = loadmat(io.BytesIO(archive.extractfile(meta).read()))["synsets"]
    assert meta.startswith("ILSVRC2012_devkit_t12/") and synsets.shape == (5, 1)
    leaves = [row for row in synsets[:, 0] if row["num_children"].item() == 0]
    by_id = [str(row["WNID"].item()) for row in leaves]
    assert len(by_id) == 4 and by_id != sorted(by_id)
    assert [row["ILSVRC2012_ID"].item() for row in leaves] == [1, 2, 3, 4]


def test_it_holds_the_known_oddities_and_keeps_the_devkits_promise(drawn_raw):
    source = sources.scan(drawn_raw, ["train", "val"])  # without --partial
    assert (source.count("train"), source.count("val")) == (32, 12)
    verdicts: Counter[str] = Counter()
    for row in source.table.to_pylist():
        raw = storage.read(f"{drawn_raw}/{row['source']}", row["offset"], row["size"])
        made = to_stored(raw, 256, 227, 90)
        verdicts.update([made.reason] if isinstance(made, Rejected) else made.fixes)
    assert verdicts["truncated"] == verdicts["cmyk"] == verdicts["png"] == 1
    assert verdicts["grey"] >= 3
    with tarfile.open(f"{drawn_raw}/ILSVRC2012_img_val.tar") as archive:
        order = archive.getnames()
    assert order != sorted(order)


def test_classes_out_of_range_are_refused():
    with pytest.raises(UserError, match="choose 2 to 10"):
        Drawing(classes=11)
    with pytest.raises(UserError, match="at least 1"):
        Drawing(per_class=0)
