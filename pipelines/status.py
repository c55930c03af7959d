"""How far a build in OUT is, whoever runs it and wherever: told from OUT alone.

One listing, the plan, the newest journals and the footers of the sidecars; never a tar.
"""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import journal, plan_files, shards, storage, tars
from pipelines.damage import DAMAGE
from pipelines.journal import Journal
from pipelines.plan import Plan
from pipelines.progress import clock

SILENT_SECONDS = 60.0  # without a sign of life: twelve times the journal's interval
_MAX_SIDECARS = 2000  # footers read; a listing of more shards is told without the rest's rejected
_MAX_BUILDERS = 10
_READS_AHEAD = 16
_NAMED = 5  # damaged shards told by name


def status(out: str) -> dict[str, Any]:
    """Raises UserError when no build was begun in `out`.

    `rejected` (reason → pictures) is of the `sidecars_read` among the shards that are done.
    """
    files = dict(storage.list_files(out))
    if "_meta/plan.json" not in files:
        raise UserError(
            f"{out}: no build was begun here (no _meta/plan.json); start one with "
            f"`python -m pipelines build --raw RAW --out {shlex.quote(out)}`"
        )
    plan = plan_files.load(out)
    complete = "manifest.json" in files
    facts = _from_manifest(out) if complete else _from_sidecars(out, plan, files)
    rows = facts.pop("shards")
    done = {name: row for name, row in rows.items() if files.get(f"{name}.tar") == row["bytes"]}
    names = journal.newest(files, _MAX_BUILDERS)
    now = time.time()
    return {
        "out": out,
        "plan_id": plan.plan_id,
        "complete": complete,
        "splits": _splits(plan, done, files),
        "damaged": sorted(set(rows) - set(done)),
        **facts,
        "builders": [_builder(entry, now) for entry in journal.load(out, names)],
        "builders_in_all": sum(map(journal.is_journal, files)),
    }


def text(document: dict[str, Any]) -> str:
    """For people, several lines."""
    lines = [f"{document['out']}: plan {document['plan_id'][:12]}, {_verdict(document)}"]
    for split, part in document["splits"].items():
        samples = "" if part["samples"] is None else f"{part['samples']:,} samples, "
        lines.append(
            f"{split}: {part['shards']:,} of {part['shards_total']:,} shards, {samples}"
            f"{part['bytes'] / 1e6:,.1f} MB; {part['pictures_total']:,} pictures planned"
        )
    lines.append(_rejected_in_words(document))
    if damaged := document["damaged"]:
        more = f" and {len(damaged) - _NAMED:,} more" if len(damaged) > _NAMED else ""
        lines.append(
            f"damaged: the tar of {', '.join(damaged[:_NAMED])}{more} is missing or has another "
            f"size than it was given; {_remedy(document)}"
        )
    lines += [_builder_in_words(builder) for builder in document["builders"]]
    hidden = document["builders_in_all"] - len(document["builders"])
    return "\n".join([*lines, *([f"{hidden} earlier builders not shown"] if hidden > 0 else [])])


def _from_manifest(out: str) -> dict[str, Any]:
    document = shards.load_manifest(out).document
    return {
        "shards": {row["name"]: row for row in document["shards"]},
        "rejected": dict(sorted(document.get("rejected", {}).items())),
        "sidecars_read": len(document["shards"]),
    }


def _from_sidecars(out: str, plan: Plan, files: dict[str, int]) -> dict[str, Any]:
    ids = {shard.name: shard.id for shard in plan.shards}
    names = [name for name in ids if f"_meta/{name}.parquet" in files]
    read = names[:_MAX_SIDECARS]
    sizes = [files[f"_meta/{name}.parquet"] for name in read]
    with ThreadPoolExecutor(_READS_AHEAD) as pool:
        statuses = list(pool.map(lambda name, size: _footer(out, name, size), read, sizes))
    rows: dict[str, dict[str, Any]] = {
        name: {"bytes": files.get(f"{name}.tar"), "samples": None} for name in names[len(read) :]
    }
    rejected: Counter[str] = Counter()
    for name, found in zip(read, statuses, strict=True):
        if found is None:
            rows[name] = {"bytes": None, "samples": 0}
        elif found["shard_id"] == ids[name]:  # otherwise it waits to be made for a changed plan
            rows[name] = found
            rejected.update(entry["reason"] for entry in found["rejected"])
    return {
        "shards": rows,
        "rejected": dict(sorted(rejected.items())),
        "sidecars_read": len(read),
    }


