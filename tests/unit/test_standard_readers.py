"""A built set as others read it: webdataset, wids, Hugging Face, timm, DALI's index.

DALI's `fn.readers.webdataset` takes a text file beside each tar, as its tools/wds2idx.py writes it:

    v1.2 8
    cls 512 1 n01440764_10026.cls jpg 1536 20131 n01440764_10026.jpg json 22528 310 n0…026.json

The first line has the number of samples. Then comes one line per sample, in tar order, with four
fields for each member: the extension, the offset of its first data byte (not of its header), its
size in bytes, and its whole name. Every field is divided by one space. Source: NVIDIA/DALI,
tools/wds2idx.py and dali/operators/reader/loader/webdataset_loader.cc (`ParseIndexFile`).
"""

import gc
import hashlib
import json
import tarfile
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines import shards

SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The `datasets` library, which asks its environment for network and home when imported."""
    home = tmp_path_factory.mktemp("hugging-face")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
            patch.setenv(name, "1")
        import datasets

        datasets.disable_progress_bars()
        yield datasets


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm's `create_dataset`. It imports torchvision, whose wheel has C++ for CUDA alone: of two
    operators, which nobody calls here, Python wants to know the signatures."""
    operators = torch.library.Library("torchvision", "FRAGMENT")
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from timm.data import create_dataset
    yield create_dataset


