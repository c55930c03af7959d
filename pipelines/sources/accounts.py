"""What became of every entry of RAW: an image, a file that is read, or why it is neither."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import entries

_NAMED = 5  # in one line


@dataclass(frozen=True)
class Accounts:
    """total = images + used + the sum of `ignored` + the number of `left_out`."""

    total: int = 0
    images: int = 0  # files that are images by themselves
    used: int = 0  # archives, lists, devkits
    ignored: dict[str, int] = field(default_factory=dict)  # by the rules of pipelines/entries.py
    left_out: dict[str, str] = field(default_factory=dict)  # by --partial: name → why
    ignored_members: dict[str, int] = field(default_factory=dict)  # inside of archives, by archive
    first: dict[str, str] = field(default_factory=dict)  # of each rule an entry, for people

    def to_json(self) -> dict[str, Any]:
        names = ("total", "images", "used", "ignored", "left_out", "ignored_members")
        return {name: getattr(self, name) for name in names}

    def notes(self) -> tuple[str, ...]:
        """One line for what is ignored that the user did not leave out by a flag, and one for what
        --partial leaves out."""
        lines = []
        told = {r: n for r, n in self.ignored.items() if r not in ("other_splits", "not_chosen")}
        if told:
            parts = [f"{n:,} {rule} (first {self.first[rule]})" for rule, n in told.items()]
            lines.append(f"ignored {entries_told(sum(told.values()))}: {', '.join(parts)}")
        if self.left_out:
            lines.append(f"left out {entries_told(len(self.left_out))}: {named(self.left_out)}")
        return tuple(lines)


def named(reasons: Mapping[str, str]) -> str:
    """ "a (why), b (why)"; the first few of them when there are many."""
    shown = [f"{name} ({why})" for name, why in [*reasons.items()][:_NAMED]]
    more = ", …" * (len(reasons) > _NAMED)
    return f"{', '.join(shown)}{more}"


def entries_told(number: int) -> str:
    return f"{number:,} {'entry' if number == 1 else 'entries'}"


def of(
    found: entries.Listing,
    images: pa.ChunkedArray,
    used: Sequence[str],
    lists: str,
    places: Mapping[str, str],
    left_out: Mapping[str, str],
    ignored_members: Mapping[str, int],
) -> Accounts:
    """images: sources of the table's rows; used: the containers among them; lists: regex of what
    else the layout reads; places: regex of the entries of each split that was not asked for."""
    names = pa.array(list(found.files), pa.string())
    others = "|".join(places.values()) or r"^$^"
    containers = pa.array([*used], pa.string())
    fates = pa.nulls(len(names), pa.string())
    fates = pc.if_else(pc.match_substring_regex(names, others), "other_splits", "unused")
    fates = pc.coalesce(entries.rules(names), fates)
    for fate, chosen in [
        ("used", pc.match_substring_regex(names, lists)),
        ("images", pc.is_in(names, value_set=pc.unique(images))),
        ("used", pc.is_in(names, value_set=containers)),
        ("left_out", pc.is_in(names, value_set=pa.array([*left_out], pa.string()))),
    ]:
        fates = pc.if_else(chosen, fate, fates)
    counts = {row["values"]: row["counts"] for row in pc.value_counts(fates).to_pylist()}
    first = {fate: names[pc.index(fates, fate).as_py()].as_py() for fate in counts}
    for name in [*found.ignored, *found.empty, *found.broken]:
        fate = found.ignored.get(name) or _odd(name, name in found.empty, others, left_out)
        counts[fate] = counts.get(fate, 0) + 1
        first.setdefault(fate, name)
    accounts = Accounts(
        total=found.total,
        images=counts.get("images", 0),
        used=counts.get("used", 0),
        ignored={rule: counts[rule] for rule in entries.RULES if rule in counts},
        left_out=dict(left_out),
        ignored_members=dict(ignored_members),
        first=first,
    )
    told = accounts.images + accounts.used + sum(accounts.ignored.values()) + len(left_out)
    assert told == accounts.total, f"{told} of {accounts.total} entries have a fate"
    return accounts


def _odd(name: str, empty: bool, others: str, left_out: Mapping[str, str]) -> str:
    """The fate of an empty folder, or of what cannot be read."""
    if name in left_out:
        return "left_out"
    if empty:
        return "empty_folders"
    by_place = "other_splits" if re.search(others, name) else "unused"
    return entries.rule(name.rsplit("/", 1)[-1]) or by_place