def _footer(out: str, name: str, size: int) -> dict[str, Any] | None:
    """The status in a sidecar's metadata, without its rows; None for a damaged one, which the
    next build makes anew."""
    file = pa.PythonFile(tars.RangeFile(shards.sidecar_uri(out, name), 0, size), mode="r")
    try:
        metadata = pq.read_schema(file).metadata or {}
        found: dict[str, Any] = json.loads(metadata.get(shards.STATUS, b""))
        numbers = (found["bytes"], found["samples"])
        reasons = [entry["reason"] for entry in found["rejected"]]
    except DAMAGE:
        return None
    good = all(type(n) is int for n in numbers) and all(isinstance(r, str) for r in reasons)
    return found if good and "shard_id" in found else None


def _splits(
    plan: Plan, done: dict[str, dict[str, Any]], files: dict[str, int]
) -> dict[str, dict[str, Any]]:
    splits: dict[str, dict[str, Any]] = {}
    for shard in plan.shards:
        part = splits.setdefault(
            shard.split,
            {"shards": 0, "shards_total": 0, "samples": 0, "pictures_total": 0, "bytes": 0},
        )
        part["shards_total"] += 1
        part["pictures_total"] += shard.samples
        if (row := done.get(shard.name)) is not None:
            part["shards"] += 1
            part["bytes"] += files[f"{shard.name}.tar"]
            unknown = row["samples"] is None or part["samples"] is None
            part["samples"] = None if unknown else part["samples"] + row["samples"]
    return splits


def _builder(entry: Journal, now: float) -> dict[str, Any]:
    age = max(now - entry.updated, 0.0)
    silent = entry.state == "building" and age > SILENT_SECONDS
    last = entry.points[-1] if entry.points else None
    building = entry.state == "building" and not silent
    left = entry.pictures - (last.pictures if last else 0)
    recent = journal.RECENT_SECONDS if building else None
    return {
        "builder": entry.builder,
        "host": entry.host,
        "pid": entry.pid,
        "state": entry.state,
        "silent": silent,
        "message": entry.message,
        "started": entry.started,
        "seconds_since_sign_of_life": round(age, 1),
        "shards": (last.shards - entry.points[0].shards) if last else 0,
        "pictures": (last.pictures - entry.points[0].pictures) if last else 0,
        "images_per_second": round(journal.rate(entry.points, recent), 3),
        "eta_seconds": journal.eta(left, journal.rate(entry.points)) if building else None,
    }


def _verdict(document: dict[str, Any]) -> str:
    builders = document["builders"]
    if document["complete"]:
        return "complete" if not document["damaged"] else "complete but damaged"
    if any(builder["state"] == "building" and not builder["silent"] for builder in builders):
        return "being built"
    return "not complete, nobody builds; the same build command continues"


def _remedy(document: dict[str, Any]) -> str:
    if document["complete"]:
        return f"`python -m pipelines verify {shlex.quote(document['out'])}` tells more"
    return "the same build command makes it anew"


def _rejected_in_words(document: dict[str, Any]) -> str:
    reasons = ", ".join(
        f"{count:,} {reason}" for reason, count in document.get("rejected", {}).items()
    )
    shards_done = sum(part["shards"] for part in document["splits"].values())
    read = document["sidecars_read"]
    of_some = f" (in {read:,} of {shards_done:,} shards)" if read < shards_done else ""
    total = sum(document["rejected"].values())
    return f"rejected: {total:,}{of_some}{f': {reasons}' if reasons else ''}"


def _builder_in_words(builder: dict[str, Any]) -> str:
    who = f"builder on {builder['host']} (pid {builder['pid']})"
    made = f"{builder['shards']:,} shards, {builder['pictures']:,} images"
    pace = f"{made}, {builder['images_per_second']:,.0f} img/s"
    age = _age(builder["seconds_since_sign_of_life"])
    if builder["silent"]:
        return f"{who}: silent for {age}: probably dead; the same build command continues; {made}"
    if builder["state"] == "building":
        eta = clock(builder["eta_seconds"])
        return f"{who}: building, last sign of life {age} ago; {pace}, ETA {eta}"
    message = f": {builder['message']}" if builder["message"] else ""
    return f"{who}: {builder['state']} {age} ago{message}; {pace}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
