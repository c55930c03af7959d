"""pipelines/shards.py: the format, read back by tarfile, NumPy and the webdataset library."""

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from drawn import jpeg

from alexnet.errors import UserError
from pipelines import finish, plan_files, shards, sidecars, storage
from pipelines.verify import verify


def sample(key: str, label: int, seed: int) -> shards.Sample:
    lineage = {"source": "some.tar", "source_offset": 512, "source_size": 99}
    lineage |= {"source_sha256": "ab" * 32, "width": 80, "height": 60}
    wnid, fixes = f"n{label:08d}", ("grey",) if label else ()
    name = f"{key}.JPEG"
    return shards.Sample(key, label, wnid, jpeg(seed), name, fixes=fixes, **lineage)


TAR_SHA256 = "57eaed0f56076e53c6493205439af7d448faf7066cea75553f75530b4af7803f"
SAMPLES = [sample("n00000001_9", 1, seed=1), sample("n00000000_5", 0, seed=2)]


def test_a_tar_holds_cls_jpg_json_of_each_sample_and_knows_no_clock_and_no_user():
    data = shards.pack("train-000000", SAMPLES).tar
    assert shards.pack("train-000000", SAMPLES).tar == data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar}
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
            assert info.pax_headers == {}
    names = [f"{s.key}.{suffix}" for s in SAMPLES for suffix in ("cls", "jpg", "json")]
    assert [*found] == names and b"ustar\x0000" in data[:512]
    assert found[names[0]] == b"1" and found[names[1]] == SAMPLES[0].jpeg
    assert json.loads(found[names[2]])["name"] == "n00000001_9.JPEG"


def test_a_tar_is_what_tarfile_writes_whatever_the_key_and_size():
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


def test_the_index_finds_each_jpeg_by_its_byte_range():
    packed = shards.pack("train-000000", SAMPLES)
    assert packed.index.schema == shards.INDEX
    for row, sample in zip(packed.index.to_pylist(), SAMPLES, strict=True):
        found = packed.tar[row["offset"] : row["offset"] + row["size"]]
        assert found == sample.jpeg
        assert row["sha256"] == hashlib.sha256(found).hexdigest()
        assert (row["shard"], row["fixes"]) == ("train-000000", [*sample.fixes])


def test_a_sidecar_gives_back_rows_and_status(tmp_path):
    index = shards.pack("train-000000", SAMPLES).index
    texts = dict.fromkeys(("shard", "split", "sha256", "md5", "dali_index_sha256"), "text")
    given = {**texts, "samples": 2, "bytes": 9, "rejected": []}
    given |= {"pixels": {}, "fixes": {"grey": 1}, "versions": {}}
    data = sidecars.pack(index, given)
    assert data == sidecars.pack(index, given)
    rows, status = sidecars.unpack(data)
    assert rows.equals(index)
    assert status == given
    odd = [{"samples": 3}, {"bytes": "9"}, {"md5": None}, {"rejected": [{}]}]
    odd += [{"fixes": {"grey": -1}}]
    wrong = [sidecars.pack(index, given | change) for change in odd]
    for damaged in (b"", data[:-9], shards.parquet_bytes(index), *wrong):
        with pytest.raises(ValueError, match="no sidecar"):
            sidecars.unpack(damaged)

    def read(data: bytes) -> object:
        (tmp_path / "_meta").mkdir(exist_ok=True)
        (tmp_path / "_meta" / "train-000000.parquet").write_bytes(data)
        [found] = sidecars.load_statuses(str(tmp_path), {"train-000000": len(data)})
        return found

    assert read(data) == given
    many = given | {
        "rejected": [{"key": f"{n}", "reason": "x", "source_sha256": "y"} for n in range(999)]
    }
    assert read(sidecars.pack(index, many)) == many
    for damaged in (b"", data[:-9], shards.parquet_bytes(index), *wrong):
        assert read(damaged) is None


def test_the_manifest_says_what_was_built_without_clock_or_place(drawn_shards, drawn_raw):
    manifest = shards.load_manifest(drawn_shards)
    assert manifest.num_classes == 4 and not manifest.partial
    assert list(manifest.wnids) == sorted(manifest.wnids)
    assert manifest.class_names[manifest.wnids.index("n09106274")] == "red disc"
    assert (manifest.resize, manifest.crop, manifest.quality) == (256, 227, 90)
    assert (manifest.num_samples("train"), manifest.num_samples("val")) == (31, 12)
    names = [f"train-{number:06d}" for number in range(4)]
    assert [shard.name for shard in manifest.split_shards("train")] == names
    data = Path(drawn_shards, "manifest.json").read_bytes()
    assert manifest.digest == hashlib.sha256(data).hexdigest()
    for word in (drawn_raw, drawn_shards, "/tmp", "time", "date"):
        assert word.encode() not in data


