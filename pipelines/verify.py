"""Is a shard set what its manifest says? And where does a sample come from? Needs only OUT."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from alexnet.errors import UserError
from pipelines import shards, storage

_MEMBERS = ("cls", "jpg", "json")


def verify(out: str, *, full: bool = False) -> tuple[list[str], str]:
    """(problems, one line each; what was checked, in words).

    Always: every hash of SHA256SUMS, sizes, index against manifest. `full` also decodes every
    picture strictly and compares its members, label, hash and size with the index.
    """
    manifest = shards.load_manifest(out)
    sums = _sums(out)
    problems: list[str] = []
    if sums.get("manifest.json") != manifest.digest:
        problems.append("manifest.json: not the one that SHA256SUMS lists")
    for shard in manifest.shards:
        if sums.get(f"{shard.name}.tar") != shard.sha256:
            problems.append(f"{shard.name}.tar: manifest and SHA256SUMS disagree about its hash")
    indexes = {split: shards.load_index(out, split) for split in manifest.document["totals"]}
    for split, index in indexes.items():
        problems += _check_index(manifest, split, index)
    shard_of = {f"{shard.name}.tar": shard for shard in manifest.shards}
    for name, expected in sorted(sums.items()):
        data = _read_or_none(out, name)
        if data is None:
            problems.append(f"{name}: missing")
        elif hashlib.sha256(data).hexdigest() != expected:
            problems.append(f"{name}: its {len(data):,} bytes have another sha256")
        elif full and name in shard_of:
            shard = shard_of[name]
            rows = indexes[shard.split].filter(pc.equal(indexes[shard.split]["shard"], shard.name))
            problems += _check_shard(manifest, data, rows.to_pylist(), shard.name)
    samples = sum(manifest.num_samples(split) for split in indexes)
    decoded = f", {samples:,} pictures decoded" if full else ""
    return problems, f"{len(manifest.shards)} shards, {len(sums)} files hashed{decoded}"


def _sums(out: str) -> dict[str, str]:
    text = storage.read(storage.join(out, "SHA256SUMS")).decode("utf-8", "replace")
    pairs = [line.partition("  ") for line in text.splitlines()]
    return {name: digest for digest, _, name in pairs}


def _read_or_none(out: str, name: str) -> bytes | None:
    uri = storage.join(out, name)
    return storage.read(uri) if storage.exists(uri) else None


def _check_index(manifest: shards.Manifest, split: str, index: pa.Table) -> Iterator[str]:
    name = f"index/{split}.parquet"
    if not index.schema.equals(shards.INDEX):
        yield f"{name}: its columns are {index.schema.names}, not {shards.INDEX.names}"
        return
    expected = [(shard.name, shard.samples) for shard in manifest.split_shards(split)]
    counts = Counter(index["shard"].to_pylist())
    for shard_name, samples in expected:
        if counts.pop(shard_name, 0) != samples:
            yield f"{name}: other number of rows for {shard_name} than its {samples} samples"
    if counts:
        yield f"{name}: rows of shards that the manifest lacks: {', '.join(sorted(counts))}"
    order = index.select(["shard", "offset"])
    if not order.equals(order.sort_by([("shard", "ascending"), ("offset", "ascending")])):
        yield f"{name}: rows are not in the order of shard and position"
    keys = index["key"]
    if len(pc.unique(keys)) != len(keys):
        yield f"{name}: a key appears twice"
    ranks = {wnid: label for label, wnid in enumerate(manifest.wnids)}
    pairs = set(zip(index["wnid"].to_pylist(), index["label"].to_pylist(), strict=True))
    for wnid, label in sorted(pairs):
        if ranks.get(wnid) != label:
            yield f"{name}: {wnid} has label {label}, the manifest says {ranks.get(wnid)}"


def _check_shard(
    manifest: shards.Manifest, data: bytes, rows: list[dict[str, Any]], name: str
) -> list[str]:
    """Read by `tarfile` and Pillow, which had no part in finding offsets or decoding for us."""
    members: list[tuple[str, bytes, int]] = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for info in tar:
            file = tar.extractfile(info)
            members.append((info.name, file.read() if file else b"", info.offset_data))
    wanted = [f"{row['key']}.{suffix}" for row in rows for suffix in _MEMBERS]
    if [member for member, _, _ in members] != wanted:
        return [f"{name}.tar: members are not KEY.cls KEY.jpg KEY.json in the order of the index"]

    def check(position: int) -> list[str]:
        (_, cls, _), (member, jpeg, offset), (_, text, _) = members[3 * position :][:3]
        return [
            f"{name}.tar {member}: {problem}"
            for problem in _check_sample(manifest, rows[position], cls, jpeg, offset, text)
        ]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the GIL
        return [problem for found in pool.map(check, range(len(rows))) for problem in found]


def _check_sample(
    manifest: shards.Manifest,
    row: dict[str, Any],
    cls: bytes,
    jpeg: bytes,
    offset: int,
    text: bytes,
) -> Iterator[str]:
    if cls != str(row["label"]).encode():
        yield f"label {cls!r}, the index says {row['label']}"
    if (offset, len(jpeg)) != (row["offset"], row["size"]):
        yield f"lies at {offset} with {len(jpeg)} bytes, the index says otherwise"
    if hashlib.sha256(jpeg).hexdigest() != row["sha256"]:
        yield "another sha256 than in the index"
    document = json.loads(text)
    shared = document.keys() & row.keys()
    if {field: document[field] for field in shared} != {field: row[field] for field in shared}:
        yield "its JSON and the index disagree"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as picture:
                picture.load()
                found = (picture.width, picture.height, picture.mode)
    except (OSError, SyntaxError, ValueError, Warning) as error:
        yield f"cannot be decoded ({error})"
        return
    if found != (manifest.crop, manifest.crop, "RGB"):
        yield f"is {found}, not {manifest.crop}×{manifest.crop} RGB"


def inspect(out: str, what: str) -> str:
    """A text about one shard, or about one sample with its way back into the raw data.

    Raises UserError when `what` is neither.
    """
    manifest = shards.load_manifest(out)
    shard_name = what.rsplit("/", 1)[-1].removesuffix(".tar")
    for shard in manifest.shards:
        if shard.name == shard_name:
            return _shard_text(out, manifest, shard)
    key = what.partition(".")[0]
    for split in manifest.document["totals"]:
        index = shards.load_index(out, split)
        rows = index.filter(pc.equal(index["key"], key)).to_pylist()
        if rows:
            return _sample_text(out, manifest, rows[0])
        rejected = storage.read(storage.join(out, "quarantine", f"{split}.jsonl"))
        for entry in map(json.loads, rejected.splitlines()):
            if entry["key"] == key:
                return _rejected_text(out, split, entry)
    raise UserError(
        f"{what}: no shard and no sample of {out}; shards are {manifest.shards[0].name} to "
        f"{manifest.shards[-1].name}, keys are file names without extension"
    )


def _shard_text(out: str, manifest: shards.Manifest, shard: shards.ShardInfo) -> str:
    index = shards.load_index(out, shard.split)
    rows = index.filter(pc.equal(index["shard"], shard.name))
    counts = Counter(rows["label"].to_pylist())
    share = max(counts.values(), default=0), min(counts.values(), default=0)
    first, last = (rows["key"][0], rows["key"][-1]) if rows.num_rows else ("", "")
    return "\n".join(
        [
            f"{storage.join(out, shard.name)}.tar",
            f"  {shard.samples:,} samples, {shard.num_bytes:,} bytes, sha256 {shard.sha256}",
            f"  {len(counts)} of {manifest.num_classes} classes, {share[1]} to {share[0]} of each",
            f"  {first} … {last}",
        ]
    )


def _sample_text(out: str, manifest: shards.Manifest, row: dict[str, Any]) -> str:
    name = manifest.class_names[row["label"]]
    fixes = ", ".join(row["fixes"]) or "none"
    return "\n".join(
        [
            f"{row['key']}: label {row['label']}, {row['wnid']}, {name}",
            f"  stored  {storage.join(out, row['shard'])}.tar, bytes {row['offset']:,} + "
            f"{row['size']:,}, sha256 {row['sha256']}",
            f"  raw     {_origin(row)}",
            f"          {row['width']}×{row['height']} pixels; fixes: {fixes}",
        ]
    )


def _rejected_text(out: str, split: str, entry: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"{entry['key']}: rejected, {entry['reason']} ({entry['detail']})",
            f"  kept    {storage.join(out, 'quarantine', split, entry['key'])}.bin",
            f"  raw     {_origin(entry)}",
        ]
    )


def _origin(row: dict[str, Any]) -> str:
    place = f"RAW/{row['source']}, bytes {row['source_offset']:,} + {row['source_size']:,}"
    return f"{place}, sha256 {row['source_sha256']}"
