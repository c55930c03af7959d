"""One shard, or one picture with its way back to the container and the bytes that it came from."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import shards, storage
from pipelines.sources import UNLABELLED
from pipelines.verify import contents

_COPIES_SHOWN = 20
_OWN_SHARD = re.compile(r"(train|val|test)-\d{6,}\.tar")


def inspect(out: str, what: str) -> dict[str, Any]:
    """What is known of a shard (train-000000, also with .tar or a path), or of a sample.

    A sample is named by its key, also with an extension or a path, or by the end of the path of
    its file in RAW. Keys are unique within a split only: every split that has the key is told.
    Raises UserError when `what` is neither, or when files of the set are damaged.
    """
    manifest = contents.manifest(out)
    name = what.rstrip("/").rsplit("/", 1)[-1]
    for shard in manifest.shards:
        if shard.name == re.sub(r"\.(tar|idx|parquet)$", "", name):
            return {"out": out, "kind": "shard", "shard": _shard(out, manifest, shard)}
    samples = _samples(out, manifest, [name.partition(".")[0]])
    if not samples:
        samples = _samples(out, manifest, _keys_of_file(out, what))
    if not samples:
        ends = f"{manifest.shards[0].name} to {manifest.shards[-1].name}" if manifest.shards else ""
        raise UserError(
            f"{what}: no shard and no sample of {out}; shards are {ends or 'none'}, keys are file "
            "names without extension"
        )
    return {"out": out, "kind": "sample", "samples": samples}


def _shard(out: str, manifest: shards.Manifest, shard: shards.ShardInfo) -> dict[str, Any]:
    rows = contents.rows_of(contents.index(out, shard.split), "shard", shard.name)
    counts = pc.value_counts(rows["label"]).field("counts").to_pylist()
    return {
        "name": shard.name,
        "split": shard.split,
        "file": f"{shard.name}.tar",
        "samples": shard.samples,
        "bytes": shard.num_bytes,
        "sha256": shard.sha256,
        "classes": len(counts),
        "classes_in_all": manifest.num_classes,
        "samples_per_class": [min(counts, default=0), max(counts, default=0)],
        "first_key": rows["key"][0].as_py() if rows.num_rows else None,
        "last_key": rows["key"][-1].as_py() if rows.num_rows else None,
    }


def _keys_of_file(out: str, what: str) -> list[str]:
    """The keys of the samples whose file in RAW ends in the path `what`."""
    planned = contents.planned(out)
    ends = pc.ends_with(planned["source"], f"/{what.lstrip('/')}")
    same = pc.or_(ends, pc.equal(planned["source"], what))
    return [*dict.fromkeys(planned.filter(same)["key"].to_pylist())]


def _samples(out: str, manifest: shards.Manifest, keys: list[str]) -> list[dict[str, Any]]:
    indexes = {split: contents.index(out, split) for split in contents.splits(manifest)}
    planned: pa.Table | None = None
    wanted = pa.array(keys, pa.string())
    found = []
    for split, index in indexes.items():
        stored = index.filter(pc.is_in(index["key"], value_set=wanted)).to_pylist()
        refused = [row for row in contents.quarantine(out, split) if row["key"] in keys]
        if stored or refused:
            planned = contents.planned(out) if planned is None else planned
            rows = contents.rows_of(planned, "split", split)
            rows = rows.filter(pc.is_in(rows["key"], value_set=wanted))
            plans = {row["key"]: row for row in rows.to_pylist()}
            found += [
                _stored(manifest, split, row, plans.get(row["key"], {}), indexes) for row in stored
            ]
            found += [_refused(manifest, split, row, plans.get(row["key"], {})) for row in refused]
    return found


def _stored(
    manifest: shards.Manifest,
    split: str,
    row: dict[str, Any],
    plan: dict[str, Any],
    indexes: dict[str, pa.Table],
) -> dict[str, Any]:
    stored = {"file": f"{row['shard']}.tar", "offset": row["offset"], "size": row["size"]}
    return {
        "key": row["key"],
        "split": split,
        "fate": "stored",
        **_class(manifest, row),
        "name": plan.get("name"),
        "stored": stored | {"sha256": row["sha256"]},
        "raw": _origin(manifest, row) | {"width": row["width"], "height": row["height"]},
        "fixes": row["fixes"],
        **_copies(split, row, indexes),
    }


def _refused(
    manifest: shards.Manifest, split: str, row: dict[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    return {
        "key": row["key"],
        "split": split,
        "fate": "rejected",
        "reason": row["reason"],
        "detail": row.get("detail", ""),
        **_class(manifest, plan),
        "name": row.get("name"),
        "kept": f"quarantine/{split}/{row['key']}.bin",
        "raw": _origin(manifest, row),
    }


def _class(manifest: shards.Manifest, row: dict[str, Any]) -> dict[str, Any]:
    label = row.get("label", UNLABELLED)
    known = 0 <= label < manifest.num_classes
    name = manifest.class_names[label] if known else None
    return {"label": label if known else None, "wnid": row.get("wnid") or None, "class_name": name}


def _origin(manifest: shards.Manifest, row: dict[str, Any]) -> dict[str, Any]:
    """`source_offset` counts bytes in an archive, rows in a parquet file."""
    container = row["source"]
    unit = "row" if container.endswith(".parquet") else "offset"
    return {
        "layout": manifest.document["source"]["layout"],
        "container": container,
        unit: row["source_offset"],
        "size": row["source_size"],
        "sha256": row["source_sha256"],
    }


def _copies(split: str, row: dict[str, Any], indexes: dict[str, pa.Table]) -> dict[str, Any]:
    """Other samples with the same raw bytes or the same stored picture."""
    copies = []
    for other, index in indexes.items():
        files, pictures = (pc.equal(index[n], row[n]) for n in ("source_sha256", "sha256"))
        for found in index.filter(pc.or_(files, pictures)).to_pylist():
            if (other, found["key"]) != (split, row["key"]):
                same = "file" if found["source_sha256"] == row["source_sha256"] else "picture"
                copy = {"split": other, "key": found["key"], "wnid": found["wnid"] or None}
                copies.append(copy | {"same": same})
    return {"copies": copies[:_COPIES_SHOWN], "copies_in_all": len(copies)}


def text(document: dict[str, Any]) -> str:
    """The document of `inspect` for people."""
    out = document["out"]
    if document["kind"] == "shard":
        return _shard_text(out, document["shard"])
    return "\n".join(
        _sample_text(out, sample) if sample["fate"] == "stored" else _refused_text(out, sample)
        for sample in document["samples"]
    )


def _shard_text(out: str, shard: dict[str, Any]) -> str:
    fewest, most = shard["samples_per_class"]
    keys = f"{shard['first_key']} … {shard['last_key']}" if shard["samples"] else "no sample"
    return "\n".join(
        [
            storage.join(out, shard["file"]),
            f"  {shard['samples']:,} samples, {shard['bytes']:,} bytes, sha256 {shard['sha256']}",
            f"  {shard['classes']} of {shard['classes_in_all']} classes, {fewest} to {most} of "
            "each",
            f"  {keys}",
        ]
    )


def _sample_text(out: str, sample: dict[str, Any]) -> str:
    stored, raw = sample["stored"], sample["raw"]
    lines = [
        f"{sample['split']} {sample['key']}: {_class_text(sample)}",
        f"  stored  {storage.join(out, stored['file'])}, bytes {stored['offset']:,} + "
        f"{stored['size']:,}, sha256 {stored['sha256']}",
        *_origin_lines(sample),
        f"          {raw['width']}×{raw['height']} pixels; fixes: "
        f"{', '.join(sample['fixes']) or 'none'}",
    ]
    for copy in sample["copies"]:
        wnid = copy["wnid"] or "unlabelled"
        lines.append(f"  same {copy['same']} as {copy['split']} {copy['key']} ({wnid})")
    if (more := sample["copies_in_all"] - len(sample["copies"])) > 0:
        lines.append(f"  and as {more:,} others")
    return "\n".join(lines)


def _refused_text(out: str, sample: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"{sample['split']} {sample['key']}: rejected, {sample['reason']} "
            f"({sample['detail']}); {_class_text(sample)}",
            f"  kept    {storage.join(out, sample['kept'])}",
            *_origin_lines(sample),
        ]
    )


def _class_text(sample: dict[str, Any]) -> str:
    if sample["label"] is None:
        return "unlabelled"
    return f"label {sample['label']}, {sample['wnid']}, {sample['class_name']}"


def _origin_lines(sample: dict[str, Any]) -> list[str]:
    raw = sample["raw"]
    if "row" in raw:
        place = f"row {raw['row']:,} of RAW/{raw['container']}, {raw['size']:,} bytes"
    else:
        place = f"RAW/{raw['container']}, bytes {raw['offset']:,} + {raw['size']:,}"
    lines = [f"  raw     {place}, sha256 {raw['sha256']}"]
    name = f"named {sample['name']}; " if sample["name"] else ""
    lines.append(f"          {name}layout of RAW: {raw['layout']}")
    if _OWN_SHARD.fullmatch(raw["container"]):
        lines.append(
            "          RAW is a shard set itself, and knows where the picture came from: "
            f"`python -m pipelines inspect {shlex.quote(sample['key'])} --out RAW`"
        )
    return lines
