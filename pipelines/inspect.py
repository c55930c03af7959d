"""One shard, one image with its way back to the bytes that it came from, or how far a build is."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alexnet.errors import UserError
from pipelines import plan_files, shards, sidecars, storage
from pipelines.progress import clock
from pipelines.sources.table import PARQUET

_PLANNED = ("split", "key", "name", "label", "wnid", "source")  # columns of the plan
_COPIES_SHOWN = 20
_SHARDS_SHOWN = 5
_READS_AHEAD = 16
_RECENT_SECONDS = 600.0


def inspect(out: str, what: str) -> dict[str, Any]:
    """What is known of a shard (train-000000, also with .tar or a path), or of a sample.

    A sample is named by its key, also with an extension or a path, or by the end of the path of
    its file in RAW. Keys are unique within a split only: every split that has the key is reported.
    Raises UserError when `what` is neither, or when files of the set are damaged.
    """
    manifest = shards.load_manifest(out)
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


def status(out: str) -> dict[str, Any]:
    """How far a build in `out` is, whoever runs it and wherever: from one listing, the plan and the
    ends of the sidecars, never from a tar. Raises UserError when no build was begun there."""
    files = dict(storage.list_files(out))
    if "_meta/plan.json" not in files:
        raise UserError(
            f"{out}: no build was begun here (no _meta/plan.json); start one with "
            f"`python -m pipelines build --raw RAW --out {shlex.quote(out)}`"
        )
    plan = plan_files.load(out)
    complete = "manifest.json" in files  # then every shard has a sidecar, or is damaged
    begun = [s for s in plan.shards if complete or f"_meta/{s.name}.parquet" in files]
    lengths = {s.name: files.get(f"_meta/{s.name}.parquet") for s in begun}
    there = {name: length for name, length in lengths.items() if length is not None}
    found = dict(zip(there, sidecars.load_statuses(out, there), strict=True))
    with ThreadPoolExecutor(_READS_AHEAD) as pool:
        places = [sidecars.place(out, name) for name in there]
        ages = dict(zip(there, pool.map(storage.age, places), strict=True))
    splits: dict[str, dict[str, int]] = {}
    for shard in plan.shards:
        empty = {"shards": 0, "shards_total": 0, "samples": 0, "pictures_total": 0, "bytes": 0}
        part = splits.setdefault(shard.split, empty)
        part["shards_total"] += 1
        part["pictures_total"] += shard.samples
    damaged, rejected, done = [], Counter[str](), list[tuple[float, int]]()
    for shard in begun:
        facts = found.get(shard.name)
        if facts is None or files.get(f"{shard.name}.tar") != facts["bytes"]:
            damaged.append(shard.name)
        elif facts.get("shard_id") == shard.id:  # else it waits to be rebuilt for a changed plan
            done.append((ages[shard.name], shard.samples))
            part = splits[shard.split]
            part["shards"] += 1
            part["samples"] += facts["samples"]
            part["bytes"] += facts["bytes"]
            rejected.update(entry["reason"] for entry in facts["rejected"])
    rate = _rate(done)
    left = plan.images - sum(images for _, images in done)
    return {
        "out": out,
        "plan_id": plan.plan_id,
        "complete": complete,
        "splits": splits,
        "damaged": damaged,
        "rejected": dict(sorted(rejected.items())),
        "seconds_since_last_shard": round(min(done)[0], 1) if done else None,
        "images_per_second": rate,
        "eta_seconds": left / rate if rate else None,
    }


def _rate(done: list[tuple[float, int]]) -> float | None:
    """Images per second while the newest shards were made: those no more than _RECENT_SECONDS older
    than the last one. None for fewer than two. done: age in seconds and images of each shard."""
    recent = sorted(entry for entry in done if entry[0] <= min(done)[0] + _RECENT_SECONDS)
    seconds = recent[-1][0] - recent[0][0] if recent else 0.0
    return round(sum(images for _, images in recent[:-1]) / seconds, 3) if seconds else None


def _shard(out: str, manifest: shards.Manifest, shard: shards.ShardInfo) -> dict[str, Any]:
    index = shards.load_index(out, shard.split)
    rows = index.filter(pc.equal(index["shard"], shard.name))
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
    planned = plan_files.load_rows(out, _PLANNED)
    ends = pc.ends_with(planned["source"], f"/{what.lstrip('/')}")
    same = pc.or_(ends, pc.equal(planned["source"], what))
    return [*dict.fromkeys(planned.filter(same)["key"].to_pylist())]


def _samples(out: str, manifest: shards.Manifest, keys: list[str]) -> list[dict[str, Any]]:
    indexes = {split: shards.load_index(out, split) for split in manifest.splits}
    planned: pa.Table | None = None
    wanted = pa.array(keys, pa.string())
    found = []
    for split, index in indexes.items():
        stored = index.filter(pc.is_in(index["key"], value_set=wanted)).to_pylist()
        refused = [row for row in shards.load_quarantine(out, split) if row["key"] in keys]
        if stored or refused:
            planned = plan_files.load_rows(out, _PLANNED) if planned is None else planned
            rows = planned.filter(pc.equal(planned["split"], split))
            rows = rows.filter(pc.is_in(rows["key"], value_set=wanted))
            plans = {row["key"]: row for row in rows.to_pylist()}
            for row in stored:
                entry = _entry(manifest, split, row, plans.get(row["key"], {}))
                found.append(entry | _stored(split, row, indexes))
            for row in refused:
                entry = _entry(manifest, split, row, plans.get(row["key"], {}))
                found.append(entry | _refused(split, row))
    return found


def _entry(
    manifest: shards.Manifest, split: str, row: dict[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    """What is known of every image; `source_offset` counts bytes in an archive, rows in a parquet
    file."""
    label = row.get("label", plan.get("label", -1))
    known = 0 <= label < manifest.num_classes
    unit = "row" if row["source"].endswith(PARQUET) else "offset"
    raw = {
        "layout": manifest.document["source"]["layout"],
        "container": row["source"],
        unit: row["source_offset"],
        "size": row["source_size"],
        "sha256": row["source_sha256"],
    }
    return {
        "key": row["key"],
        "split": split,
        "label": label if known else None,
        "wnid": row.get("wnid", plan.get("wnid")) or None,
        "class_name": manifest.class_names[label] if known else None,
        "name": row.get("name", plan.get("name")),
        "raw": raw | {side: row[side] for side in ("width", "height") if side in row},
    }


def _stored(split: str, row: dict[str, Any], indexes: dict[str, pa.Table]) -> dict[str, Any]:
    """With the other samples that have the same raw bytes or the same stored image."""
    copies = []
    for other, index in indexes.items():
        files, images = (pc.equal(index[n], row[n]) for n in ("source_sha256", "sha256"))
        for found in index.filter(pc.or_(files, images)).to_pylist():
            if (other, found["key"]) != (split, row["key"]):
                same = "file" if found["source_sha256"] == row["source_sha256"] else "image"
                copy = {"split": other, "key": found["key"], "wnid": found["wnid"] or None}
                copies.append(copy | {"same": same})
    place = {name: row[name] for name in ("offset", "size", "sha256")}
    return {
        "fate": "stored",
        "stored": {"file": f"{row['shard']}.tar"} | place,
        "fixes": row["fixes"],
        "copies": copies[:_COPIES_SHOWN],
        "copies_in_all": len(copies),
    }


def _refused(split: str, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "fate": "rejected",
        "reason": row["reason"],
        "detail": row.get("detail", ""),
        "kept": shards.rejected_name(split, row["key"]),
    }


def text(document: dict[str, Any]) -> str:
    """The document of `inspect` for people."""
    if document["kind"] == "sample":
        return "\n".join(_sample_text(document["out"], sample) for sample in document["samples"])
    shard = document["shard"]
    fewest, most = shard["samples_per_class"]
    return (
        f"{storage.join(document['out'], shard['file'])}\n"
        f"  {shard['samples']:,} samples, {shard['bytes']:,} bytes, sha256 {shard['sha256']}\n"
        f"  {shard['classes']} of {shard['classes_in_all']} classes, {fewest} to {most} of each\n  "
        + (f"{shard['first_key']} … {shard['last_key']}" if shard["samples"] else "no sample")
    )


def _sample_text(out: str, sample: dict[str, Any]) -> str:
    raw = sample["raw"]
    label = f"label {sample['label']}, {sample['wnid']}, {sample['class_name']}"
    label = "unlabelled" if sample["label"] is None else label
    if "row" in raw:
        place = f"row {raw['row']:,} of RAW/{raw['container']}, {raw['size']:,} bytes"
    else:
        place = f"RAW/{raw['container']}, bytes {raw['offset']:,} + {raw['size']:,}"
    name = f"named {sample['name']}; " if sample["name"] else ""
    origin = [
        f"  raw     {place}, sha256 {raw['sha256']}",
        f"          {name}layout of RAW: {raw['layout']}",
    ]
    if re.fullmatch(r"(train|val|test)-\d{6,}\.tar", raw["container"]):
        origin.append(
            "          RAW is a shard set itself, and knows where the image came from: "
            f"`python -m pipelines inspect {shlex.quote(sample['key'])} --out RAW`"
        )
    title = f"{sample['split']} {sample['key']}:"
    if sample["fate"] == "rejected":
        reason = f"rejected, {sample['reason']} ({sample['detail']})"
        kept = f"  kept    {storage.join(out, sample['kept'])}"
        return "\n".join([f"{title} {reason}; {label}", kept, *origin])
    stored = sample["stored"]
    lines = [
        f"{title} {label}",
        f"  stored  {storage.join(out, stored['file'])}, bytes {stored['offset']:,} + "
        f"{stored['size']:,}, sha256 {stored['sha256']}",
        *origin,
        f"          {raw['width']}×{raw['height']} pixels; fixes: "
        f"{', '.join(sample['fixes']) or 'none'}",
    ]
    for copy in sample["copies"]:
        wnid = copy["wnid"] or "unlabelled"
        lines.append(f"  same {copy['same']} as {copy['split']} {copy['key']} ({wnid})")
    if (more := sample["copies_in_all"] - len(sample["copies"])) > 0:
        lines.append(f"  and as {more:,} others")
    return "\n".join(lines)


def status_text(document: dict[str, Any]) -> str:
    """The document of `status` for people."""
    out, damaged, complete = (document[name] for name in ("out", "damaged", "complete"))
    verdict = "complete but damaged" if damaged else "complete"
    lines = [
        f"{out}: plan {document['plan_id'][:12]}, "
        + (verdict if complete else "not complete; the same build command continues")
    ]
    for split, part in document["splits"].items():
        lines.append(
            f"{split}: {part['shards']:,} of {part['shards_total']:,} shards, "
            f"{part['samples']:,} samples, {part['bytes'] / 1e6:,.1f} MB; "
            f"{part['pictures_total']:,} images planned"
        )
    reasons = [f"{count:,} {reason}" for reason, count in document["rejected"].items()]
    total = sum(document["rejected"].values())
    lines.append(f"rejected: {total:,}" + f": {', '.join(reasons)}" * bool(reasons))
    if not complete and (age := document["seconds_since_last_shard"]) is not None:
        rate, eta = document["images_per_second"], clock(document["eta_seconds"])
        pace = "" if rate is None else f"; {rate:,.0f} img/s, ETA {eta} if it goes on like this"
        lines.append(f"last shard: {clock(age)} ago{pace}")
    if damaged:
        more = f" and {len(damaged) - _SHARDS_SHOWN:,} more" * (len(damaged) > _SHARDS_SHOWN)
        remedy = "the same build command rebuilds it"
        if complete:
            remedy = f"`python -m pipelines verify {shlex.quote(out)}` tells more"
        lines.append(
            f"damaged: the tar of {', '.join(damaged[:_SHARDS_SHOWN])}{more} is missing or has "
            f"another size than it was given; {remedy}"
        )
    return "\n".join(lines)
