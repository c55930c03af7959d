"""pipelines/inspect.py: shards, samples and builds are described, samples traced to raw bytes."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn import class_folders, jpeg
from made import part_of

from alexnet.errors import UserError
from pipelines import shards, sidecars, storage
from pipelines.inspect import inspect, status, status_text, text
from pipelines.plan import Recipe


def one(out: str, what: str) -> dict:
    document = inspect(out, what)
    assert json.loads(json.dumps(document)) == document  # --json prints it
    (sample,) = document["samples"]
    return dict(sample)


def sha256_of(folder: str, file: str, place: dict) -> str:
    data = storage.read(f"{folder}/{file}", place["offset"], place["size"])
    return hashlib.sha256(data).hexdigest()


def test_a_shard_is_described(drawn_shards):
    for name in ("train-000001", "train-000001.tar", f"{drawn_shards}/train-000001.tar"):
        document = inspect(drawn_shards, name)
        assert document["kind"] == "shard" and document["shard"]["samples"] == 8
        data = Path(drawn_shards, "train-000001.tar").read_bytes()
        assert document["shard"]["sha256"] == hashlib.sha256(data).hexdigest()
        assert document["shard"]["samples_per_class"] == [2, 2]
        assert "4 of 4 classes, 2 to 2 of each" in text(document)
    with pytest.raises(UserError, match="no shard and no sample"):
        inspect(drawn_shards, "train-000099")


def test_a_sample_is_traced_to_the_bytes_it_came_from(drawn_shards, drawn_raw):
    row = shards.load_index(drawn_shards, "val").to_pylist()[4]
    sample = one(drawn_shards, row["key"])
    for spelling in (f"{row['key']}.jpg", f"val/{row['wnid']}/{row['key']}.JPEG"):
        assert one(drawn_shards, spelling) == sample
    raw, stored = sample["raw"], sample["stored"]
    assert sha256_of(drawn_raw, raw["container"], raw) == raw["sha256"]
    assert sha256_of(drawn_shards, stored["file"], stored) == stored["sha256"]
    assert sample["name"] == f"{row['key']}.JPEG" and sample["copies"] == []
    place = f"RAW/{raw['container']}, bytes {raw['offset']:,} + {raw['size']:,}"
    said = text(inspect(drawn_shards, row["key"]))
    assert place in said and f"label {row['label']}, {row['wnid']}" in said


def test_a_rejected_image_is_traced_with_its_reason(drawn_shards):
    sample = one(drawn_shards, "n09104412_19")
    assert (sample["fate"], sample["reason"]) == ("rejected", "truncated")
    assert (sample["wnid"], sample["label"]) == ("n09104412", 2)
    kept = Path(drawn_shards, sample["kept"]).read_bytes()
    assert hashlib.sha256(kept).hexdigest() == sample["raw"]["sha256"]
    assert "rejected, truncated" in text(inspect(drawn_shards, "n09104412_19"))


def test_a_key_of_several_splits_is_shown_in_each_with_its_copies(tmp_path):
    again = jpeg(1) + b"behind its end mark"  # another file of the same image
    images = {"train/a/same.jpg": 1, "train/b/other.jpg": 1, "train/b/again.jpg": again}
    raw = class_folders(tmp_path / "raw", images | {"val/b/same.jpg": 2, "test/same.jpg": 1})
    splits = ("train", "val", "test")
    out = part_of(raw, tmp_path / "out", Recipe(splits=splits, partial=True))
    document = inspect(out, "same")
    train, val, test = document["samples"]
    assert [train["split"], val["split"], test["split"]] == list(splits)
    assert sorted(train["copies"], key=lambda copy: copy["key"]) == [
        {"split": "train", "key": "again", "wnid": "b", "same": "image"},
        {"split": "train", "key": "other", "wnid": "b", "same": "file"},
        {"split": "test", "key": "same", "wnid": None, "same": "file"},
    ]
    assert val["copies"] == []
    assert (test["label"], test["wnid"], test["class_name"]) == (None, None, None)
    assert "same file as test same (unlabelled)" in text(document)


def test_a_sample_is_found_by_its_file_in_raw(tmp_path):
    raw = class_folders(tmp_path / "raw", {"train/cat/1.jpg": 1, "train/dog/1.jpg": 2})
    out = part_of(raw, tmp_path / "out", Recipe(splits=("train",)))
    sample = one(out, "cat/1.jpg")
    assert sample["raw"]["container"] == "train/cat/1.jpg"
    assert sample["key"].startswith("cat_1-") and sample["name"] == "1.jpg"
    assert len(inspect(out, "1.jpg")["samples"]) == 2


def test_a_image_from_a_parquet_file_is_traced_to_its_row(tmp_path):
    names = [f"n0000000{k}_{i}_n0000000{k}.JPEG" for i in range(3) for k in (1, 2)]
    images = [{"bytes": jpeg(seed), "path": name} for seed, name in enumerate(names)]
    (tmp_path / "raw").mkdir()
    for split in ("train", "validation"):
        path = tmp_path / "raw" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.table({"image": images, "label": [0, 1] * 3}), path)
    recipe = Recipe(splits=("train",), partial=True)
    out = part_of(str(tmp_path / "raw"), tmp_path / "out", recipe)
    raw = one(out, "n00000002_1")["raw"]
    assert raw["row"] == 3 and "offset" not in raw
    assert raw["sha256"] == hashlib.sha256(jpeg(3)).hexdigest()
    assert "row 3 of RAW/train-00000-of-00001.parquet" in text(inspect(out, "n00000002_1"))


def test_a_image_from_another_shard_set_points_on_to_it(drawn_shards, tmp_path):
    out = part_of(drawn_shards, tmp_path / "out", Recipe(splits=("val",), partial=True))
    key = shards.load_index(drawn_shards, "val")["key"][0].as_py()
    raw, before = one(out, key)["raw"], one(drawn_shards, key)["stored"]
    assert raw["container"] == before["file"]
    assert all(raw[name] == before[name] for name in ("offset", "size", "sha256"))
    assert f"python -m pipelines inspect {key} --out RAW" in text(inspect(out, key))


@pytest.mark.parametrize("name", ["index/val.parquet", "quarantine/val.jsonl", "manifest.json"])
def test_damage_is_told_in_one_line_with_the_remedy(copy, name):
    (copy / name).write_bytes(b"\0not this")
    with pytest.raises(UserError, match=rf"{name} is damaged \(.*python -m pipelines verify"):
        inspect(str(copy), "ILSVRC2012_val_00000003")


# How far a build is, from what lies in OUT alone


@pytest.fixture
def unfinished(copy: Path) -> Path:
    """`drawn_shards` as it was when two of its six shards were still to be made."""
    (copy / "manifest.json").unlink()
    for name in ("train-000001", "val-000001"):
        (copy / "_meta" / f"{name}.parquet").unlink()
        (copy / f"{name}.tar").unlink()
    return copy


def test_a_finished_set_is_told_as_complete_with_the_numbers_of_its_manifest(drawn_shards):
    document = status(drawn_shards)
    totals = shards.load_manifest(drawn_shards).document["totals"]
    assert document["complete"] and document["damaged"] == []
    for split, part in document["splits"].items():
        assert part["shards"] == part["shards_total"]
        assert part["samples"] == totals[split]["samples"]
        assert part["bytes"] == totals[split]["bytes"]
        assert part["pictures_total"] == totals[split]["pictures"]
    assert document["rejected"] == {"truncated": 1}
    said = status_text(document)
    assert "complete" in said.splitlines()[0] and "rejected: 1: 1 truncated" in said


def test_an_unfinished_build_is_told_by_its_sidecars(unfinished):
    document = status(str(unfinished))
    train, val = document["splits"]["train"], document["splits"]["val"]
    assert not document["complete"]
    assert (train["shards"], train["shards_total"], train["pictures_total"]) == (3, 4, 32)
    assert (val["shards"], val["shards_total"], val["pictures_total"]) == (1, 2, 12)
    files = (unfinished / "_meta").glob("*-*.parquet")
    facts = [sidecars.unpack(path.read_bytes())[1] for path in files]
    assert train["samples"] + val["samples"] == sum(row["samples"] for row in facts)
    assert train["bytes"] == sum(path.stat().st_size for path in unfinished.glob("train-*.tar"))
    rejected = [entry["reason"] for row in facts for entry in row["rejected"]]
    assert document["rejected"] == {reason: rejected.count(reason) for reason in set(rejected)}
    assert "not complete; the same build command continues" in status_text(document)


def test_rate_and_eta_are_those_of_the_newest_shards(unfinished):
    """Four of 8 images each, but for one of 6, are there; 44 are planned."""
    ages = {"train-000000": 90_000, "train-000002": 300, "train-000003": 200, "val-000000": 100}
    for name, age in ages.items():
        os.utime(unfinished / "_meta" / f"{name}.parquet", (time.time() - age,) * 2)
    document = status(str(unfinished))
    assert document["seconds_since_last_shard"] == pytest.approx(100, abs=20)
    assert document["images_per_second"] == pytest.approx((6 + 8) / 200, rel=0.01)
    assert document["eta_seconds"] == pytest.approx((44 - 30) / (14 / 200), rel=0.01)
    assert "0 img/s, ETA 0:03:" in status_text(document)


def test_a_tar_that_is_gone_or_cut_does_not_count(unfinished, drawn_shards):
    (unfinished / "train-000000.tar").unlink()
    (unfinished / "train-000002.tar").write_bytes(b"cut")
    (unfinished / "_meta" / "train-000003.parquet").write_bytes(b"no parquet")
    document = status(str(unfinished))
    assert document["splits"]["train"]["shards"] == 0
    assert document["damaged"] == ["train-000000", "train-000002", "train-000003"]
    assert "the same build command rebuilds it" in status_text(document)
    shutil.copy(Path(drawn_shards, "manifest.json"), unfinished)
    document = status(str(unfinished))  # then a shard without a sidecar is damaged too
    assert document["complete"] and document["damaged"][-1] == "val-000001"
    said = status_text(document)
    assert "complete but damaged" in said and f"verify {unfinished}" in said


def test_a_shard_of_another_plan_is_neither_done_nor_damaged(unfinished):
    sidecar = unfinished / "_meta" / "train-000000.parquet"
    rows, told = sidecars.unpack(sidecar.read_bytes())
    sidecar.write_bytes(sidecars.pack(rows, told | {"shard_id": "0" * 64}))
    document = status(str(unfinished))
    assert document["splits"]["train"]["shards"] == 2 and document["damaged"] == []


def test_where_nothing_was_begun_it_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^\S+: no build was begun here .* pipelines build --raw"):
        status(str(tmp_path))