@pytest.fixture
def in_parts(drawn_shards, tmp_path, monkeypatch) -> str:
    """The drawn set with indexes of at most 10 rows a file, in groups of 5."""
    out = str(shutil.copytree(drawn_shards, tmp_path / "parts"))
    monkeypatch.setattr(shards, "INDEX_ROWS", 10)
    monkeypatch.setattr(finish, "_GROUP", 5)
    Path(out, "manifest.json").unlink()
    made = plan_files.load(out)
    finish.finish(out, made, finish.finished_shards(out, made)[0])
    return out


def test_a_long_index_is_several_files_that_are_read_as_one(in_parts, drawn_shards):
    index = Path(in_parts, "index")
    names = {"train.parquet", *(f"train-{n}.parquet" for n in (1, 2, 3))}
    assert {path.name for path in index.iterdir()} == names | {"val.parquet", "val-1.parquet"}
    for split in ("train", "val"):
        whole = shards.load_index(drawn_shards, split)
        assert shards.load_index(in_parts, split).equals(whole)
        few = shards.load_index(in_parts, split, ["label", "fixes"])
        assert few.equals(whole.select(["label", "fixes"]))
    assert shards.load_manifest(in_parts).digest == shards.load_manifest(drawn_shards).digest
    assert verify(in_parts, full=True).problems == ()
    (index / "train-2.parquet").unlink()
    with pytest.raises(shards.Damaged, match=r"train-2\.parquet is missing; run"):
        shards.load_index(in_parts, "train")
    assert verify(in_parts).bad_files == ("index/train-2.parquet",)


def test_of_an_index_only_the_bytes_of_the_wanted_columns_are_read(
    drawn_shards, tmp_path, monkeypatch
):
    rows = pa.concat_tables([shards.load_index(drawn_shards, "train")] * 500)
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / "train.parquet"
    digests = pa.array([hashlib.sha256(b"%d" % n).hexdigest() for n in range(len(rows))])
    rows = rows.set_column(rows.column_names.index("sha256"), "sha256", digests)
    path.write_bytes(shards.parquet_bytes(rows))
    read, sizes = storage.read, list[int]()

    def counted(*place: Any) -> bytes:
        sizes.append(len(data := read(*place)))
        return data

    monkeypatch.setattr(storage, "read", counted)
    labels = shards.load_index(str(tmp_path), "train", ["label"])
    assert labels.equals(rows.select(["label"]))
    assert len(sizes) <= 4 and sum(sizes) < path.stat().st_size / 3


def test_what_is_not_there_is_told_with_the_command_that_makes_it(drawn_shards, tmp_path):
    with pytest.raises(UserError, match=rf"pipelines build --raw RAW --out {tmp_path}"):
        shards.load_manifest(str(tmp_path))
    with pytest.raises(UserError, match="--splits test"):
        shards.load_index(drawn_shards, "test")


NAMES = ["geometry", "wnids", "pixels", "shards", "totals", "source"]
OTHER_VERSION = '{"format": "alexnet-shards", "format_version": 99}'


@pytest.mark.parametrize(
    ("what", "told"),
    [
        *((name, "is damaged") for name in (*NAMES, "[]", "{", "[" * 100_000)),
        (OTHER_VERSION, "version 99; this reads"),
        ("{}", "format None"),
    ],
    ids=range(11),
)
def test_manifest_that_lacks_something_is_refused_in_one_line(copy, what, told):
    file = copy / "manifest.json"
    broken = file.read_text().replace(f'"{what}"', '"other"') if what.isalpha() else what
    file.write_text(broken)
    with pytest.raises(UserError, match=told) as caught:
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
def test_manifest_that_no_build_writes_is_refused(copy, change):
    document = shards.load_manifest(str(copy)).document
    (copy / "manifest.json").write_bytes(shards.canonical_json(document | change))
    with pytest.raises(UserError, match=r"manifest\.json is damaged .* verify"):
        shards.load_manifest(str(copy))


def test_damaged_label_in_an_index_or_sidecar_is_told(drawn_shards):
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


def test_damaged_fact_in_a_sidecar_is_told(drawn_shards):
    data = storage.read(f"{drawn_shards}/_meta/train-000000.parquet")
    place = data.index(b'"count":') + len(b'"count":')
    other = b"2" if data[place : place + 1] != b"2" else b"3"
    with pytest.raises(ValueError, match="its status has another sha256"):
        sidecars.unpack(data[:place] + other + data[place + 1 :])
