"""pipelines/inspect.py: shards and samples are described, and traced back to their raw bytes."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from built import build_set, write_folders
from drawn import jpeg

from alexnet.errors import UserError
from pipelines import shards, storage
from pipelines.inspect import inspect, text
from pipelines.plan import Recipe


def one(out: str, what: str) -> dict:
    document = inspect(out, what)
    assert json.loads(json.dumps(document)) == document  # --json prints it
    (sample,) = document["samples"]
    return dict(sample)


def test_a_shard_is_described(drawn_shards: str) -> None:
    for name in ("train-000001", "train-000001.tar", f"{drawn_shards}/train-000001.tar"):
        document = inspect(drawn_shards, name)
        assert document["kind"] == "shard" and document["shard"]["samples"] == 8
        data = Path(drawn_shards, "train-000001.tar").read_bytes()
        assert document["shard"]["sha256"] == hashlib.sha256(data).hexdigest()
        assert document["shard"]["samples_per_class"] == [2, 2]
        said = text(document)
        assert "8 samples" in said and "4 of 4 classes, 2 to 2 of each" in said
    with pytest.raises(UserError, match="no shard and no sample"):
        inspect(drawn_shards, "train-000099")


def test_a_sample_is_traced_to_the_bytes_it_came_from(drawn_shards: str, drawn_raw: str) -> None:
    row = shards.load_index(drawn_shards, "val").to_pylist()[4]
    sample = one(drawn_shards, row["key"])
    for spelling in (f"{row['key']}.jpg", f"val/{row['wnid']}/{row['key']}.JPEG"):
        assert one(drawn_shards, spelling) == sample
    raw, stored = sample["raw"], sample["stored"]
    data = storage.read(f"{drawn_raw}/{raw['container']}", raw["offset"], raw["size"])
    assert hashlib.sha256(data).hexdigest() == raw["sha256"]
    data = storage.read(f"{drawn_shards}/{stored['file']}", stored["offset"], stored["size"])
    assert hashlib.sha256(data).hexdigest() == stored["sha256"]
    assert sample["name"] == f"{row['key']}.JPEG" and sample["copies"] == []
    said = text(inspect(drawn_shards, row["key"]))
    place = re.search(r"RAW/(\S+), bytes ([\d,]+) \+ ([\d,]+), sha256 (\w+)", said)
    assert place and place[4] == raw["sha256"]
    assert int(place[2].replace(",", "")) == raw["offset"]
    assert f"label {row['label']}, {row['wnid']}" in said


def test_a_rejected_image_is_traced_with_its_reason(drawn_shards: str) -> None:
    sample = one(drawn_shards, "n09104412_19")
    assert (sample["fate"], sample["reason"]) == ("rejected", "truncated")
    assert (sample["wnid"], sample["label"]) == ("n09104412", 2)
    kept = Path(drawn_shards, sample["kept"]).read_bytes()
    assert hashlib.sha256(kept).hexdigest() == sample["raw"]["sha256"]
    said = text(inspect(drawn_shards, "n09104412_19"))
    assert "rejected, truncated" in said and "RAW/ILSVRC2012_img_train.tar, bytes" in said


def test_a_key_of_several_splits_is_shown_in_each_with_its_copies(tmp_path: Path) -> None:
    images = {"train/a/same.jpg": 1, "train/b/other.jpg": 1, "val/b/same.jpg": 2}
    raw = write_folders(tmp_path / "raw", images | {"test/same.jpg": 1})
    splits = ("train", "val", "test")
    out = build_set(raw, tmp_path / "out", Recipe(splits=splits, partial=True))
    document = inspect(out, "same")
    train, val, test = document["samples"]
    assert [train["split"], val["split"], test["split"]] == list(splits)
    assert train["copies"] == [
        {"split": "train", "key": "other", "wnid": "b", "same": "file"},
        {"split": "test", "key": "same", "wnid": None, "same": "file"},
    ]
    assert val["copies"] == []
    assert (test["label"], test["wnid"], test["class_name"]) == (None, None, None)
    said = text(document)
    assert "train same: label 0, a, a" in said and "val same: label 1, b, b" in said
    assert "test same: unlabelled" in said and "same file as test same (unlabelled)" in said


def test_other_files_of_the_same_stored_image_are_its_copies(tmp_path: Path) -> None:
    files = {"train/a/one.jpg": jpeg(1), "train/b/two.jpg": jpeg(1) + b"behind its end mark"}
    raw = write_folders(tmp_path / "raw", files)
    out = build_set(raw, tmp_path / "out", Recipe(splits=("train",), partial=True))
    found = {"split": "train", "key": "two", "wnid": "b", "same": "image"}
    assert one(out, "one")["copies"] == [found]


def test_a_sample_is_found_by_its_file_in_raw(tmp_path: Path) -> None:
    write_folders(tmp_path / "raw", {"train/cat/1.jpg": 1, "train/dog/1.jpg": 2})
    out = build_set(str(tmp_path / "raw"), tmp_path / "out", Recipe(splits=("train",)))
    (sample,) = inspect(out, "cat/1.jpg")["samples"]
    assert sample["raw"]["container"] == "train/cat/1.jpg"
    assert sample["key"].startswith("cat_1-") and sample["name"] == "1.jpg"
    assert len(inspect(out, "1.jpg")["samples"]) == 2


def test_a_image_from_a_parquet_file_is_traced_to_its_row(tmp_path: Path) -> None:
    names = [f"n0000000{k}_{i}_n0000000{k}.JPEG" for i in range(3) for k in (1, 2)]
    rows = {
        "image": [{"bytes": jpeg(seed), "path": name} for seed, name in enumerate(names)],
        "label": [0, 1] * 3,
    }
    for split in ("train", "validation"):
        path = tmp_path / "raw" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), path)
    raw = str(tmp_path / "raw")
    out = build_set(raw, tmp_path / "out", Recipe(splits=("train",), partial=True))
    sample = one(out, "n00000002_1")
    assert sample["raw"]["row"] == 3 and "offset" not in sample["raw"]
    assert sample["raw"]["sha256"] == hashlib.sha256(jpeg(3)).hexdigest()
    said = text(inspect(out, "n00000002_1"))
    assert "row 3 of RAW/train-00000-of-00001.parquet" in said


def test_a_image_from_another_shard_set_points_on_to_it(drawn_shards: str, tmp_path: Path) -> None:
    recipe = Recipe(splits=("val",), partial=True)
    out = build_set(drawn_shards, tmp_path / "out", recipe)
    key = shards.load_index(drawn_shards, "val")["key"][0].as_py()
    raw, before = one(out, key)["raw"], one(drawn_shards, key)["stored"]
    assert (raw["container"], raw["offset"], raw["size"], raw["sha256"]) == tuple(
        before[name] for name in ("file", "offset", "size", "sha256")
    )
    assert f"python -m pipelines inspect {key} --out RAW" in text(inspect(out, key))


def test_damage_is_told_in_one_line_with_the_remedy(drawn_shards: str, tmp_path: Path) -> None:
    out = str(tmp_path / "copy")
    shutil.copytree(drawn_shards, out)
    for name in ("index/val.parquet", "quarantine/val.jsonl", "manifest.json"):
        data = Path(out, name).read_bytes()
        Path(out, name).write_bytes(b"\0not this")
        with pytest.raises(UserError, match=rf"{name} is damaged \(.*python -m pipelines verify"):
            inspect(out, "ILSVRC2012_val_00000003")
        Path(out, name).write_bytes(data)
