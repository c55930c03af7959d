"""pipelines/shards.py: the format, read back by tarfile, NumPy and the webdataset library."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from drawn import jpeg

from alexnet.errors import UserError
from pipelines import shards, storage


def sample(key: str, label: int = 0, seed: int = 0) -> shards.Sample:
    return shards.Sample(
        key=key,
        label=label,
        wnid=f"n{label:08d}",
        jpeg=jpeg(seed),
        name=f"{key}.JPEG",
        source="some.tar",
        source_offset=512,
        source_size=99,
        source_sha256="ab" * 32,
        width=80,
        height=60,
        fixes=("grey",) if label else (),
    )


TAR_SHA256 = "57eaed0f56076e53c6493205439af7d448faf7066cea75553f75530b4af7803f"
SAMPLES = [sample("n00000001_9", 1, seed=1), sample("n00000000_5", 0, seed=2)]


def test_a_tar_holds_cls_jpg_json_of_each_sample_in_the_given_order() -> None:
    data = shards.pack("train-000000", SAMPLES).tar
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = [(info.name, tar.extractfile(info).read()) for info in tar]
    assert [name for name, _ in found] == [
        f"{key}.{suffix}"
        for key in ("n00000001_9", "n00000000_5")
        for suffix in ("cls", "jpg", "json")
    ]
    assert found[0][1] == b"1"
    assert found[1][1] == SAMPLES[0].jpeg
    assert json.loads(found[2][1])["name"] == "n00000001_9.JPEG"


def test_a_tar_knows_no_clock_no_user_and_no_extended_headers() -> None:
    data = shards.pack("train-000000", SAMPLES).tar
    assert shards.pack("train-000000", SAMPLES).tar == data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
            assert info.pax_headers == {}
    assert b"ustar\x0000" in data[:512]


def test_a_tar_is_what_tarfile_writes_whatever_the_key_and_size() -> None:
    keys = ["ü" * 40, "k" * 95, "folder/" * 20 + "key", *(f"n{n:08d}_{n}" for n in range(397))]
    contents = [bytes(n * k % 251 for k in range(n * 9)) for n in range(len(keys))]
    plain = replace(SAMPLES[0], jpeg=b"")
    samples = [replace(plain, key=key, jpeg=jpeg) for key, jpeg in zip(keys, contents, strict=True)]
    packed = shards.pack("train-000000", samples)
    buffer = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(packed.tar)) as found,
        tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as again,
    ):
        for member in found:
            copy = tarfile.TarInfo(member.name)
            copy.size, copy.mode = member.size, 0o444
            again.addfile(copy, found.extractfile(member))
        places = [member.offset_data for member in found if member.name.endswith(".jpg")]
    assert packed.tar == buffer.getvalue()
    assert packed.index["offset"].to_pylist() == places and len(places) == 400
    assert hashlib.sha256(packed.tar).hexdigest() == TAR_SHA256


def test_the_index_finds_each_jpeg_by_its_byte_range() -> None:
    packed = shards.pack("train-000000", SAMPLES)
    data, index = packed.tar, packed.index
    assert index.schema == shards.INDEX
    for row, packed in zip(index.to_pylist(), SAMPLES, strict=True):
        found = data[row["offset"] : row["offset"] + row["size"]]
        assert found == packed.jpeg
        assert row["sha256"] == hashlib.sha256(found).hexdigest()
        assert row["shard"] == "train-000000"
        assert row["fixes"] == list(packed.fixes)


def test_a_sidecar_gives_back_rows_and_status() -> None:
    index = shards.pack("train-000000", SAMPLES).index
    texts = dict.fromkeys(("shard", "split", "sha256", "md5", "dali_index_sha256"), "text")
    given = {**texts, "samples": 2, "bytes": 9, "rejected": []}
    given |= {"pixels": {}, "fixes": {"grey": 1}, "versions": {}}
    data = shards.pack_sidecar(index, given)
    assert data == shards.pack_sidecar(index, given)
    rows, status = shards.unpack_sidecar(data)
    assert rows.equals(index)
    assert status == given == shards.sidecar_status(io.BytesIO(data))
    odd = (
        {"samples": 3},
        {"bytes": "9"},
        {"md5": None},
        {"rejected": [{}]},
        {"fixes": {"grey": -1}},
    )
    wrong = [shards.pack_sidecar(index, given | change) for change in odd]
    for damaged in (b"", data[:-9], shards.parquet_bytes(index), *wrong):
        with pytest.raises(ValueError, match="no sidecar"):
            shards.unpack_sidecar(damaged)


def test_the_manifest_says_what_was_built(drawn_shards: str) -> None:
    manifest = shards.load_manifest(drawn_shards)
    assert manifest.num_classes == 4
    assert list(manifest.wnids) == sorted(manifest.wnids)
    assert manifest.class_names[manifest.wnids.index("n09106274")] == "red disc"
    assert (manifest.resize, manifest.crop, manifest.quality) == (256, 227, 90)
    assert (manifest.num_samples("train"), manifest.num_samples("val")) == (31, 12)
    names = [f"train-{number:06d}" for number in range(4)]
    assert [shard.name for shard in manifest.split_shards("train")] == names
    assert not manifest.partial
    data = Path(drawn_shards, "manifest.json").read_bytes()
    assert manifest.digest == hashlib.sha256(data).hexdigest()


def test_the_manifest_holds_no_clock_and_no_absolute_path(
    drawn_shards: str, drawn_raw: str
) -> None:
    text = Path(drawn_shards, "manifest.json").read_text()
    assert drawn_raw not in text and drawn_shards not in text and "/tmp" not in text
    assert "time" not in text and "date" not in text


def test_no_manifest_is_told_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"pipelines build --raw RAW --out {tmp_path}"):
        shards.load_manifest(str(tmp_path))


def test_a_manifest_of_another_version_or_kind_is_refused(tmp_path: Path) -> None:
    for text, message in (
        ('{"format": "alexnet-shards", "format_version": 99}', "version 99; this reads"),
        ("{}", "format None"),
        ("{", "is damaged"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            shards.load_manifest(str(tmp_path))


def test_a_missing_split_is_told(drawn_shards: str) -> None:
    with pytest.raises(UserError, match="--splits test"):
        shards.load_index(drawn_shards, "test")


DAMAGE = [
    *("[]", "[" * 100_000, "geometry", "wnids", "pixels", "shards", "totals", "source"),
]


@pytest.mark.parametrize("what", DAMAGE, ids=[what[:9] for what in DAMAGE])
def test_manifest_that_lacks_something_is_refused_in_one_line(copy: Path, what: str) -> None:
    file = copy / "manifest.json"
    broken = file.read_text().replace(f'"{what}"', '"other"') if what.isalpha() else what
    file.write_text(broken)
    with pytest.raises(UserError, match="is damaged") as caught:
        shards.load_manifest(str(copy))
    assert len(str(caught.value)) < 500


SHARD = {"name": "train-000000", "split": "train", "samples": 1, "bytes": 9, "sha256": "0" * 64}
IMPOSSIBLE: list[dict[str, Any]] = [
    *({"geometry": {"resize": 256, "crop": crop}} for crop in (0, 257, -1, 1.5, True)),
    *({"codec": {"quality": quality}} for quality in ("90", -1)),
    *({"seed": seed} for seed in (-1, None)),
    *({"classes": {"wnids": wnids, "names": ["a", "b"]}} for wnids in (["n1"], ["n1", "n1"])),
    *({"classes": {"wnids": ["n1", "n2"], "names": names}} for names in (["a"], ["a", 5])),
    *({"shards": [SHARD | {"name": name}]} for name in ("train-0", "val-000000", "train-000000/x")),
    *({"shards": [SHARD | {"split": split, "name": f"{split}-000000"}]} for split in ("dev", "..")),
    *({"shards": [SHARD | {name: -1}]} for name in ("samples", "bytes")),
    {"shards": [SHARD | {"sha256": "0" * 63}]},
    {"totals": {"dev": {}}},
    {"rejected": {"truncated": -1}},
    {"source": {"layout": 7}},
    {"plan_id": 7},
    {"fixes": []},
]


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=str)
def test_manifest_that_no_build_writes_is_refused(copy: Path, change: dict[str, Any]) -> None:
    document = shards.load_manifest(str(copy)).document
    (copy / "manifest.json").write_bytes(shards.canonical_json(document | change))
    with pytest.raises(UserError, match=r"manifest\.json is damaged .* verify"):
        shards.load_manifest(str(copy))


def test_damaged_label_in_an_index_or_sidecar_is_told(drawn_shards: str) -> None:
    """Parquet alone does not notice it: the pages have checksums."""
    for name in ("index/train.parquet", "_meta/train-000000.parquet"):
        data = storage.read(f"{drawn_shards}/{name}")
        table = shards.read_parquet(data)
        wrong = 0
        footer = int.from_bytes(data[-8:-4], "little")
        for place in range(4, len(data) - 8 - footer, 97):
            flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            try:
                wrong += not shards.read_parquet(flipped).equals(table)
            except (OSError, pa.ArrowException, ValueError):
                continue
        assert wrong == 0, name


def test_damaged_fact_in_a_sidecar_is_told(drawn_shards: str) -> None:
    data = storage.read(f"{drawn_shards}/_meta/train-000000.parquet")
    place = data.index(b'"count":') + len(b'"count":')
    other = b"2" if data[place : place + 1] != b"2" else b"3"
    with pytest.raises(ValueError, match="its status has another sha256"):
        shards.unpack_sidecar(data[:place] + other + data[place + 1 :])
