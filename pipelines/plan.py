"""Which picture goes into which shard: a pure function of source, recipe and seed, with a name.

`plan_id` is a hash of everything that decides the bytes of the output. Shard i is a function of
(plan, i) alone, so a retry, a resumed build and a rebuild elsewhere give the same shard.

Order: within a class pictures keep the source's order, and picture r of a class of n sorts at
(r + ½) / n. Cutting that order into equal runs gives each shard a short contiguous run of every
class: balanced shards, and few, long range reads. Inside a shard the order is then shuffled.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alexnet.errors import UserError
from alexnet.preprocess import NETWORK_SIDE
from pipelines import shards, storage, tars
from pipelines.sources import SPLITS, Source
from pipelines.transform import CODEC

ORDERING = "class-runs-1"  # change it when the order or the shuffle below changes
# Bytes per pixel of a photo by JPEG quality at 4:2:0; 19.7 kB for 227×227 at 90 was measured.
_QUALITIES, _BYTES_PER_PIXEL = (50, 90, 95, 100), (0.16, 0.38, 0.53, 1.1)
_TAR_OVERHEAD = 3072  # bytes per sample: three headers, padding, the label and the JSON


@dataclass(frozen=True)
class Recipe:
    """What is done to every picture, and how they are grouped."""

    resize: int = 256
    crop: int = 227
    quality: int = 90
    samples_per_shard: int = 5005
    seed: int = 0
    splits: tuple[str, ...] = SPLITS
    partial: bool = False

    def __post_init__(self) -> None:
        if not NETWORK_SIDE <= self.crop <= self.resize:
            raise UserError(
                f"--crop {self.crop} with --resize {self.resize} is impossible; choose "
                f"{NETWORK_SIDE} <= crop <= resize"
            )
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality} is out of range; choose 1 to 100")
        if self.samples_per_shard < 1:
            raise UserError(f"--samples-per-shard {self.samples_per_shard} must be at least 1")
        if not self.splits or any(split not in SPLITS for split in self.splits):
            raise UserError(f"--splits {','.join(self.splits)}: choose from {','.join(SPLITS)}")


@dataclass(frozen=True)
class ShardPlan:
    name: str
    split: str
    samples: int


@dataclass(frozen=True)
class Plan:
    plan_id: str
    identity: dict[str, Any]  # what plan_id is the hash of
    shards: tuple[ShardPlan, ...]
    table: pa.Table  # sources.TABLE, the rows of shard 0, then of shard 1, …

    @property
    def estimated_bytes(self) -> int:
        recipe = self.identity["recipe"]
        per_pixel = float(np.interp(recipe["quality"], _QUALITIES, _BYTES_PER_PIXEL))
        return int(self.table.num_rows * (recipe["crop"] ** 2 * per_pixel + _TAR_OVERHEAD))


def make(source: Source, recipe: Recipe) -> Plan:
    """Same source content, recipe and seed give the same plan, wherever the source lies."""
    identity: dict[str, Any] = {
        "format_version": shards.FORMAT_VERSION,
        "ordering": ORDERING,
        "codec": CODEC,
        "recipe": asdict(recipe) | {"splits": [s for s in SPLITS if s in recipe.splits]},
        "source": {
            "layout": source.layout,
            "containers": [list(container) for container in source.containers],
            "pictures": source.table.num_rows,
            "table_sha256": _table_sha256(source),
        },
    }
    plan_id = hashlib.sha256(shards.canonical_json(identity)).hexdigest()
    order: list[np.ndarray[Any, Any]] = []
    shard_plans: list[ShardPlan] = []
    for split in identity["recipe"]["splits"]:
        for number, rows in enumerate(_assign(source.table, split, recipe)):
            order.append(rows)
            shard_plans.append(ShardPlan(shards.shard_name(split, number), split, len(rows)))
    table = source.table.take(pa.array(np.concatenate(order)))
    return Plan(plan_id, identity, tuple(shard_plans), table)


def _table_sha256(source: Source) -> str:
    """Over every picture's place, key and label, in an order of its own."""
    digest = hashlib.sha256(shards.canonical_json([source.wnids, source.class_names]))
    table = source.table.sort_by([("split", "ascending"), ("key", "ascending")])
    for batch in table.combine_chunks().to_batches(max_chunksize=65536):
        digest.update(shards.canonical_json(batch.to_pydict()))
    return digest.hexdigest()


