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

from pipelines import shards
from pipelines import verify as module
from pipelines.verify import Findings, verify

REJECTED = "quarantine/train/n09104412_19.bin"


def told(findings: Findings) -> list[str]:
    return [f"{problem.file}: {problem.text}" for problem in findings.problems]


def forge(copy: Path, name: str, data: bytes) -> None:
    """Replace a file and its line in SHA256SUMS, as a careful liar would."""
    old = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    (copy / name).write_bytes(data)
    sums = copy / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, hashlib.sha256(data).hexdigest()))


def forge_index(copy: Path, change: Callable[[list[dict]], None]) -> None:
    rows = shards.load_index(str(copy), "val").to_pylist()
    change(rows)
    table = pa.Table.from_pylist(rows, schema=shards.INDEX)
    forge(copy, "index/val.parquet", shards.parquet_bytes(table))


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
def test_an_index_that_contradicts_itself_or_the_manifest_is_found(
    copy: Path, change: Callable[[list[dict]], None], text: str
) -> None:
    forge_index(copy, change)
    lines = [line for line in told(verify(str(copy))) if line.startswith("index/val.parquet: ")]
    assert any(text in line for line in lines), lines


def line_of(sums: str, name: str) -> str:
    (line,) = [line for line in sums.splitlines(True) if line.endswith(f"  {name}\n")]
    return line


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s + line_of(s, "manifest.json"), r"line \d+ names manifest\.json again"),
        (lambda s: s + "0" * 63 + "  x\n", r"line \d+ is no sha256 and file name"),
        (lambda s: s.replace(line_of(s, "index/val.parquet"), ""), r"lacks index/val\.parquet"),
        (
            lambda s: s.replace(line_of(s, "val-000001.tar"), ""),
            r"another sha256 of val-000001\.tar t",
        ),
        (
            lambda s: s.replace(line_of(s, REJECTED), f"{'0' * 64}  {REJECTED}\n"),
            rf"another sha256 of {REJECTED} than in the set's own lists, or none",
        ),
        (
            lambda s: s + "0" * 64 + "  val-000009.tar\n",
            r"lists val-000009\.tar, which manifest\.js",
        ),
    ],
)
def test_sums_that_contradict_the_set_are_found(
    copy: Path, change: Callable[[str], str], text: str
) -> None:
    sums = copy / "SHA256SUMS"
    sums.write_text(change(sums.read_text()))
    assert any(re.match(f"SHA256SUMS: {text}", line) for line in told(verify(str(copy))))


def forge_manifest(copy: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    forge(copy, "manifest.json", json.dumps(manifest).encode())


def test_totals_that_are_no_sums_are_found(copy: Path) -> None:
    forge_manifest(copy, lambda document: document["totals"]["val"].update(samples=11))
    expected = "manifest.json: its total for val is not the sum over its shards"
    assert told(verify(str(copy))) == [expected]


def test_a_shard_that_manifest_and_sums_give_another_hash_is_found_by_its_sidecar(
    copy: Path,
) -> None:
    (shard,) = [s for s in shards.load_manifest(str(copy)).shards if s.name == "val-000001"]
    forge_manifest(copy, lambda document: document["shards"][-1].update(sha256="0" * 64))
    sums = copy / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(shard.sha256, "0" * 64))
    expected = "_meta/val-000001.parquet: its sha256, bytes or samples are not those of manifest"
    assert told(verify(str(copy))) == [f"{expected}.json"]


def test_a_plausible_forgery_of_the_index_is_found_by_the_sidecars(copy: Path) -> None:
    forge_index(copy, lambda rows: rows[0].update(width=7))
    expected = "_meta/val-000000.parquet: its rows are not those of index/val.parquet"
    assert told(verify(str(copy))) == [expected]


def test_a_list_of_rejected_images_that_contradicts_the_sidecars_is_found(copy: Path) -> None:
    name = "quarantine/train.jsonl"
    forge(copy, name, (copy / name).read_bytes().replace(b"_19", b"_18"))
    assert name in verify(str(copy)).bad_files


