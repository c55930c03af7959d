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
            label, jpeg = int(members[f"{key}.cls"]), members[f"{key}.jpg"]
            found[key] = (label, description["wnid"], jpeg)
    return found


@pytest.mark.parametrize("layout", ["ilsvrc", "imagefolder", "kaggle", "hf_parquet"])
def test_every_layout_of_the_same_images_gives_the_true_labels(data_folder, tmp_path, layout):
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


def test_bad_files_are_quarantined_and_odd_ones_stored_in_their_colours(data_folder, tmp_path):
    folder, out = tmp_path / "raw" / "train" / "n00000001", tmp_path / "out"
    shutil.copytree(data_folder / "nasty-sample", folder)
    argv = ["build", "--raw", str(tmp_path / "raw"), "--out", str(out), "--splits", "train"]
    assert main([*argv, "--max-rejected", "60%"]) == 0
    with (folder / "expected.csv").open() as file:
        expected = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    bad = {key for key, row in expected.items() if row["verdict"] == "quarantine"}
    listed = (out / "quarantine" / "train.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in listed) == sorted(bad)
    for key in bad:
        kept = out / "quarantine" / "train" / f"{key}.bin"
        assert kept.read_bytes() == (folder / f"{key}.JPEG").read_bytes()
    stored = read_back(out, "train")
    assert set(stored) == set(expected) - bad
    # of squares the crop shows nearly all
    for key in ("cmyk_adobe", "adobe_rgb_no_jfif", "gray_128"):
        mean = np.array([float(value) for value in expected[key]["mean_rgb_full_decode"].split()])
        with Image.open(io.BytesIO(stored[key][2])) as image:
            found = np.asarray(image, dtype=float).mean(axis=(0, 1))
        assert np.abs(found - mean).max() < 12, (key, found, mean)
