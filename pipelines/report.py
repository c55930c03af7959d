"""OUT/report/index.html: what was built, to look at. One page that loads nothing from elsewhere.

Beyond reading the index, its size and the time it takes do not grow with the number of images:
everything is counted by columns, and images and rows are shown up to a limit that is stated.
Rejected files are listed and never decoded: some are made to crash a decoder.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

from pipelines import entries, shards, storage
from pipelines.plan import Recipe, geometry
from pipelines.sources import SPLITS, UNLABELLED, StoredAs
from pipelines.transform import FIXES, REASONS

_MAX_ROWS = 2000  # of one table
_SHEETS = (1000, 400, 400)  # images of the first split: one of each of ImageNet's classes
_PER_CLASS = 8  # images at most
_THUMBNAIL = 112  # pixels
_EXAMPLES = 6  # of each fix, and of each kind of duplicate
_LIST_BYTES = 8 << 20  # read of each split's list of rejected files
_READS_AHEAD = 16
_DIGESTS = {"source_sha256": "raw file", "sha256": "stored image"}

_Array = np.ndarray[Any, np.dtype[Any]]
_Rows = list[list[Any]]
_Chart = dict[str, str]  # "alt" and "uri"


def report(out: str) -> str:
    """Write the page and return its place. Raises UserError where there is no finished set."""
    manifest = shards.load_manifest(out)
    splits = [split for split in SPLITS if split in manifest.document["totals"]]
    indexes = {split: shards.load_index(out, split) for split in splits}
    names = {UNLABELLED: "unlabelled"}
    for label, (wnid, name) in enumerate(zip(manifest.wnids, manifest.class_names, strict=True)):
        names[label] = name if name == wnid else f"{name} ({wnid})"
    table = pa.concat_tables(
        index.append_column("split", pa.array(np.full(index.num_rows, number)))
        for number, index in enumerate(indexes.values())
    )
    page = _template().render(
        manifest=manifest,
        splits=splits,
        rules=entries.RULES,
        reasons=REASONS,
        max_rows=_MAX_ROWS,
        sheets=[
            _sheet(out, *of_split, names, most)
            for of_split, most in zip(indexes.items(), _SHEETS, strict=False)
        ],
        classes=_classes(manifest, indexes, names),
        sizes=_sizes(manifest, indexes),
        fixes=_fixes(out, table, splits),
        rejected=[*itertools.islice(_rejected(out, splits), _MAX_ROWS)],
        duplicates=_duplicates(table, splits),
    )
    storage.sweep(storage.join(out, "report"))
    location = storage.join(out, "report", "index.html")
    storage.write(location, page.encode())
    return location


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = _share
    return environment.from_string(Path(__file__).with_suffix(".html.j2").read_text())


def _shown(value: Any) -> Any:
    """Integers with separators; what cannot be printed (controls, reversed writing) by number."""
    if hasattr(value, "__html__"):  # what a macro of the template made
        return value
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


# Images


def _sheet(
    out: str, split: str, index: pa.Table, names: dict[int, str], most: int
) -> dict[str, Any]:
    """A contact sheet: the first images of each class, under its name."""
    chosen = index.take(pa.array(_first_of_each(index["label"].to_numpy(), most))).to_pylist()
    shown = zip(chosen, _thumbnails(out, chosen), strict=True)
    blocks = [
        (f"{label} · {names[label]}" if label >= 0 else names[label], [image for _, image in block])
        for label, block in itertools.groupby(shown, key=lambda pair: pair[0]["label"])
    ]
    classes = pc.count_distinct(index["label"]).as_py()
    of = f"{len(blocks):,} of " if len(blocks) < classes else ""
    images = f"{len(chosen):,} of {index.num_rows:,} images"
    summary = f"{split}: {images}, {of}{classes:,} class{'es' if classes != 1 else ''}"
    return {"summary": summary, "blocks": blocks}


def _first_of_each(labels: _Array, most: int) -> _Array:
    """Row numbers of the first images of each label, by label; where there are more than `most`
    labels, evenly chosen ones."""
    order = np.argsort(labels, kind="stable")
    found, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    each = np.minimum(counts, min(max(most // max(len(found), 1), 1), _PER_CLASS))
    chosen = np.unique(np.linspace(0, len(found) - 1, min(len(found), most)).astype(np.int64))
    rows = [order[starts[i] : starts[i] + each[i]] for i in chosen.tolist()]
    return np.concatenate([np.empty(0, np.int64), *rows])


def _thumbnails(out: str, rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(key, data URI) of the stored images of these index rows; "" for one that does not decode."""

    tars = [storage.join(out, f"{row['shard']}.tar") for row in rows]
    places = ([row[name] for row in rows] for name in ("offset", "size"))
    with ThreadPoolExecutor(_READS_AHEAD) as pool:
        jpegs = pool.map(storage.read, tars, *places)
        return [(row["key"], _thumbnail(jpeg)) for row, jpeg in zip(rows, jpegs, strict=True)]