def test_full_compares_every_sample_with_the_index(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHOWN", 100)
    forge_index(copy, lambda rows: [row.update(sha256="0" * 64) for row in rows])
    lines = [line for line in told(verify(str(copy), full=True)) if ".tar: " in line]
    assert lines == [
        f"{row['shard']}.tar: {row['key']}: another sha256 than in the index"
        for row in shards.load_index(str(copy), "val").to_pylist()
    ]


def forge_shard(
    copy: Path, samples: list[shards.Sample], change: Callable[[list[dict]], object] | None = None
) -> None:
    """val-000000 with other contents, and everything that describes it changed with it. change: of
    its rows in index and sidecar alone."""
    packed = shards.pack("val-000000", samples)
    if change is not None:
        rows = packed.index.to_pylist()
        change(rows)
        packed = replace(packed, index=pa.Table.from_pylist(rows, schema=shards.INDEX))
    publish_forged(copy, packed)


def publish_forged(copy: Path, packed: shards.Packed) -> None:
    path = copy / "_meta" / "val-000000.parquet"
    _, status = shards.unpack_sidecar(path.read_bytes())
    digest = hashlib.sha256(packed.tar).hexdigest()
    status |= {"sha256": digest, "bytes": len(packed.tar), "samples": packed.index.num_rows}
    status["dali_index_sha256"] = hashlib.sha256(packed.dali_index).hexdigest()
    path.write_bytes(shards.pack_sidecar(packed.index, status))
    forge(copy, "val-000000.idx", packed.dali_index)
    forge(copy, "val-000000.tar", packed.tar)

    def describe(manifest: dict) -> None:
        row = next(row for row in manifest["shards"] if row["name"] == "val-000000")
        row |= {name: status[name] for name in ("sha256", "bytes", "samples")}
        rows = [row["samples"] for row in manifest["shards"] if row["split"] == "val"]
        manifest["totals"]["val"]["samples"] = sum(rows)

    forge_manifest(copy, describe)
    wids = json.loads((copy / "shardindex-val.json").read_text())
    wids["shardlist"][0] |= {"filesize": len(packed.tar), "nsamples": packed.index.num_rows}
    forge(copy, "shardindex-val.json", json.dumps(wids).encode())
    index = shards.load_index(str(copy), "val")
    rest = index.filter(pa.compute.not_equal(index["shard"], "val-000000"))
    table = pa.concat_tables([packed.index, rest]).combine_chunks()
    forge(copy, "index/val.parquet", shards.parquet_bytes(table))


def stored_samples(copy: Path) -> list[shards.Sample]:
    index = shards.load_index(str(copy), "val")
    rows = index.filter(pa.compute.equal(index["shard"], "val-000000")).to_pylist()
    data = (copy / "val-000000.tar").read_bytes()
    places = ("shard", "offset", "size", "sha256")
    return [
        shards.Sample(
            **{name: value for name, value in row.items() if name not in places},
            jpeg=data[row["offset"] : row["offset"] + row["size"]],
            name=f"{row['key']}.JPEG",
        )
        for row in rows
    ]


def changed(sample: shards.Sample, **fields: object) -> shards.Sample:
    return shards.Sample(**(vars(sample) | fields))


def test_a_class_in_the_tar_that_all_else_contradicts_is_found(copy: Path) -> None:
    samples = stored_samples(copy)
    packed = shards.pack("val-000000", samples)
    label, other = f"{samples[0].label}".encode(), f"{(samples[0].label + 1) % 4}".encode()
    assert packed.tar[512:513] == label
    publish_forged(copy, replace(packed, tar=packed.tar[:512] + other + packed.tar[513:]))
    assert told(verify(str(copy))) == []
    assert told(verify(str(copy), full=True)) == [
        f"val-000000.tar: {samples[0].key}: label {other!r}, the index says {label.decode()}"
    ]


@pytest.mark.parametrize(("field", "step"), [("offset", 512), ("size", -1)])
def test_a_place_that_index_and_sidecar_give_wrongly_is_found(
    copy: Path, field: str, step: int
) -> None:
    samples = stored_samples(copy)
    forge_shard(copy, samples, lambda rows: rows[1].update({field: rows[1][field] + step}))
    assert told(verify(str(copy))) == []
    (line,) = told(verify(str(copy), full=True))
    start = (
        rf"val-000000\.tar: {samples[1].key}: lies at \d+ with {len(samples[1].jpeg)} bytes, the"
    )
    assert re.fullmatch(f"{start} index says otherwise", line)


def test_each_fact_that_index_and_sidecar_give_wrongly_is_found(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: list[dict[str, object]] = [{"source": "x"}, {"source_offset": 1}, {"source_size": 1}]
    facts += [{"source_sha256": "0" * 64}, {"width": 1}, {"height": 1, "fixes": ["grey"]}]
    samples = stored_samples(copy)
    monkeypatch.setattr(module, "_SHOWN", 100)
    forge_shard(
        copy, samples, lambda rows: [r.update(fact) for r, fact in zip(rows, facts, strict=True)]
    )
    assert told(verify(str(copy), full=True)) == [
        f"val-000000.tar: {sample.key}: its JSON and the index disagree" for sample in samples
    ]


def test_an_image_that_is_stored_and_in_quarantine_as_well_is_found(copy: Path) -> None:
    name, (stored, *_) = "quarantine/train.jsonl", shards.load_index(str(copy), "train")["key"]
    (entry,) = shards.load_quarantine(str(copy), "train")
    before, after = (shards.rejected_name("train", key) for key in (entry["key"], str(stored)))
    forge(copy, name, shards.canonical_json(entry | {"key": str(stored)}))
    (copy / before).rename(copy / after)
    sums = copy / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, after))
    lines = told(verify(str(copy), full=True))
    assert f"{name}: 1 image (first {stored}) stored as well" in lines
    lost = f"1 image (first {entry['key']}) planned, but neither stored nor in quarantine"
    assert f"index/train.parquet: {lost}" in lines


