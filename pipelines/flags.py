"""From the flags of a command to the plan and the places that they mean."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from alexnet.errors import UserError
from pipelines import storage
from pipelines.plan import Plan, Recipe
from pipelines.sources import SPLITS, Source


def planned(arguments: argparse.Namespace) -> tuple[Source, Plan]:
    """Reads RAW. Raises UserError for impossible flags, and for all that `sources.scan` does."""
    from pipelines.plan import make
    from pipelines.sources import official, scan, subset

    recipe = Recipe(  # without what depends on the source
        splits=tuple(dict.fromkeys(arguments.splits.split(","))),
        subset=subset.parse(arguments.subset) if arguments.subset else (),
        per_class=arguments.per_class,
        partial=arguments.partial,
        **_given(arguments),
    )
    raw = storage.absolute(arguments.raw)
    splits = [split for split in SPLITS if split in recipe.splits]
    source = scan(raw, splits, recipe.partial)
    if arguments.verify_md5:
        for line in official.verify_md5(raw, dict(storage.list_files(raw))):
            print(line, file=sys.stderr, flush=True)
    source = subset.select(source, recipe.subset, recipe.per_class)
    recipe = replace(recipe, **_defaults_of(source) | _given(arguments))
    return source, make(source, recipe)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags whose default depends on the source, where the user set them."""
    names = ("resize", "crop", "quality", "exif_orientation", "samples_per_shard", "shuffle")
    values = {name: getattr(arguments, name) for name in (*names, "seed")}
    return {name: value for name, value in values.items() if value is not None}


def _defaults_of(source: Source) -> dict[str, Any]:
    """What suits this source unless the user says otherwise."""
    defaults: dict[str, Any] = {"shuffle": source.shuffle}
    if source.stored:
        defaults |= {name: getattr(source.stored, name) for name in ("resize", "crop", "quality")}
    return defaults


def out_of(arguments: argparse.Namespace, plan: Plan) -> str:
    if arguments.out is not None:
        return storage.absolute(arguments.out)
    return str(storage.home() / "shards" / plan.plan_id[:12])


def existing(out: str | None, *, begun: bool = False) -> str:
    """`out`, or the newest set under $ALEXNET_HOME; `begun`: finished or not. Raises UserError if
    there is none."""
    if out is not None:
        return storage.absolute(out)
    found = storage.newest_shards("_meta/plan.json" if begun else "manifest.json")
    if found is None:
        raise UserError(
            f"no shard set under {storage.home() / 'shards'}; name the OUT that was given to build "
            "--out, or build one with `python -m pipelines build --raw RAW`"
        )
    return found


def only_of(text: str, plan: Plan) -> set[int]:
    """Shard numbers from "12,40-44", counted over all splits as `plan` prints them, or from names
    such as "val-000003". Raises UserError for what the plan does not have."""
    names = {shard.name: number for number, shard in enumerate(plan.shards)}
    numbers: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        if item in names:
            numbers.add(names[item])
        elif first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first):
            numbers |= set(range(int(first), int(last or first) + 1))
        else:
            raise UserError(f"--only {text}: {item!r} is no shard; write 12,40-44 or val-000003")
    if beyond := sorted(numbers - set(names.values())):
        raise UserError(f"--only {text}: there is no shard {beyond[0]}, only 0 to {len(names) - 1}")
    return numbers