def _assign(table: pa.Table, split: str, recipe: Recipe) -> list[np.ndarray[Any, Any]]:
    """Row numbers of `table` for each shard of the split."""
    rows = np.flatnonzero(np.asarray(table["split"]) == split)
    part = table.take(pa.array(rows))
    by_place = np.asarray(
        pa.compute.sort_indices(
            part, sort_keys=[(name, "ascending") for name in ("label", "source", "offset")]
        )
    )
    labels = part["label"].to_numpy()[by_place]
    _, first, count = np.unique(labels, return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(first, count)
    position = (rank + 0.5) / np.repeat(count, count)
    ordered = rows[by_place[np.lexsort((labels, position))]]
    runs = np.array_split(ordered, -(-len(ordered) // recipe.samples_per_shard))
    return [run[_permutation(len(run), recipe.seed, split, i)] for i, run in enumerate(runs)]


def _permutation(length: int, seed: int, split: str, number: int) -> np.ndarray[Any, Any]:
    """From Philox's raw numbers: NumPy promises that stream for ever, unlike `permutation`'s."""
    digest = hashlib.sha256(f"{seed}/{split}/{number}".encode()).digest()
    draws = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(length)
    return np.argsort(draws, kind="stable")


# In OUT


def begin(out: str, source: Source, plan: Plan) -> None:
    """Claim `out` for this plan, or join it there. Raises UserError when it is another's."""
    location = storage.join(out, "_meta", "plan.json")
    if not storage.exists(location):
        if other := storage.list_files(out):
            raise UserError(f"{out} is not empty ({other[0][0]}, …) and no shard set; choose --out")
        document = {
            "plan_id": plan.plan_id,
            "identity": plan.identity,
            "shards": [asdict(shard) for shard in plan.shards],
            "classes": {"wnids": source.wnids, "names": source.class_names},
            "labels_from": source.labels_from,
            "announced": source.announced,
        }
        try:
            storage.write_new(location, shards.canonical_json(document, indent=1))
        except UserError:
            if not storage.exists(location):  # else another builder was faster: whose plan is it?
                raise
    _check_same(out, shards.read_json(location), plan)
    rows = storage.join(out, "_meta", "plan.parquet")
    if not storage.exists(rows):
        storage.write_new(rows, _rows_by_shard(plan))


def read_rows(out: str, number: int) -> list[dict[str, Any]]:
    """The planned samples of shard `number`, counted over all splits; dicts of sources.TABLE."""
    uri = storage.join(out, "_meta", "plan.parquet")
    file = io.BufferedReader(tars.RangeFile(uri, 0, storage.size(uri)), 1 << 16)
    with pq.ParquetFile(file) as parquet:
        rows: list[dict[str, Any]] = parquet.read_row_group(number, use_threads=False).to_pylist()
    return rows


def _rows_by_shard(plan: Plan) -> bytes:
    """Parquet with one row group per shard, so that a task reads its own rows only."""
    buffer = io.BytesIO()
    start = 0
    with pq.ParquetWriter(buffer, plan.table.schema) as writer:
        for shard in plan.shards:
            rows = plan.table.slice(start, shard.samples).combine_chunks()
            writer.write_table(rows, row_group_size=shard.samples)
            start += shard.samples
    return buffer.getvalue()


def _check_same(out: str, found: dict[str, Any], plan: Plan) -> None:
    if found["plan_id"] == plan.plan_id:
        return
    theirs, ours = _flat(found["identity"]), _flat(plan.identity)
    differing = [
        f"{name} {theirs.get(name)} → {ours.get(name)}"
        for name in sorted(theirs | ours)
        if theirs.get(name) != ours.get(name)
    ]
    raise UserError(
        f"{out} holds plan {found['plan_id'][:12]}, this is plan {plan.plan_id[:12]} "
        f"({'; '.join(differing)}); choose another --out or the same source and flags"
    )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(item)[:40]
    return flat
