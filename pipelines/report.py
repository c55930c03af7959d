"""OUT/report/index.html: what was built, to look at. One page that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import shards, storage

_PER_CLASS = 8  # pictures in a contact sheet row
_SHEET_CLASSES = 40  # rows; more would make a page of many megabytes
_GALLERY = 200  # quarantined files listed
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --bar: #4a7fd0; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
td, th { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { overflow-wrap: anywhere; }
.sheet { display: flex; gap: 4px; overflow-x: auto; margin: 0 0 .8rem; }
.sheet img { width: 113px; height: 113px; flex: none; border-radius: 3px; }
.name { font-size: .85rem; margin: 0 0 .15rem; }
.bar { background: var(--bar); height: .8rem; border-radius: 2px; }
"""


def report(out: str) -> str:
    """Write the page and return its place."""
    manifest = shards.load_manifest(out)
    splits = list(manifest.document["totals"])
    indexes = {split: shards.load_index(out, split) for split in splits}
    parts = [_head(manifest), _totals(manifest), _shard_table(manifest)]
    parts += [_contact_sheet(out, manifest, split, indexes[split]) for split in splits]
    parts += [_histogram(manifest, indexes), _sizes(manifest, indexes)]
    parts += [_fixes(indexes), _quarantine(out, manifest, splits), _versions(manifest)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Shards {manifest.plan_id[:12]}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    location = storage.join(out, "report", "index.html")
    storage.write(location, page.encode())
    return location


def _head(manifest: shards.Manifest) -> str:
    partial = " It is partial: built with fewer pictures than announced." * manifest.partial
    return (
        f"<h1>Shards {manifest.plan_id[:12]}</h1><p>{manifest.num_classes} classes, shorter side "
        f"{manifest.resize}, centre {manifest.crop}×{manifest.crop}, JPEG quality "
        f"{manifest.quality}, seed {manifest.seed}.{partial}</p>"
        f"<p>Data set <code>{manifest.digest}</code></p>"
    )


def _totals(manifest: shards.Manifest) -> str:
    rows = [
        [split, total["pictures"], total["samples"], total["rejected"], _megabytes(total["bytes"])]
        for split, total in manifest.document["totals"].items()
    ]
    return "<h2>Totals</h2>" + _table(["split", "pictures", "samples", "rejected", "MB"], rows)


def _shard_table(manifest: shards.Manifest) -> str:
    rows = [
        [shard.name, shard.samples, _megabytes(shard.num_bytes), shard.sha256[:16]]
        for shard in manifest.shards
    ]
    table = _table(["shard", "samples", "MB", "sha256"], rows)
    return f"<details><summary>{len(rows)} shards</summary>{table}</details>"


def _contact_sheet(out: str, manifest: shards.Manifest, split: str, index: pa.Table) -> str:
    """The first pictures of each class, in the order of the shards."""
    labels = index["label"].to_numpy()
    chosen = np.unique(labels)
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), _SHEET_CLASSES)).astype(int)]
    lines = []
    for label in chosen.tolist():
        rows = index.take(pa.array(np.flatnonzero(labels == label)[:_PER_CLASS])).to_pylist()
        pictures = "".join(_picture(out, row) for row in rows)
        name = _escape(f"{label} · {manifest.wnids[label]} · {manifest.class_names[label]}")
        lines.append(f'<p class="name">{name}</p><div class="sheet">{pictures}</div>')
    shown = f", {len(chosen)} classes shown" if len(chosen) < manifest.num_classes else ""
    return f"<h2>Contact sheet: {split}{shown}</h2>" + "".join(lines)


def _picture(out: str, row: dict[str, Any]) -> str:
    jpeg = storage.read(storage.join(out, f"{row['shard']}.tar"), row["offset"], row["size"])
    key = _escape(row["key"])
    data = base64.b64encode(jpeg).decode()
    return f'<img alt="{key}" title="{key}" loading="lazy" src="data:image/jpeg;base64,{data}">'


