"""The report's counts over the index: classes, sizes of the raw pictures, pictures that repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import duplicates, shards
from pipelines.duplicates import Group, Repeats
from pipelines.plan import Recipe, geometry
from pipelines.report import charts
from pipelines.report.page import folded, note, share, table
from pipelines.sources import UNLABELLED, StoredAs

_LYING_BARS = 40  # classes; more are drawn as columns without names
_MARKS = 6  # on the axis of labels
_COPIES = 3  # samples told of a picture that repeats


def classes(manifest: shards.Manifest, indexes: dict[str, pa.Table], names: dict[int, str]) -> str:
    """Pictures of each class in each split, drawn and as a table."""
    counts = {
        split: np.bincount(
            index.filter(pc.not_equal(index["label"], UNLABELLED))["label"].to_numpy(),
            minlength=manifest.num_classes,
        )
        for split, index in indexes.items()
    }
    parts = [_class_chart(split, counts[split], indexes[split].num_rows, names) for split in counts]
    rows = [
        [label, wnid, name, *(int(column[label]) for column in counts.values())]
        for label, (wnid, name) in enumerate(zip(manifest.wnids, manifest.class_names, strict=True))
    ]
    heads = ["label", "class", "name", *counts]
    parts.append(folded(f"All {len(rows):,} classes as a table", table(heads, rows)))
    return "".join(parts)


def sizes(manifest: shards.Manifest, indexes: dict[str, pa.Table]) -> str:
    """Width, height, shorter side and shape of the raw pictures, of all splits together."""
    width, height = (
        np.concatenate([index[name].to_numpy() for index in indexes.values()])
        for name in ("width", "height")
    )
    if not len(width):
        return "<p>No picture was stored.</p>"
    short = np.minimum(width, height)
    side = _scaled_to(manifest)
    enlarged = int((short < side).sum())
    told = (
        f"The shorter side was scaled to {side} pixels (dashed). {enlarged:,} of {len(short):,} "
        f"pictures ({share(enlarged, len(short))}) were smaller and have been enlarged."
    )
    drawn = [
        charts.density("Width across, height upward, pixels", width, height, side),
        charts.sizes("Pictures by their shorter side, pixels", short, side),
        charts.ratios("Pictures by width : height", width / height),
    ]
    heads = ["split", "shorter side: smallest", "quarter", "half", "three quarters", "largest"]
    heads += ["longest shape", "enlarged"]
    rows = [_size_row(split, index, side) for split, index in indexes.items() if index.num_rows]
    chart = f'<div class="charts">{drawn[0]}<div>{drawn[1]}{drawn[2]}</div></div>'
    return f"{note(told)}{chart}{table(heads, rows)}"


def repeats(indexes: dict[str, pa.Table]) -> str:
    """Pictures that the set holds more than once, above all in two splits."""
    found = duplicates.find(indexes)
    kinds = {"raw file": found.files, "stored picture": found.pictures}
    rows = [
        [f"equal {what}s", where, same, tally.groups, tally.samples]
        for what, several in kinds.items()
        for where, same, tally in (
            ("two splits", "different", several.across_other_labels),
            ("two splits", "the same", several.across_same_label),
            ("one split", "different", several.within_other_labels),
            ("one split", "the same", several.within_same_label),
        )
    ]
    if not found.pictures.groups and not found.files.groups:
        return "<p>None: no raw file and no stored picture occurs twice.</p>"
    told = (
        "Told and never dropped: published results were measured with them. A picture in two "
        "splits is a leak: what is measured on one was seen in the other."
    )
    heads = ["what", "in", "labels", "pictures", "samples"]
    return note(told) + table(heads, rows) + "".join(map(_examples, kinds, kinds.values()))


def _class_chart(
    split: str, counts: np.ndarray[Any, Any], samples: int, names: dict[int, str]
) -> str:
    unlabelled = samples - int(counts.sum())
    head = f"<h3>{split}</h3>"
    if unlabelled:
        head += note(f"{unlabelled:,} pictures are unlabelled.")
    if not counts.any():
        return head
    if len(counts) <= _LYING_BARS:
        return head + charts.rows([names[label] for label in range(len(counts))], counts)
    fewest, most = int(counts.argmin()), int(counts.argmax())
    told = note(
        f"Fewest {counts[fewest]:,} ({names[fewest]}), median {np.median(counts):,.0f}, "
        f"most {counts[most]:,} ({names[most]})."
    )
    step = int(charts.round_up(len(counts) / _MARKS))
    marks = range(0, len(counts), step)
    ticks = [((label + 0.5) / len(counts), f"{label:,}") for label in marks]
    return head + told + charts.columns("Pictures by label", counts, ticks)


def _scaled_to(manifest: shards.Manifest) -> int:
    recipe = Recipe(resize=manifest.resize, crop=manifest.crop, quality=manifest.quality)
    stored = manifest.document["source"]["stored"]
    return geometry(recipe, StoredAs(**stored) if stored else None)[0]


def _size_row(split: str, index: pa.Table, side: int) -> list[Any]:
    width, height = index["width"].to_numpy(), index["height"].to_numpy()
    short = np.minimum(width, height)
    quartiles = np.percentile(short, [0, 25, 50, 75, 100]).round().astype(int)
    longest = f"{(np.maximum(width, height) / short).max():,.2f} : 1"
    return [split, *quartiles.tolist(), longest, int((short < side).sum())]


def _examples(what: str, several: Repeats) -> str:
    if not several.examples:
        return ""
    heads = ["times", "in", "labels", "samples", "sha256"]
    rows = [
        [
            group.size,
            "two splits" if group.across_splits else "one split",
            "different" if group.other_labels else "the same",
            _samples(group),
            group.sha256[:16],
        ]
        for group in several.examples
    ]
    of = f" of {several.groups:,}" if several.groups > len(rows) else ""
    return folded(f"{len(rows):,}{of} equal {what}s", table(heads, rows))


def _samples(group: Group) -> str:
    shown: Sequence[tuple[str, str, str]] = group.samples[:_COPIES]
    text = ", ".join(f"{split} {key} ({wnid or 'unlabelled'})" for split, key, wnid in shown)
    return text + (f" and {group.size - len(shown):,} more" if group.size > len(shown) else "")
