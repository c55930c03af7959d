"""pipelines/sources/own_shards.py: a finished shard set as the source of another."""

import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from alexnet.errors import UserError
from pipelines import entries, shards, sources, storage
from pipelines.sources import folders, huggingface, ilsvrc, kaggle

BOTH = ("train", "val")


@pytest.fixture
def copied(drawn_shards: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn_shards, tmp_path / "set"))


def test_every_row_is_the_jpeg_that_tarfile_extracts_with_its_label(drawn_shards: str) -> None:
    source = sources.scan(drawn_shards, BOTH)
    expected = {}
    for path in Path(drawn_shards).glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {info.name: tar.extractfile(info).read() for info in tar}
        for name, data in files.items():
            if name.endswith(".jpg"):
                label = int(files[name.replace(".jpg", ".cls")])
                expected[path.name, name] = (data, label, path.name.split("-")[0])
    found = {}
    for row in source.table.to_pylist():
        data = storage.read(f"{drawn_shards}/{row['source']}", row["offset"], row["size"])
        found[row["source"], row["name"]] = (data, row["label"], row["split"])
    assert found == expected


def test_geometry_classes_and_origin_come_from_the_manifest(drawn_shards: str) -> None:
    source = sources.scan(drawn_shards, ["val"])
    manifest = shards.load_manifest(drawn_shards)
    assert source.stored == sources.StoredAs(256, 227, 90, manifest.digest)
    assert source.shuffle == "source"
    assert (source.wnids, source.class_names) == (manifest.wnids, manifest.class_names)
    assert source.announced == {"val": manifest.num_samples("val")} == {"val": source.count("val")}
    assert source.labels_from["val"].startswith(f"shard set {manifest.digest[:12]}, there: number")
    assert source.containers == tuple(
        (f"{shard.name}.tar", Path(drawn_shards, f"{shard.name}.tar").stat().st_size)
        for shard in manifest.split_shards("val")
    )
    assert "1 pictures were rejected" in source.notes[0]  # demo-raw draws one that is cut


def test_no_other_layout_recognises_a_shard_set(drawn_shards: str) -> None:
    files = dict(storage.list_files(drawn_shards))
    files |= {"quarantine/train/n00000001_1.bin": 1, "report/index.html": 1}
    found = entries.Listing(dict(sorted(files.items())))
    assert not any(other.recognises(found) for other in (folders, huggingface, ilsvrc, kaggle))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_tar_of_another_size_is_refused_with_the_remedy(copied: Path, damage: str) -> None:
    tar = copied / "train-000001.tar"
    data = tar.read_bytes()
    tar.unlink()
    if damage == "cut":
        tar.write_bytes(data[:-512])
    found = f"{len(data) - 512:,} bytes" if damage == "cut" else "not there"
    with pytest.raises(UserError, match=rf"{tar.name} is {found}, .* {len(data):,} .*verify .*rep"):
        sources.scan(str(copied), BOTH)
    assert sources.scan(str(copied), ["val"]).count("val") > 0


def test_an_index_that_contradicts_the_manifest_is_refused(copied: Path) -> None:
    path = copied / "index" / "train.parquet"
    index = shards.load_index(str(copied), "train")
    swapped = index.set_column(1, "label", pa.array(index["label"].to_pylist()[::-1]))
    for wrong in (swapped, index.slice(1), index.take([*range(len(index)), 0])):
        path.write_bytes(shards.parquet_bytes(wrong))
        with pytest.raises(UserError, match=r"index/train\.parquet contradicts manifest\.json"):
            sources.scan(str(copied), BOTH)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"index/train\.parquet is damaged"):
        sources.scan(str(copied), BOTH)


def test_an_unfinished_set_and_an_absent_split_are_refused(copied: Path) -> None:
    with pytest.raises(UserError, match="needs test shards, not there"):
        sources.scan(str(copied), ["train", "test"])
    (copied / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished shard set"):
        sources.scan(str(copied), BOTH)


def test_the_set_lies_on_s3_as_well(drawn_shards: str, s3: str) -> None:
    raw = f"{s3}/own"
    for name, _ in storage.list_files(drawn_shards):
        if not name.startswith("_meta"):
            storage.write(f"{raw}/{name}", Path(drawn_shards, name).read_bytes())
    assert sources.scan(raw, BOTH).table.equals(sources.scan(drawn_shards, BOTH).table)