def _histogram(manifest: shards.Manifest, indexes: dict[str, pa.Table]) -> str:
    counts = {split: Counter(index["label"].to_pylist()) for split, index in indexes.items()}
    first = next(iter(indexes))
    most = max(counts[first].values(), default=1)
    rows = []
    for label, (wnid, name) in enumerate(zip(manifest.wnids, manifest.class_names, strict=True)):
        width = 100 * counts[first][label] / most
        bar = f'<div class="bar" style="width:{width:.1f}%;min-width:1px"></div>'
        numbers = "".join(f'<td class="n">{count[label]:,}</td>' for count in counts.values())
        rows.append(
            f"<tr><td>{label}</td><td>{_escape(wnid)}</td><td>{_escape(name)}</td>{numbers}"
            f'<td style="min-width:8rem;width:40%">{bar}</td></tr>'
        )
    heads = "".join(f'<th class="n">{split}</th>' for split in counts)
    return (
        f'<h2>Classes</h2><div class="wide"><table style="width:100%"><tr><th>label</th>'
        f"<th>WNID</th><th>name</th>{heads}<th>{first}</th></tr>{''.join(rows)}</table></div>"
    )


def _sizes(manifest: shards.Manifest, indexes: dict[str, pa.Table]) -> str:
    rows = []
    for split, index in indexes.items():
        if not index.num_rows:
            continue
        short = np.minimum(index["width"].to_numpy(), index["height"].to_numpy())
        long = np.maximum(index["width"].to_numpy(), index["height"].to_numpy())
        enlarged = int((short < manifest.resize).sum())
        quartiles = ", ".join(
            f"{value:.0f}" for value in np.percentile(short, [0, 25, 50, 75, 100])
        )
        ratio = f"{np.median(long / short):.2f}, {np.max(long / short):.2f}"
        rows.append([split, quartiles, ratio, enlarged])
    heads = ["split", "shorter side: min, quartiles, max", "long/short: median, max", "enlarged"]
    return "<h2>Raw pictures</h2>" + _table(heads, rows)


def _fixes(indexes: dict[str, pa.Table]) -> str:
    rows = []
    for split, index in indexes.items():
        for entry in pc.value_counts(pc.list_flatten(index["fixes"])).to_pylist():
            has = [entry["values"] in fixes for fixes in index["fixes"].to_pylist()]
            examples = index.filter(pa.array(has))["key"][:3].to_pylist()
            rows.append([split, entry["values"], entry["counts"], ", ".join(examples)])
    table = _table(["split", "fix", "pictures", "such as"], sorted(rows, key=lambda row: row[:2]))
    return "<h2>Fixes</h2>" + (table if rows else "<p>None was needed.</p>")


def _quarantine(out: str, manifest: shards.Manifest, splits: list[str]) -> str:
    rows = []
    for split in splits:
        lines = storage.read(storage.join(out, "quarantine", f"{split}.jsonl")).splitlines()
        for entry in map(json.loads, lines[:_GALLERY]):
            place = f"{entry['source']} at {entry['source_offset']:,} + {entry['source_size']:,}"
            rows.append([split, entry["key"], entry["reason"], entry["detail"], place])
    heads = ["split", "key", "reason", "detail", "raw bytes"]
    return "<h2>Quarantine</h2>" + (_table(heads, rows) if rows else "<p>Empty.</p>")


def _versions(manifest: shards.Manifest) -> str:
    document = manifest.document
    rows = sorted(document["versions"].items())
    rows += [(f"{split} labels", where) for split, where in document["labels_from"].items()]
    mean = ", ".join(f"{value:.2f}" for value in manifest.pixels.mean)
    rows.append((f"mean RGB of {document['pixels']['split']}", mean))
    return "<h2>Made with</h2>" + _table(["", ""], [list(row) for row in rows])


def _table(heads: list[str], rows: list[list[Any]]) -> str:
    numeric = [all(isinstance(row[i], int) for row in rows) for i in range(len(heads))]

    def line(cells: list[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if number else ''}>"
            f"{f'{cell:,}' if isinstance(cell, int) else _escape(str(cell))}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )

    lines = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{line(heads, "th")}</tr>{lines}</table></div>'


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"


def _escape(text: str) -> str:
    return html.escape(text)
