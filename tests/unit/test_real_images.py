"""Shard sets of real images, read back by tarfile, csv and Pillow alone."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from made import made_shards
from PIL import Image

from pipelines.cli import main
from pipelines.plan import Recipe

pytestmark = pytest.mark.usefixtures("without_ray")
LAYOUTS = ("ilsvrc", "imagefolder", "kaggle", "hf_parquet")


def read_back(out: Path, split: str) -> dict[str, tuple[int, str, bytes]]:
    """Key → (label, WNID, JPEG) of every sample in the tars of a split."""
    found: dict[str, tuple[int, str, bytes]] = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members = {info.name: tar.extractfile(info).read() for info in tar}
        keys = {name.rpartition(".")[0] for name in members}
        assert len(members) == 3 * len(keys) and not keys & found.keys()
        for key in keys:
            description = json.loads(members[f"{key}.json"])
            found[key] = (
                int(members[f"{key}.cls"]),
                description["wnid"],
                members[f"{key}.jpg"],
            )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_same_images_gives_the_labels_of_the_ground_truth(
    data_folder: Path, tmp_path: Path, layout: str
) -> None:
    raw = data_folder / "tiny20" / layout
    made_shards(str(raw), str(tmp_path), Recipe(samples_per_shard=40, partial=True))
    with (data_folder / "tiny20" / "ground_truth.csv").open() as file:
        truth = [row for row in csv.DictReader(file) if row["split"] in ("train", "val")]
    found = {split: read_back(tmp_path, split) for split in ("train", "val")}
    assert (len(found["train"]), len(found["val"])) == (79, 30)
    assert {
        (split, key): (label, wnid)
        for split, samples in found.items()
        for key, (label, wnid, _) in samples.items()
    } == {(row["split"], Path(row["file"]).stem): (int(row["index"]), row["wnid"]) for row in truth}
    for samples in found.values():
        for _, _, jpeg in samples.values():
            with Image.open(io.BytesIO(jpeg)) as image:
                image.load()
                assert (image.format, image.size, image.mode) == ("JPEG", (227, 227), "RGB")


def test_an_unlabelled_test_split_is_stored_without_a_class(
    data_folder: Path, tmp_path: Path
) -> None:
    recipe = Recipe(splits=("train", "test"), partial=True)
    manifest = made_shards(str(data_folder / "tiny20" / "hf_parquet"), str(tmp_path), recipe)
    assert manifest.num_classes == 20
    samples = read_back(tmp_path, "test")
    assert len(samples) == 5
    assert {(label, wnid) for label, wnid, _ in samples.values()} == {(-1, "")}


@pytest.fixture
def nasty(data_folder: Path, tmp_path: Path) -> Path:
    """One class of the odd and bad files, and what they should become."""
    folder = tmp_path / "raw" / "train" / "n00000001"
    folder.mkdir(parents=True)
    for path in (data_folder / "nasty-sample").glob("*.JPEG"):
        shutil.copy(path, folder)
    return tmp_path / "raw"


def test_bad_files_are_quarantined_and_odd_ones_stored_in_their_colours(
    nasty: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    argv = ["build", "--raw", str(nasty), "--out", str(out), "--splits", "train"]
    assert main([*argv, "--max-rejected", "60%"]) == 0, capsys.readouterr()
    with (data_folder / "nasty-sample" / "expected.csv").open() as file:
        expected = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    stored = read_back(out, "train")
    listed = (out / "quarantine" / "train.jsonl").read_text().splitlines()
    rejected = [json.loads(line) for line in listed]
    bad = {key for key, row in expected.items() if row["verdict"] == "quarantine"}
    assert {entry["key"] for entry in rejected} == bad and len(rejected) == len(bad)
    assert set(stored) == set(expected) - bad
    for key in bad:
        raw = (nasty / "train" / "n00000001" / f"{key}.JPEG").read_bytes()
        assert (out / "quarantine" / "train" / f"{key}.bin").read_bytes() == raw
    for key in (
        "cmyk_adobe",
        "adobe_rgb_no_jfif",
        "gray_128",
    ):  # squares: the crop shows nearly all
        mean = np.array([float(value) for value in expected[key]["mean_rgb_full_decode"].split()])
        with Image.open(io.BytesIO(stored[key][2])) as image:
            found = np.asarray(image, dtype=float).mean(axis=(0, 1))
        assert np.abs(found - mean).max() < 12, (key, found, mean)
