"""The plan kept in OUT: written once, so that two sets never mix, and read back by every task."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alexnet.errors import UserError
from pipelines import shards, sidecars, storage
from pipelines.plan import Plan, ShardPlan
from pipelines.shards import DAMAGE, SPLITS, Damaged, check_counts, check_shard_name, check_table
from pipelines.sources import TABLE, Shuffle
from pipelines.sources.table import check

_PLAN, _RAW = "_meta/plan.json", "_meta/raw.json"
_ROWS = "_meta/plan.parquet"  # of the first shards; the next files are _meta/plan-1.parquet, …
_SHARDS = 256  # in a file: each task reads its footer, which grows by 850 bytes a shard
_REMEDY = (
    "start the build command of this set again: it writes the plan anew and keeps every good shard"
)
_PLAN_ID = b"alexnet.plan_id"
_AS_IT_IS = ("plan_id", "identity", "labels_from", "announced", "official")  # in _PLAN


def begin(out: str, raw: str, plan: Plan) -> Plan:
    """Keep the plan in `out`, or join it there. The plan with what its first builder counted in
    RAW, which the manifest tells. Raises UserError when `out` is another's."""
    storage.sweep(out)  # what killed builders left, or the disk could fill up with it
    location = storage.join(out, _PLAN)
    if not storage.exists(location):
        _refuse_strangers(out, plan)
        try:
            storage.write_new(location, _document(plan))
        except UserError:
            if not storage.exists(location):  # else another builder was faster: whose plan is it?
                raise
    found = _read_plan(out)
    if found["plan_id"] != plan.plan_id:
        raise UserError(
            f"{out} holds plan {found['plan_id'][:12]}, this is plan {plan.plan_id[:12]} "
            f"({_differences(found, plan)}); choose another --out or the same source and flags"
        )
    if not _has_rows_of(out, plan):  # or somebody was killed while replacing a plan
        _write_rows(out, plan)
    if raw_of(out) != raw:
        storage.write(storage.join(out, _RAW), shards.canonical_json({"raw": raw}))
    return dataclasses.replace(plan, entries=found.get("entries"))


def order_in(out: str) -> Shuffle | None:
    """That of the plan kept in `out`; None where there is none."""
    if not storage.exists(storage.join(out, _PLAN)):
        return None
    return load(out).recipe.shuffle


def refuse_full(out: str, plan: Plan, numbers: Collection[int]) -> None:
    """Raises UserError where the disk of `out` lacks space for these shards, as far as their sizes
    can be told before they are made. A store has no end that could be asked for."""
    free = storage.free_bytes(out)
    needed = sum(plan.shards[n].samples for n in numbers) * plan.recipe.bytes_per_sample
    if free is not None and free < needed:
        raise UserError(
            f"{out}: {free / 1e6:,.1f} MB are free and {len(numbers)} shards take about "
            f"{needed / 1e6:,.1f} MB; make room, or choose another --out"
        )


def check_replaceable(out: str, plan: Plan, again: set[str]) -> None:
    """Raises UserError unless `plan` differs from the one in `out` in the shards `again` only."""
    before = {shard.name: shard.id for shard in load(out).shards}
    after = {shard.name: shard.id for shard in plan.shards}
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    if strangers := sorted(changed - again):
        raise UserError(
            f"{out}: more has changed than quarantined images ({len(strangers)} other shards, "
            f"first {strangers[0]}); build into another --out"
        )


def replace(out: str, raw: str, plan: Plan) -> None:
    """Put `plan` in the place of the one in `out`. What is interrupted is repaired by doing it
    again: the rows name their plan, and no finished shard names the plan it belonged to."""
    _write_rows(out, plan)
    storage.write(storage.join(out, _PLAN), _document(plan))
    storage.write(storage.join(out, _RAW), shards.canonical_json({"raw": raw}))