def index_rows(out: str, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = shards.load_index(out, split).to_pylist()
    assert rows
    return rows


def shard_names(out: str, split: str) -> list[str]:
    names = sorted(path.name for path in Path(out).glob(f"{split}-*.tar"))
    assert len(names) > 1
    assert names == [f"{split}-{number:06d}.tar" for number in range(len(names))]
    return names


def members(tar: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(tar) as archive:
        return [(info.name, archive.extractfile(info).read()) for info in archive]


@pytest.mark.parametrize("split", SPLITS)
def test_webdataset_reads_a_brace_range_as_the_index_lists_it(drawn_shards, split):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of webdataset about itself
        import webdataset

        last = len(shard_names(drawn_shards, split)) - 1
        url = f"{drawn_shards}/{split}-{{000000..{last:06d}}}.tar"
        data = webdataset.WebDataset(url, shardshuffle=False, empty_check=False).decode("pil")
        found = list(data)
    rows = index_rows(drawn_shards, split)
    assert [(row["key"], row["label"]) for row in rows] == [(s["__key__"], s["cls"]) for s in found]
    for row, sample in zip(rows, found, strict=True):
        assert (sample["jpg"].mode, sample["json"]["wnid"]) == ("RGB", row["wnid"])


@pytest.mark.parametrize("split", SPLITS)
def test_wids_finds_every_sample_by_its_number(drawn_shards, split, tmp_path):
    import wids

    data = wids.ShardListDataset(
        f"{drawn_shards}/shardindex-{split}.json",
        cache_dir=str(tmp_path),  # else wids would fill one that all users share
        transformations=[],
    )
    rows = index_rows(drawn_shards, split)
    assert len(data) == len(rows)
    for number in reversed(range(len(rows))):  # random access: also against the order of the tars
        sample, row = data[number], rows[number]
        assert sample["__key__"] == row["key"]
        assert int(sample[".cls"].read()) == row["label"]
        assert hashlib.sha256(sample[".jpg"].read()).hexdigest() == row["sha256"]
        assert Path(sample["__shard__"]).name == f"{row['shard']}.tar"
    data.close()
    document = json.loads(Path(drawn_shards, f"shardindex-{split}.json").read_bytes())
    assert [entry["url"] for entry in document["shardlist"]] == shard_names(drawn_shards, split)
    for entry in document["shardlist"]:
        tar = Path(drawn_shards, entry["url"]).read_bytes()
        assert (entry["md5sum"], entry["filesize"]) == (hashlib.md5(tar).hexdigest(), len(tar))


@pytest.mark.parametrize("streaming", [False, True], ids=["converted", "streaming"])
def test_hugging_face_reads_images_and_labels(drawn_shards, hugging_face, tmp_path, streaming):
    data = hugging_face.load_dataset(
        "webdataset",
        data_files={split: f"{drawn_shards}/{split}-*.tar" for split in SPLITS},
        cache_dir=str(tmp_path),
        streaming=streaming,
    )
    assert set(data) == set(SPLITS)
    for split in SPLITS:
        undecoded = data[split].cast_column("jpg", hugging_face.Image(decode=False))
        assert {"__key__", "cls", "jpg", "json"} <= set(undecoded.column_names)
        for row, sample in zip(index_rows(drawn_shards, split), undecoded, strict=True):
            assert (sample["__key__"], sample["cls"]) == (row["key"], row["label"])
            assert hashlib.sha256(sample["jpg"]["bytes"]).hexdigest() == row["sha256"]
            assert (sample["json"]["wnid"], sample["json"]["width"]) == (row["wnid"], row["width"])
        assert next(iter(data[split]))["jpg"].mode == "RGB"


def parsed(idx: Path) -> list[list[tuple[str, int, int, str]]]:
    """(extension, offset, size, name) of each member of each sample, as DALI parses them."""
    first, *lines = idx.read_text("ascii").removesuffix("\n").split("\n")
    version, count = first.split(" ")
    assert (version, int(count)) == ("v1.2", len(lines))
    samples = []
    for line in lines:
        fields = line.split(" ")
        assert len(fields) % 4 == 0
        groups = [fields[start : start + 4] for start in range(0, len(fields), 4)]
        samples.append([(ext, int(offset), int(size), name) for ext, offset, size, name in groups])
    return samples


@pytest.mark.parametrize("split", SPLITS)
def test_every_range_of_the_dali_index_holds_the_member_it_names(drawn_shards, split):
    keys = []
    for shard in shard_names(drawn_shards, split):
        tar = Path(drawn_shards) / shard
        data, samples = tar.read_bytes(), parsed(tar.with_suffix(".idx"))
        flat = [member for sample in samples for member in sample]
        assert all(offset % 512 == 0 for _, offset, _, _ in flat)
        assert members(tar) == [
            (name, data[offset : offset + size]) for _, offset, size, name in flat
        ]
        for sample in samples:
            (key,) = {name.removesuffix(f".{ext}") for ext, _, _, name in sample}
            assert sorted(ext for ext, _, _, _ in sample) == ["cls", "jpg", "json"]
            keys.append(key)
    assert keys == [row["key"] for row in index_rows(drawn_shards, split)]


@pytest.mark.filterwarnings("ignore")  # it leaves files open
def test_timm_reads_the_pixels_and_labels_that_the_tars_hold(timm, drawn_shards):
    for split in SPLITS:
        read = timm("wds/", root=drawn_shards, split=split, batch_size=8)
        assert len(read) == len(index_rows(drawn_shards, split))
        found = sorted((label, image.tobytes()) for image, label in read)
        held = [
            (int(tar[f"{key}.cls"]), Image.open(BytesIO(tar[f"{key}.jpg"])).tobytes())
            for name in shard_names(drawn_shards, split)
            for tar in [dict(members(Path(drawn_shards) / name))]
            for key in {Path(member).stem for member in tar}
        ]
        assert found == sorted(held)
        del read
        gc.collect()
    info = json.loads((Path(drawn_shards) / "_info.json").read_text())
    assert info["class_names"] == list(shards.load_manifest(drawn_shards).class_names)


def test_hugging_face_finds_the_splits_of_a_set_by_its_card(hugging_face, drawn_shards, tmp_path):
    found = hugging_face.load_dataset(drawn_shards, cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in found.items()} == {
        split: len(index_rows(drawn_shards, split)) for split in SPLITS
    }