def test_a_wrong_label_is_found_although_the_whole_set_agrees_on_it(copy: Path) -> None:
    samples = stored_samples(copy)
    other = next(sample for sample in samples if sample.label != samples[0].label)
    wrong = changed(samples[0], label=other.label, wnid=other.wnid)
    forge_shard(copy, [wrong, *samples[1:]])
    assert told(verify(str(copy))) == []
    assert told(verify(str(copy), full=True)) == [
        f"val-000000.tar: 1 sample with another class, first {wrong.key}: {other.wnid} here, "
        f"{samples[0].wnid} planned"
    ]


@pytest.mark.parametrize("spoiled", ["cut", "small", "grey"])
def test_a_image_that_was_stored_badly_is_found(copy: Path, spoiled: str) -> None:
    samples = stored_samples(copy)
    jpeg = {
        "cut": samples[0].jpeg[:-400] + b"\xff\xd9",
        "small": encoded(image(226, 227)),
        "grey": encoded(image(227, 227).convert("L")),
    }[spoiled]
    forge_shard(copy, [changed(samples[0], jpeg=jpeg), *samples[1:]])
    line, *rest = told(verify(str(copy), full=True))
    assert rest == [], rest
    expected = {
        "cut": r"cannot be decoded \(.*\)",
        "small": "is 227×226 YCbCr, not 227×227 in colour",
        "grey": "is 227×227 Gray, not 227×227 in colour",
    }[spoiled]
    assert re.fullmatch(rf"val-000000\.tar: {samples[0].key}: {expected}", line)


def test_a_lost_image_is_missed_although_the_whole_set_agrees_on_it(copy: Path) -> None:
    samples = stored_samples(copy)
    forge_shard(copy, samples[1:])
    lines = told(verify(str(copy), full=True))
    assert "val-000000.tar: 5 images stored or rejected, 6 planned" in lines
    lost = f"1 image (first {samples[0].key}) planned, but neither stored nor in quarantine"
    assert f"index/val.parquet: {lost}" in lines


def test_strangers_in_the_place_of_planned_images_are_found(copy: Path) -> None:
    samples = stored_samples(copy)
    forge_shard(copy, [changed(samples[0], key="stranger"), *samples[1:]])
    (entry,) = shards.load_quarantine(str(copy), "train")
    name = "quarantine/train.jsonl"
    forge(copy, name, shards.canonical_json(entry | {"key": "other"}))
    lines = told(verify(str(copy), full=True))
    assert "index/val.parquet: 1 image (first stranger) stored, but not planned" in lines
    assert f"{name}: 1 image (first other) in quarantine, but not planned" in lines


def test_a_sample_that_nothing_lists_is_found(copy: Path) -> None:
    samples = stored_samples(copy)
    packed = shards.pack("val-000000", samples)
    publish_forged(copy, replace(packed, index=packed.index.slice(0, len(samples) - 1)))
    expected = f"val-000000.tar: {samples[-1].key}.cls follows the last sample of the index"
    assert expected in told(verify(str(copy), full=True))


def test_members_that_tar_allows_and_the_format_does_not_are_found(copy: Path) -> None:
    link = tarfile.TarInfo("n01.cls")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for name, damage, text in (
        (
            "train-000000.tar",
            lambda data: link.tobuf() + data[512:],
            "n01.cls at byte 0 is no plain",
        ),
        (
            "train-000001.tar",
            lambda data: (
                data[: (end := -(-len(data.rstrip(b"\0")) // 512) * 512) + 512]
                + b"x" * 512
                + data[end + 1024 :]
            ),  # of the two blocks of the end mark the second
            "something follows the end mark",
        ),
        ("train-000002.tar", lambda data: b"\0" * len(data), "its end its end its end where"),
        ("train-000003.tar", lambda data: b"\1" + data[1:], "bad checksum"),
    ):
        (copy / name).write_bytes(damage((copy / name).read_bytes()))
        lines = [line for line in told(verify(str(copy), full=True)) if line.startswith(name)]
        assert len(lines) == 2 and "another sha256" in lines[0] and text in lines[1]