def _thumbnail(jpeg: bytes) -> str:
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            size = (_THUMBNAIL, _THUMBNAIL)
            small = image.convert("RGB").resize(size, Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    small.save(buffer, "JPEG", quality=78)
    return _data_uri("image/jpeg", buffer.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _fixes(out: str, table: pa.Table, splits: Sequence[str]) -> list[dict[str, Any]]:
    """Each fix with its sentence, how often each split needed it, and what came of it."""
    column = table["fixes"].combine_chunks()
    parents, names = pc.list_parent_indices(column), pc.list_flatten(column)
    found = []
    for name in sorted(pc.unique(names).to_pylist()):
        fixed = table.take(parents.filter(pc.equal(names, name)))
        counts = np.bincount(fixed["split"].to_numpy(), minlength=len(splits)).tolist()
        meaning = FIXES.get(name, "A fix that this version does not know.")
        needed = [(split, n) for split, n in zip(splits, counts, strict=True) if n]
        images = _thumbnails(out, fixed[:_EXAMPLES].to_pylist())
        found.append({"name": name, "meaning": meaning, "counts": needed, "images": images})
    return found


# Counts


def _classes(
    manifest: shards.Manifest, indexes: dict[str, pa.Table], names: dict[int, str]
) -> dict[str, Any]:
    """Images of each class in each split, drawn and as a table."""
    labels = {split: index["label"].to_numpy() for split, index in indexes.items()}
    counts = {
        split: np.bincount(of[of != UNLABELLED], minlength=manifest.num_classes)
        for split, of in labels.items()
    }
    splits = []
    for split, count in counts.items():
        summary, chart = f"{len(labels[split]):,} images are unlabelled.", None
        if count.any():
            fewest, most = int(count.argmin()), int(count.argmax())
            axes = _axes(f"Images of each label, {split}")
            axes.vlines(range(len(count)), 0, count, linewidth=max(240 / len(count), 0.25))
            axes.set(ylim=(0, None), xlabel="label")
            axes.xaxis.get_major_locator().set_params(integer=True)
            chart = _drawn(axes)
            summary = (
                f"Fewest {count[fewest]:,} ({names[fewest]}), median {np.median(count):,.0f}, "
                f"most {count[most]:,} ({names[most]})."
            )
        splits.append({"name": split, "summary": summary, "chart": chart})
    rows = [
        [label, wnid, name, *(int(count[label]) for count in counts.values())]
        for label, (wnid, name) in enumerate(zip(manifest.wnids, manifest.class_names, strict=True))
    ]
    return {"splits": splits, "rows": rows}


def _sizes(manifest: shards.Manifest, indexes: dict[str, pa.Table]) -> dict[str, Any] | None:
    """Width, height, shorter side and shape of the raw images, of all splits together."""
    sides = {
        split: (index["width"].to_numpy(), index["height"].to_numpy())
        for split, index in indexes.items()
        if index.num_rows
    }
    if not sides:
        return None
    recipe = Recipe(resize=manifest.resize, crop=manifest.crop, quality=manifest.quality)
    stored = manifest.document["source"]["stored"]
    scaled_to = geometry(recipe, StoredAs(**stored) if stored else None)[0]
    rows: _Rows = []
    for split, (width, height) in sides.items():
        short = np.minimum(width, height)
        quartiles = np.percentile(short, [0, 25, 50, 75, 100]).round().astype(int).tolist()
        longest = f"{(np.maximum(width, height) / short).max():,.2f} : 1"
        rows.append([split, *quartiles, longest, int((short < scaled_to).sum())])
    number = sum(len(width) for width, _ in sides.values())
    enlarged = sum(row[-1] for row in rows)
    summary = (
        f"The shorter side was scaled to {scaled_to} pixels (dashed). {enlarged:,} of {number:,} "
        f"images ({_share(enlarged, number)}) were smaller and have been enlarged."
    )
    width, height = map(np.concatenate, zip(*sides.values(), strict=True))
    return {"summary": summary, "charts": _size_charts(width, height, scaled_to), "rows": rows}


def _size_charts(width: _Array, height: _Array, scaled_to: int) -> list[_Chart]:
    """What lies beyond an axis is counted at its end, so that a few giants hide none."""
    end = max(float(np.percentile(np.maximum(width, height), 99)), 1.25 * scaled_to)
    edges = np.linspace(0, end, 49)
    dashed = {"color": "tab:red", "linestyle": "--", "linewidth": 1}
    width, height = width.clip(max=end), height.clip(max=end)

    both = _axes("Width and height")
    both.hist2d(width, height, bins=edges, cmin=1, norm=LogNorm(vmin=0.3), cmap="Blues")
    both.axvline(scaled_to, **dashed)
    both.axhline(scaled_to, **dashed)
    both.set(xlabel="width, pixels", ylabel="height, pixels")
    shorter = _axes("Shorter side")
    shorter.hist(np.minimum(width, height), edges)
    shorter.axvline(scaled_to, **dashed)
    shorter.set(xlim=(0, end), xlabel="pixels")
    return [_drawn(both), _drawn(shorter)]


def _axes(title: str) -> Any:
    """To draw a chart on. No name from the data may stand there: $ begins a formula."""
    axes = Figure(figsize=(5.2, 2.8), layout="constrained").subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
    return axes


def _drawn(axes: Any) -> _Chart:
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=200)
    return {"alt": axes.get_title("left"), "uri": _data_uri("image/png", buffer.getvalue())}


def _duplicates(table: pa.Table, splits: Sequence[str]) -> dict[str, _Rows]:
    """Images that several samples show. One of two splits counts as across splits, and nowhere
    else; an unlabelled sample contradicts no label."""
    label = pc.if_else(pc.equal(table["label"], UNLABELLED), None, table["label"])
    table = table.select(["key", "wnid", "split", *_DIGESTS]).append_column("label", label)
    rows: _Rows = []
    examples: _Rows = []
    for column, what in _DIGESTS.items():
        groups = table.group_by(column, use_threads=False).aggregate(  # in the order of the samples
            [("split", "min_max"), ("label", "min_max"), ("split", "count")]
        )
        groups = groups.filter(pc.greater(groups["split_count"], 1))
        across, differ = (_several(groups[f"{of}_min_max"]) for of in ("split", "label"))
        sizes = groups["split_count"].to_numpy()
        for where, chosen in (("across splits", across), ("within a split", ~across)):
            if chosen.any():
                numbers = chosen.sum(), sizes[chosen].sum(), (chosen & differ).sum()
                rows.append([f"equal {what}s", where, *map(int, numbers)])
        worst_first = np.argsort(-(2 * across + differ), kind="stable")[:_EXAMPLES]
        for digest in groups[column].take(pa.array(worst_first)).to_pylist():
            found = table.filter(pc.equal(table[column], digest))
            few = [*found[:3].to_pylist(), *found[3:][-1:].to_pylist()]  # a blank one has thousands
            names = [f"{splits[s['split']]} {s['key']} ({s['wnid'] or 'unlabelled'})" for s in few]
            examples.append([what, found.num_rows, ", ".join(names), digest[:16]])
    return {"rows": rows, "examples": examples}


def _several(ranges: pa.ChunkedArray) -> _Array:
    """Whether smallest and largest differ: two values in a group are found without sets."""
    ends = (pc.struct_field(ranges, name) for name in ("min", "max"))
    found: _Array = pc.fill_null(pc.not_equal(*ends), False).to_numpy()
    return found


def _rejected(out: str, splits: Sequence[str]) -> Iterator[dict[str, Any]]:
    for split in splits:
        data = storage.read(storage.join(out, "quarantine", f"{split}.jsonl"), 0, _LIST_BYTES)
        for line in data[: data.rfind(b"\n") + 1].splitlines():  # the last one may be cut
            yield {"split": split, **json.loads(line)}


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g}%" if whole else "–"
