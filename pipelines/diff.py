"""What differs between two finished shard sets: how they were made, and what they hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.shards import INDEX, Manifest
from pipelines.sources import SPLITS
from pipelines.verify import contents

_SHOWN = 10  # keys or names of each kind
_VALUE = 70  # characters of a value that is printed
# What a set holds is compared for itself; the rest of the manifest says how it was made.
_HELD = {"classes", "shards", "totals", "rejected", "fixes", "pixels", "plan_id"}


def diff(a: str, b: str) -> dict[str, Any]:
    """Everything that is other in `b`; "same" is True when nothing is, "identity" included.

    Keys are compared by their WNID, so a label that moved because classes were added is told as
    classes. Raises UserError when one is no finished set, or is damaged.
    """
    one, two = contents.manifest(a), contents.manifest(b)
    document: dict[str, Any] = {
        "a": a,
        "b": b,
        "digests": [one.digest, two.digest],
        "identity": _counts(_made(one), _made(two)),
        "classes": _classes(one, two),
        "splits": _splits(a, b, one, two),
        "shards": _shards(one, two),
        "rejected": _counts(one.document["rejected"], two.document["rejected"]),
        "fixes": _counts(one.document["fixes"], two.document["fixes"]),
    }
    other = [document["identity"], document["rejected"], document["fixes"]]
    other += [part["count"] for part in document["classes"].values()]
    other += [kind["count"] for split in document["splits"].values() for kind in split.values()]
    other += [document["shards"][name] for name in ("other", "only_a", "only_b")]
    return document | {"same": not any(other)}


def _made(manifest: Manifest) -> dict[str, Any]:
    return _flat({k: v for k, v in manifest.document.items() if k not in _HELD})


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict) and item:
            found |= _flat(item, f"{prefix}{name}.")
        else:
            found[prefix + name] = item
    return found


def _counts(one: dict[str, Any], two: dict[str, Any]) -> dict[str, list[Any]]:
    """name → [value in a, value in b] where they differ; None for one that is not there."""
    names = [name for name in sorted(one | two) if one.get(name) != two.get(name)]
    return {name: [one.get(name), two.get(name)] for name in names}


def _classes(one: Manifest, two: Manifest) -> dict[str, dict[str, Any]]:
    names, others = (dict(zip(m.wnids, m.class_names, strict=True)) for m in (one, two))
    renamed = [
        f"{wnid}: {names[wnid]} -> {others[wnid]}"
        for wnid in names
        if wnid in others and names[wnid] != others[wnid]
    ]
    return {
        "added": _some([wnid for wnid in others if wnid not in names]),
        "removed": _some([wnid for wnid in names if wnid not in others]),
        "renamed": _some(renamed),
    }


def _splits(a: str, b: str, one: Manifest, two: Manifest) -> dict[str, dict[str, Any]]:
    if one.digest == two.digest:  # it holds the hash of every shard
        return {}
    splits = contents.splits(one) + contents.splits(two)
    return {
        split: _samples(_index(a, one, split), _index(b, two, split))
        for split in SPLITS
        if split in splits
    }


def _index(out: str, manifest: Manifest, split: str) -> pa.Table:
    return contents.index(out, split) if split in contents.splits(manifest) else INDEX.empty_table()


def _samples(one: pa.Table, two: pa.Table) -> dict[str, Any]:
    """By columns: ImageNet has 1.28 million keys."""
    keys, others = (table["key"].combine_chunks() for table in (one, two))
    place = pc.index_in(keys, value_set=others)
    both = pc.is_valid(place)
    before, after = one.filter(both), two.take(place.drop_null())

    def other(column: str) -> pa.Array:
        return pc.not_equal(before[column], after[column])

    from_others = pc.and_(other("sha256"), other("source_sha256"))
    from_same = pc.and_not(other("sha256"), other("source_sha256"))
    common = before["key"]
    return {
        "added": _some(others.filter(pc.invert(pc.is_in(others, value_set=keys)))),
        "removed": _some(keys.filter(pc.invert(both))),
        "relabelled": _some(common.filter(other("wnid"))),
        "other_pixels": _some(common.filter(from_same)),  # from the same raw bytes
        "other_raw": _some(common.filter(from_others)),
    }


def _shards(one: Manifest, two: Manifest) -> dict[str, Any]:
    before, after = ({s.name: s.sha256 for s in manifest.shards} for manifest in (one, two))
    common = before.keys() & after.keys()
    other = sorted(name for name in common if before[name] != after[name])
    return {
        "equal": len(common) - len(other),
        "other": len(other),
        "only_a": len(before) - len(common),
        "only_b": len(after) - len(common),
        "names": other[:_SHOWN],
    }


def _some(items: Collection[str] | pa.ChunkedArray | pa.Array) -> dict[str, Any]:
    """How many there are, and the first of them in order."""
    if isinstance(items, pa.Array | pa.ChunkedArray):
        order = pc.sort_indices(items)[:_SHOWN]
        return {"count": len(items), "first": items.take(order).to_pylist()}
    return {"count": len(items), "first": sorted(items)[:_SHOWN]}


def text(document: dict[str, Any]) -> str:
    """The document of `diff` for people."""
    if document["same"]:
        return f"{document['a']} and {document['b']} are the same set ({document['digests'][0]})"
    lines = [f"a: {document['a']}", f"b: {document['b']}"]
    for what in ("identity", "rejected", "fixes"):
        for name, (one, two) in document[what].items():
            lines.append(f"{what}: {name}: {_value(one)} -> {_value(two)}")
    for name, part in document["classes"].items():
        lines += _part(f"classes {name}", part)
    for split, parts in document["splits"].items():
        for name, part in parts.items():
            lines += _part(f"{split} samples {_WORDS.get(name, name)}", part)
    counts = document["shards"]
    lines.append(
        f"shards: {counts['equal']:,} equal, {counts['other']:,} with other bytes, "
        f"{counts['only_a']:,} in a alone, {counts['only_b']:,} in b alone"
    )
    if not any(part["count"] for parts in document["splits"].values() for part in parts.values()):
        lines.append("every sample is the same")
    return "\n".join(lines)


_WORDS = {
    "other_pixels": "with other pixels, from the same raw bytes",
    "other_raw": "with other pixels, from other raw bytes",
}


def _part(what: str, part: dict[str, Any]) -> list[str]:
    if not part["count"]:
        return []
    dots = ", …" if part["count"] > len(part["first"]) else ""
    return [f"{what}: {part['count']:,} ({', '.join(part['first'])}{dots})"]


def _value(value: Any) -> str:
    said = "none" if value is None else str(value)
    return said if len(said) <= _VALUE else said[: _VALUE - 1] + "…"
