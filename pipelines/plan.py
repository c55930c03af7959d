"""Which image goes into which shard: a pure function of source, recipe and seed, with a name.

`plan_id` is a hash of everything that decides the bytes of the output. Shard i is a function of
(plan, i) alone, so a retry, a resumed build and a rebuild elsewhere give the same shard.

Order of the images before they are cut into shards (`--shuffle`):
  classes  within a class images keep the source's order, and image r of a class of n sorts at
           (r + ½) / n. Each shard gets a short contiguous run of every class: balanced shards,
           and few, long range reads.
  global   a random permutation of all. About one read per image.
  source   as the source has them: the longest reads, for sources that are mixed already.
Inside a shard the order is always shuffled.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alexnet import NETWORK_SIDE
from alexnet.errors import UserError
from pipelines import shards
from pipelines.sources import SPLITS, Shuffle, Source, StoredAs, hold_out, select

CODEC = "jpeg-pillow-420"  # Pillow's encoder: 0.06 dB better than simplejpeg's at the same size
ORDERING = "runs-2"  # change it when an order or the shuffle below changes
# Bytes per pixel of a photo by JPEG quality at 4:2:0; 19.7 kB for 227×227 at 90 was measured.
_QUALITIES, _BYTES_PER_PIXEL = (50, 90, 95, 100), (0.16, 0.38, 0.53, 1.1)
_TAR_OVERHEAD = 3072  # bytes per sample: three headers, padding, the label and the JSON
_MAX_SHARD = 5 << 30  # bytes; what one S3 PUT takes

Orientation = Literal["ignore", "apply"]


@dataclass(frozen=True)
class Recipe:
    """What is done to every image, and how they are grouped."""

    resize: int = 256
    crop: int = 227
    quality: int = 90
    exif_orientation: Orientation = "ignore"
    samples_per_shard: int = 5005
    shuffle: Shuffle = "classes"
    seed: int = 0
    splits: tuple[str, ...] = ("train", "val")
    subset: tuple[str, ...] = ()  # WNIDs; empty for all
    per_class: int | None = None
    partial: bool = False
    val_share: float | None = None  # of each class's train images, for a RAW without val

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
        if self.samples_per_shard * self.bytes_per_sample > _MAX_SHARD:
            raise UserError(
                f"--samples-per-shard {self.samples_per_shard} makes shards of about "
                f"{self.samples_per_shard * self.bytes_per_sample / 2**30:.1f} GiB, more than the "
                f"5 GiB of one upload; choose at most {int(_MAX_SHARD / self.bytes_per_sample):,}"
            )
        if self.per_class is not None and self.per_class < 1:
            raise UserError(f"--per-class {self.per_class} must be at least 1")
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise UserError(f"--val-share {self.val_share:g} must lie between 0 and 1, as 0.1 does")
        if self.val_share is not None and not {"train", "val"} <= {*self.splits}:
            raise UserError("--val-share needs --splits train,val: it makes one from the other")
        if not self.splits or any(split not in SPLITS for split in self.splits):
            raise UserError(f"--splits {','.join(self.splits)}: choose from {','.join(SPLITS)}")
        for flag, value, kind in (
            ("--shuffle", self.shuffle, Shuffle),
            ("--exif-orientation", self.exif_orientation, Orientation),
        ):
            if value not in get_args(kind):
                raise UserError(f"{flag} {value}: choose from {', '.join(get_args(kind))}")

    @property
    def raw_splits(self) -> list[str]:
        """What RAW has to hold."""
        own = {"val"} if self.val_share is not None else set()
        return [split for split in SPLITS if split in {*self.splits} - own]

    @property
    def bytes_per_sample(self) -> float:
        """Estimated, in a shard."""
        per_pixel = float(np.interp(self.quality, _QUALITIES, _BYTES_PER_PIXEL))
        return self.crop**2 * per_pixel + _TAR_OVERHEAD


@dataclass(frozen=True)
class ShardPlan:
    name: str
    split: str
    samples: int
    id: str  # hash of its rows and of what is done to them


@dataclass(frozen=True)
class Plan:
    plan_id: str
    identity: dict[str, Any]  # what plan_id is the hash of
    shards: tuple[ShardPlan, ...]
    wnids: tuple[str, ...]
    class_names: tuple[str, ...]
    labels_from: dict[str, str]
    announced: dict[str, int] | None
    official: bool
    archives: dict[str, str]  # their storage.version, as in Source; {} when read from OUT
    entries: dict[str, Any] | None  # sources.Accounts of RAW; None in a plan from before these
    table: pa.Table | None  # sources.TABLE in the order of the shards; None when read from OUT

    @property
    def recipe(self) -> Recipe:
        fields = dict(self.identity["recipe"])
        return Recipe(**fields | {name: tuple(fields[name]) for name in ("splits", "subset")})

    @property
    def images(self) -> int:
        return sum(shard.samples for shard in self.shards)


def chosen(source: Source, recipe: Recipe) -> Source:
    """What the recipe takes of RAW as it is: its val split, its classes, its images of each.

    Raises UserError where nothing is left, as sources.hold_out and sources.select say.
    """
    if recipe.val_share is not None:
        source = hold_out(source, recipe.val_share)
    return select(source, recipe.subset, recipe.per_class)


def make(source: Source, recipe: Recipe) -> Plan:
    """Same source content, recipe and seed give the same plan, wherever the source lies."""
    stored, (side, _) = source.stored, geometry(recipe, source.stored)
    if stored and (recipe.resize > stored.resize or side < recipe.crop):
        raise UserError(
            f"--resize {recipe.resize} --crop {recipe.crop} needs more than these shards hold "
            f"(resize {stored.resize}, crop {stored.crop}); build from the raw archives instead"
        )
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
            "stored": asdict(stored) if stored else None,
        },
    }
    identity["recipe"]["subset"] = sorted(recipe.subset)
    if recipe.val_share is None:  # as in plans from before there was one
        del identity["recipe"]["val_share"]
    work = [identity["format_version"], CODEC, recipe.resize, recipe.crop, recipe.quality]
    work += [recipe.exif_orientation, identity["source"]["stored"]]
    table, shard_plans = _cut(source.table, recipe, shards.canonical_json(work))
    return Plan(
        plan_id=hashlib.sha256(shards.canonical_json(identity)).hexdigest(),
        identity=identity,
        shards=tuple(shard_plans),
        wnids=source.wnids,
        class_names=source.class_names,
        labels_from=source.labels_from,
        announced=source.announced,
        official=source.official,
        archives=source.archives,
        entries=source.accounts.to_json(),
        table=table,
    )


def geometry(recipe: Recipe, stored: StoredAs | None) -> tuple[int, bool]:
    """(the shorter side that an image of the source is resized to, whether it can stay as it is).

    An image that is stored already shows the centre of the raw one, its shorter side scaled to
    `stored.resize`; the same scale for the new one needs less than `recipe.resize` pixels.
    """
    if stored is None:
        return recipe.resize, False
    same = StoredAs(recipe.resize, recipe.crop, recipe.quality, stored.digest) == stored
    return round(stored.crop * recipe.resize / stored.resize), same


def _cut(table: pa.Table, recipe: Recipe, work: bytes) -> tuple[pa.Table, list[ShardPlan]]:
    shard_plans, order = [], []
    for split in (split for split in SPLITS if split in recipe.splits):
        for number, rows in enumerate(_assign(table, split, recipe)):
            name = shards.shard_name(split, number)
            digest = hashlib.sha256(work + name.encode())
            _hash_rows(digest, table, pa.array(rows))
            shard_plans.append(ShardPlan(name, split, len(rows), digest.hexdigest()))
            order.append(rows)
    return table.take(pa.array(np.concatenate(order))).combine_chunks(), shard_plans


def _assign(table: pa.Table, split: str, recipe: Recipe) -> list[np.ndarray[Any, Any]]:
    """Row numbers of `table` for each shard of the split."""
    rows = np.flatnonzero(pc.equal(table["split"], split).to_numpy())
    if not len(rows):
        raise UserError(f"--splits {','.join(recipe.splits)}: there is no {split} image to store")
    part = table.select(["label", "source", "offset"]).take(pa.array(rows))
    if recipe.shuffle == "classes":
        by_place = _sorted(part, "label", "source", "offset")
        labels = part["label"].to_numpy()[by_place]
        _, first, count = np.unique(labels, return_index=True, return_counts=True)
        rank = np.arange(len(labels)) - np.repeat(first, count)
        position = (rank + 0.5) / np.repeat(count, count)
        order = by_place[np.lexsort((labels, position))]
    else:
        order = _sorted(part, "source", "offset")
        if recipe.shuffle == "global":
            order = order[_permutation(len(order), recipe.seed, split, "global")]
    runs = np.array_split(rows[order], -(-len(order) // recipe.samples_per_shard))
    return [run[_permutation(len(run), recipe.seed, split, i)] for i, run in enumerate(runs)]


def _sorted(table: pa.Table, *columns: str) -> np.ndarray[Any, Any]:
    keys = [(name, "ascending") for name in columns]
    return np.asarray(pc.sort_indices(table, sort_keys=keys))


def _permutation(length: int, seed: int, split: str, number: int | str) -> np.ndarray[Any, Any]:
    """From Philox's raw numbers: NumPy promises that stream for ever, unlike `permutation`'s."""
    digest = hashlib.sha256(f"{seed}/{split}/{number}".encode()).digest()
    draws = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(length)
    return np.argsort(draws, kind="stable")


def _table_sha256(source: Source) -> str:
    """Over every image's place, key and label, in an order of its own."""
    digest = hashlib.sha256(shards.canonical_json([source.wnids, source.class_names]))
    _hash_rows(digest, source.table, pa.array(_sorted(source.table, "split", "key")))
    return digest.hexdigest()


def _hash_rows(digest: Any, table: pa.Table, order: pa.Array) -> None:
    """Column by column: int64 numbers (−1 for null), or the strings' int64 lengths and bytes."""
    for whole in table.itercolumns():
        column = whole.take(order).combine_chunks()  # one column at a time: a copy of all is large
        if pa.types.is_string(column.type):
            digest.update(pc.binary_length(column).to_numpy().astype("<i8"))
            everything = pa.ListArray.from_arrays([0, len(column)], column)
            digest.update(pc.binary_join(everything, "")[0].as_buffer())
        else:
            digest.update(pc.fill_null(column, -1).to_numpy().astype("<i8"))