def load(out: str) -> Plan:
    """The plan of a set, finished or not, without its table. Raises UserError if there is none."""
    if not storage.exists(storage.join(out, _PLAN)):
        raise Damaged(f"{out}: no shard set was begun here (no {_PLAN})", _PLAN, "missing")
    document = _read_plan(out)
    with _damage_reported(out, _PLAN):
        identity = shards.canonical_json(document["identity"])
        if hashlib.sha256(identity).hexdigest() != document["plan_id"]:
            raise ValueError("its identity is not that of its plan_id")
        plan = Plan(
            **{name: document[name] for name in _AS_IT_IS},
            shards=tuple(ShardPlan(**shard) for shard in document["shards"]),
            wnids=tuple(document["classes"]["wnids"]),
            class_names=tuple(document["classes"]["names"]),
            archives={},
            entries=document.get("entries"),
            table=None,
        )
        for shard in plan.shards:
            check_shard_name(shard.name, shard.split)  # the name of a file that will be written
            check_counts(shard.samples)
    return plan


def raw_of(out: str) -> str | None:
    """Where RAW was when somebody built last; None if that is not known."""
    location = storage.join(out, _RAW)
    return str(shards.read_json(location)["raw"]) if storage.exists(location) else None


def read_rows(out: str, plan_id: str, number: int) -> list[dict[str, Any]]:
    """The planned samples of shard `number`, counted over all splits; dicts of sources.TABLE.
    Raises UserError when the rows in `out` are those of another plan."""
    file, row_group = divmod(number, _SHARDS)
    if file and not storage.exists(storage.join(out, _rows_name(file))):
        file, row_group = 0, number  # sets of earlier releases have one file
    name = _rows_name(file)
    with _damage_reported(out, name), _open_rows(out, name) as parquet:
        if _plan_id(parquet) != plan_id:
            raise UserError(f"{out} was given another plan meanwhile; start the same command again")
        _check_rows(table := parquet.read_row_group(row_group, use_threads=False))
        return list(table.to_pylist())


def load_rows(out: str, columns: Sequence[str]) -> pa.Table:
    """These columns of every planned image."""
    schema, count = pa.schema([TABLE.field(name) for name in columns]), 1
    tables = list[pa.Table]()
    while len(tables) < count:
        name = _rows_name(len(tables))
        if not storage.exists(storage.join(out, name)):
            raise Damaged(f"{out}/{name} is missing; {_REMEDY}", name, "missing")
        with _damage_reported(out, name), _open_rows(out, name) as parquet:
            count = max(count, shards.files_of(parquet.schema_arrow))
            table = parquet.read(list(columns), use_threads=False).select(list(columns))
            tables.append(table.replace_schema_metadata(None))
            check_table(tables[-1], schema)
    return pa.concat_tables(tables)


def lost_classes(out: str, rejected: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """ "SPLIT/CLASS" → images, of the classes of which every planned image of a split is among the
    rejected keys by split. Unlabelled images count for no class."""
    if not any(rejected.values()):
        return {}
    rows = load_rows(out, ("split", "key", "wnid"))
    lost: dict[str, int] = {}
    for split, keys in rejected.items():
        of_split = rows.filter(pc.equal(rows["split"], split))
        is_rejected = pc.is_in(of_split["key"], value_set=pa.array([*keys], pa.string()))
        planned = _counts(of_split["wnid"])
        refused = _counts(of_split["wnid"].filter(is_rejected))
        lost |= {f"{split}/{w}": n for w, n in sorted(refused.items()) if w and planned[w] == n}
    return lost


def _counts(values: Any) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(values).to_pylist()}


def _refuse_strangers(out: str, plan: Plan) -> None:
    """A folder without a plan must be empty, or a set of this very plan that lost it: the sidecar
    of a shard says so. Anybody may have a train-000000.tar."""
    files = {name for name, _ in storage.list_files(out)}
    if not (others := sorted(name for name in files if not name.startswith("_meta/"))):
        return
    for shard in plan.shards:
        if (name := f"_meta/{shard.name}.parquet") in files:
            with contextlib.suppress(*DAMAGE):
                sidecar = storage.read(storage.join(out, name))
                if sidecars.unpack(sidecar)[1].get("shard_id") == shard.id:
                    return
    raise UserError(f"{out} is not empty ({others[0]}, …) and no shard set; choose --out")


