"""pipelines/verify.py: sets whose hashes are right and contents are not.

Somebody, or a defect of the builder, may write wrong files and list them faithfully.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from drawn import encoded, image

from pipelines import shards, sidecars, strict_read
from pipelines.verify import verify

REJECTED = "quarantine/train/n09104412_19.bin"
LISTED = "quarantine/train.jsonl"
pc = pa.compute


def told(copy: Path, full: bool = False) -> list[str]:
    problems = verify(str(copy), full=full).problems
    return [f"{problem.file}: {problem.text}" for problem in problems]


def put_in_sums(copy: Path, old: str, new: str) -> None:
    sums = copy / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, new))


def forge(copy: Path, name: str, data: bytes) -> None:
    """Replace a file and its line in SHA256SUMS, as a careful liar would."""
    old = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    (copy / name).write_bytes(data)
    put_in_sums(copy, old, hashlib.sha256(data).hexdigest())


def forge_index(copy: Path, change: Callable[[list[dict]], object]) -> None:
    rows = shards.load_index(str(copy), "val").to_pylist()
    change(rows)
    table = pa.Table.from_pylist(rows, schema=shards.INDEX)
    forge(copy, "index/val.parquet", shards.parquet_bytes(table))


def forge_manifest(copy: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    forge(copy, "manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda rows: rows[0].update(label=3 - rows[0]["label"]), "has label"),
        (lambda rows: rows[0].update(label=-1, wnid=""), "'' has label -1, the manifest says"),
        (lambda rows: rows[0].update(shard="val-000009"), "other number of rows"),
        (lambda rows: rows[0].update(shard="val-000009"), "shards that the manifest lacks"),
        (lambda rows: rows[0].update(key=rows[1]["key"]), "a key appears twice"),
        (lambda rows: rows[0].update(sha256=None), "no value in some rows of sha256"),
        (lambda rows: rows.reverse(), "not in the order of shard and position"),
    ],
)
def test_an_index_that_contradicts_itself_or_the_manifest_is_found(copy, change, text):
    forge_index(copy, change)
    lines = [line for line in told(copy) if line.startswith("index/val.parquet: ")]
    assert any(text in line for line in lines), lines


def line_of(sums: str, name: str) -> str:
    (line,) = [line for line in sums.splitlines(True) if line.endswith(f"  {name}\n")]
    return line


@pytest.mark.parametrize(
    ("name", "line", "text"),
    [
        ("", "{manifest.json}", r"line \d+ names manifest\.json again"),
        ("", "0" * 63 + "  x\n", r"line \d+ is no sha256 and file name"),
        ("index/val.parquet", "", r"lacks index/val\.parquet"),
        ("val-000001.tar", "", r"another sha256 of val-000001\.tar t"),
        (REJECTED, f"{'0' * 64}  {REJECTED}\n", rf"another sha256 of {REJECTED} than in the set's"),
        ("", "0" * 64 + "  val-000009.tar\n", r"lists val-000009\.tar, which manifest\.js"),
    ],
)
def test_sums_that_contradict_the_set_are_found(copy, name, line, text):
    """A line is replaced, or added."""
    sums = (copy / "SHA256SUMS").read_text()
    line = line_of(sums, line[1:-1]) if line.startswith("{") else line
    changed = sums.replace(line_of(sums, name), line) if name else sums + line
    (copy / "SHA256SUMS").write_text(changed)
    assert any(re.match(f"SHA256SUMS: {text}", line) for line in told(copy))


def test_totals_that_are_no_sums_are_found(copy):
    forge_manifest(copy, lambda document: document["totals"]["val"].update(samples=11))
    assert told(copy) == ["manifest.json: its total for val is not the sum over its shards"]


def test_a_shard_that_manifest_and_sums_give_another_hash_is_found_by_its_sidecar(copy):
    shard = shards.load_manifest(str(copy)).shards[-1]
    forge_manifest(copy, lambda document: document["shards"][-1].update(sha256="0" * 64))
    put_in_sums(copy, shard.sha256, "0" * 64)
    expected = "its sha256, bytes or samples are not those of manifest.json"
    assert told(copy) == [f"_meta/{shard.name}.parquet: {expected}"]


def test_a_plausible_forgery_of_the_index_is_found_by_the_sidecars(copy):
    forge_index(copy, lambda rows: rows[0].update(width=7))
    expected = "_meta/val-000000.parquet: its rows are not those of index/val.parquet"
    assert told(copy) == [expected]


def test_a_list_of_rejected_images_that_contradicts_the_sidecars_is_found(copy):
    forge(copy, LISTED, (copy / LISTED).read_bytes().replace(b"_19", b"_18"))
    assert f"{LISTED}: lists 1 images, the sidecars other ones" in told(copy)


def test_full_compares_every_sample_with_the_index(copy, monkeypatch):
    monkeypatch.setattr(strict_read, "_SHOWN", 100)
    forge_index(copy, lambda rows: [row.update(sha256="0" * 64) for row in rows])
    assert [line for line in told(copy, full=True) if ".tar: " in line] == [
        f"{row['shard']}.tar: {row['key']}: another sha256 than in the index"
        for row in shards.load_index(str(copy), "val").to_pylist()
    ]


# A shard with other contents, and everything that describes it changed with it


def forge_shard(
    copy: Path, samples: list[shards.Sample], change: Callable[[list[dict]], object] = len
) -> None:
    """change: of the rows of val-000000 in index and sidecar alone."""
    packed = shards.pack("val-000000", samples)
    rows = packed.index.to_pylist()
    change(rows)
    publish_forged(copy, replace(packed, index=pa.Table.from_pylist(rows, schema=shards.INDEX)))


def publish_forged(copy: Path, packed: shards.Packed) -> None:
    path = copy / "_meta" / "val-000000.parquet"
    _, status = sidecars.unpack(path.read_bytes())
    digest = hashlib.sha256(packed.tar).hexdigest()
    facts = {"sha256": digest, "bytes": len(packed.tar), "samples": packed.index.num_rows}
    dali = {"dali_index_sha256": hashlib.sha256(packed.dali_index).hexdigest()}
    path.write_bytes(sidecars.pack(packed.index, status | facts | dali))
    forge(copy, "val-000000.idx", packed.dali_index)
    forge(copy, "val-000000.tar", packed.tar)

    def describe(manifest: dict) -> None:
        rows = [row for row in manifest["shards"] if row["split"] == "val"]
        rows[0] |= facts
        manifest["totals"]["val"]["samples"] = sum(row["samples"] for row in rows)

    forge_manifest(copy, describe)
    wids = json.loads((copy / "shardindex-val.json").read_text())
    wids["shardlist"][0] |= {"filesize": facts["bytes"], "nsamples": facts["samples"]}
    forge(copy, "shardindex-val.json", json.dumps(wids).encode())
    index = shards.load_index(str(copy), "val")
    rest = index.filter(pc.not_equal(index["shard"], "val-000000"))
    table = pa.concat_tables([packed.index, rest]).combine_chunks()
    forge(copy, "index/val.parquet", shards.parquet_bytes(table))


@pytest.fixture
def samples(copy: Path) -> list[shards.Sample]:
    """What val-000000 holds."""
    index = shards.load_index(str(copy), "val")
    data = (copy / "val-000000.tar").read_bytes()
    found = []
    for row in index.filter(pc.equal(index["shard"], "val-000000")).to_pylist():
        offset, size, _, _ = (row.pop(name) for name in ("offset", "size", "shard", "sha256"))
        jpeg = data[offset : offset + size]
        found.append(shards.Sample(**row, jpeg=jpeg, name=f"{row['key']}.JPEG"))
    return found


def test_a_class_in_the_tar_that_all_else_contradicts_is_found(copy, samples):
    packed = shards.pack("val-000000", samples)
    label, other = f"{samples[0].label}".encode(), f"{(samples[0].label + 1) % 4}".encode()
    assert packed.tar[512:513] == label
    publish_forged(copy, replace(packed, tar=packed.tar[:512] + other + packed.tar[513:]))
    assert told(copy) == []
    assert told(copy, full=True) == [
        f"val-000000.tar: {samples[0].key}: label {other!r}, the index says {label.decode()}"
    ]


@pytest.mark.parametrize(("field", "step"), [("offset", 512), ("size", -1)])
def test_a_place_that_index_and_sidecar_give_wrongly_is_found(copy, samples, field, step):
    forge_shard(copy, samples, lambda rows: rows[1].update({field: rows[1][field] + step}))
    assert told(copy) == []
    (line,) = told(copy, full=True)
    place = rf"lies at \d+ with {len(samples[1].jpeg)} bytes, the index says otherwise"
    assert re.fullmatch(rf"val-000000\.tar: {samples[1].key}: {place}", line)


def test_each_fact_that_index_and_sidecar_give_wrongly_is_found(copy, samples, monkeypatch):
    facts: list[dict[str, object]] = [{"source": "x"}, {"source_offset": 1}, {"source_size": 1}]
    facts += [{"source_sha256": "0" * 64}, {"width": 1}, {"height": 1, "fixes": ["grey"]}]
    monkeypatch.setattr(strict_read, "_SHOWN", 100)
    forge_shard(
        copy, samples, lambda rows: [r.update(fact) for r, fact in zip(rows, facts, strict=True)]
    )
    assert told(copy, full=True) == [
        f"val-000000.tar: {sample.key}: its JSON and the index disagree" for sample in samples
    ]


def test_an_image_that_is_stored_and_in_quarantine_as_well_is_found(copy):
    stored = shards.load_index(str(copy), "train")["key"][0].as_py()
    (entry,) = shards.load_quarantine(str(copy), "train")
    before, after = (shards.rejected_name("train", key) for key in (entry["key"], stored))
    forge(copy, LISTED, shards.canonical_json(entry | {"key": stored}))
    (copy / before).rename(copy / after)
    put_in_sums(copy, before, after)
    lines = told(copy, full=True)
    assert f"{LISTED}: 1 image (first {stored}) stored as well" in lines
    lost = f"1 image (first {entry['key']}) planned, but neither stored nor in quarantine"
    assert f"index/train.parquet: {lost}" in lines


def test_a_wrong_label_is_found_although_the_whole_set_agrees_on_it(copy, samples):
    right, *rest = samples
    other = next(sample for sample in rest if sample.label != right.label)
    forge_shard(copy, [replace(right, label=other.label, wnid=other.wnid), *rest])
    assert told(copy) == []
    assert told(copy, full=True) == [
        f"val-000000.tar: 1 sample with another class, first {right.key}: {other.wnid} here, "
        f"{right.wnid} planned"
    ]


@pytest.mark.parametrize(
    ("spoiled", "expected"),
    [
        (b"", r"cannot be decoded \(.*\)"),  # cut
        (encoded(image(226, 227)), "is 227×226 YCbCr, not 227×227 in colour"),
        (encoded(image(227, 227).convert("L")), "is 227×227 Gray, not 227×227 in colour"),
    ],
    ids=["cut", "small", "grey"],
)
def test_a_image_that_was_stored_badly_is_found(copy, samples, spoiled, expected):
    first, *rest = samples
    forge_shard(copy, [replace(first, jpeg=spoiled or first.jpeg[:-400] + b"\xff\xd9"), *rest])
    (line,) = told(copy, full=True)
    assert re.fullmatch(rf"val-000000\.tar: {first.key}: {expected}", line)


def test_a_lost_image_is_missed_although_the_whole_set_agrees_on_it(copy, samples):
    forge_shard(copy, samples[1:])
    lines = told(copy, full=True)
    assert "val-000000.tar: 5 images stored or rejected, 6 planned" in lines
    lost = f"1 image (first {samples[0].key}) planned, but neither stored nor in quarantine"
    assert f"index/val.parquet: {lost}" in lines


def test_strangers_in_the_place_of_planned_images_are_found(copy, samples):
    forge_shard(copy, [replace(samples[0], key="stranger"), *samples[1:]])
    (entry,) = shards.load_quarantine(str(copy), "train")
    forge(copy, LISTED, shards.canonical_json(entry | {"key": "other"}))
    lines = told(copy, full=True)
    assert "index/val.parquet: 1 image (first stranger) stored, but not planned" in lines
    assert f"{LISTED}: 1 image (first other) in quarantine, but not planned" in lines


def test_a_sample_that_nothing_lists_is_found(copy, samples):
    packed = shards.pack("val-000000", samples)
    publish_forged(copy, replace(packed, index=packed.index.slice(0, len(samples) - 1)))
    expected = f"val-000000.tar: {samples[-1].key}.cls follows the last sample of the index"
    assert expected in told(copy, full=True)


def with_link(data: bytes) -> bytes:
    link = tarfile.TarInfo("n01.cls")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return link.tobuf() + data[512:]


def behind_the_end(data: bytes) -> bytes:
    """Of the two blocks of the end mark the second is none."""
    second = -(-len(data.rstrip(b"\0")) // 512) * 512 + 512
    return data[:second] + b"x" * 512 + data[second + 512 :]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (with_link, "n01.cls at byte 0 is no plain"),
        (behind_the_end, "something follows the end mark"),
        (lambda data: bytes(len(data)), "its end its end its end where"),
        (lambda data: b"\1" + data[1:], "bad checksum"),
    ],
)
def test_members_that_tar_allows_and_the_format_does_not_are_found(copy, damage, text):
    path = copy / "train-000001.tar"
    path.write_bytes(damage(path.read_bytes()))
    hashed, other = told(copy, full=True)
    assert "another sha256" in hashed and text in other