def _read_plan(out: str) -> Any:
    data = storage.read(storage.join(out, _PLAN))
    with _damage_reported(out, _PLAN):
        document = json.loads(data)
        if not {"plan_id", "identity", "shards", "classes"} <= document.keys():
            raise ValueError("no plan")
    return document


@contextlib.contextmanager
def _damage_reported(out: str, file: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        text = f"damaged ({shards.one_line(str(error))[:160]})"
        message = f"{storage.join(out, file)} is damaged; delete it and {_REMEDY}"
        raise Damaged(message, file, text) from error


def _check_rows(table: pa.Table) -> None:
    """Keys and sources become names of files: in OUT those of quarantined images, in RAW those of
    archives. Raises UserError or ValueError for any that leads elsewhere."""
    table = table.replace_schema_metadata(None)
    if not table.schema.equals(TABLE):
        raise ValueError(f"columns {table.schema.names}")
    table.validate(full=True)
    check("plan.parquet", table)
    outside = pc.match_substring_regex(table["source"], r"(^|/)\.\.(/|$)|^/|^s3:")
    known = pc.is_in(table["split"], value_set=pa.array(SPLITS))
    if pc.any(outside).as_py() or not pc.all(known).as_py():
        raise ValueError("a source outside of RAW, or an unknown split")


def _rows_name(file: int) -> str:
    return f"_meta/plan-{file}.parquet" if file else _ROWS


def _open_rows(out: str, name: str) -> pq.ParquetFile:
    file = storage.open_ranges(storage.join(out, name))
    return pq.ParquetFile(file, page_checksum_verification=True)


def _plan_id(parquet: pq.ParquetFile) -> str:
    return bytes((parquet.schema_arrow.metadata or {}).get(_PLAN_ID, b"")).decode()


def _has_rows_of(out: str, plan: Plan) -> bool:
    # Not there, or damaged: they are written anew.
    with contextlib.suppress(UserError, *DAMAGE), _open_rows(out, _ROWS) as parquet:
        others = range(1, shards.files_of(parquet.schema_arrow))
        there = {name for name, _ in storage.list_files(out)} if others else set()
        return _plan_id(parquet) == plan.plan_id and {*map(_rows_name, others)} <= there
    return False


def _document(plan: Plan) -> bytes:
    document: dict[str, Any] = {name: getattr(plan, name) for name in _AS_IT_IS}
    document["shards"] = [asdict(shard) for shard in plan.shards]
    document["classes"] = {"wnids": plan.wnids, "names": plan.class_names}
    if plan.entries is not None:
        document["entries"] = plan.entries
    return shards.canonical_json(document, indent=1)


def _write_rows(out: str, plan: Plan) -> None:
    """Parquet with one row group per shard, so that a task reads its own rows only; the first file,
    which tells of the others, last."""
    assert plan.table is not None, "a plan read back from OUT has no rows to write"
    starts = [0, *accumulate(shard.samples for shard in plan.shards)]
    files = range(-(-len(plan.shards) // _SHARDS))
    for file in reversed(files):
        schema = plan.table.schema.with_metadata({_PLAN_ID: plan.plan_id})
        schema = schema if file else shards.in_files(schema, len(files))
        table, buffer = plan.table.replace_schema_metadata(schema.metadata), io.BytesIO()
        with pq.ParquetWriter(buffer, schema, write_page_checksum=True) as writer:
            for number in range(file * _SHARDS, min((file + 1) * _SHARDS, len(plan.shards))):
                length = plan.shards[number].samples
                writer.write_table(table.slice(starts[number], length), row_group_size=length)
        storage.write(storage.join(out, _rows_name(file)), buffer.getvalue())


def _differences(found: dict[str, Any], plan: Plan) -> str:
    theirs, ours = dict(_flat(found["identity"])), dict(_flat(plan.identity))
    return "; ".join(
        f"{name} {theirs.get(name)} → {ours.get(name)}"
        for name in sorted(theirs | ours)
        if theirs.get(name) != ours.get(name)
    )


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested names joined by dots, each with its value in at most 40 characters."""
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield prefix + name, str(item)[:40]
