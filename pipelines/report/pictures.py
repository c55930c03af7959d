"""The report's pictures of what was stored: some of each class, and examples of each fix."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import shards, storage
from pipelines.report.page import escape, folded, note, share
from pipelines.transform import FIXES

_PER_CLASS = 8  # pictures at most
_SHEET = 1000  # pictures of the first split, so that each of ImageNet's classes is seen
_OTHER_SHEET = 400
_EXAMPLES = 6  # of each fix
# Characters of the page. Pictures that are left out for them are told.
_SHEET_ROOM, _OTHER_SHEET_ROOM, _EXAMPLES_ROOM = 6_500_000, 2_500_000, 1_500_000
_SIDE = 128  # pixels of a thumbnail
_READS_AHEAD = 16


def contact_sheets(
    out: str, manifest: shards.Manifest, indexes: dict[str, pa.Table], names: dict[int, str]
) -> str:
    """`names`: what to call each label."""
    parts = []
    for number, (split, index) in enumerate(indexes.items()):
        most, room = (_OTHER_SHEET, _OTHER_SHEET_ROOM) if number else (_SHEET, _SHEET_ROOM)
        labels, rows = _first_of_each(index, most)
        chosen = index.take(pa.array(rows)).to_pylist()
        images = thumbnails(out, chosen, room)
        blocks = []
        for label in labels.tolist():
            mine = [i for i, row in enumerate(chosen[: len(images)]) if row["label"] == label]
            if mine:
                caption = f"{label} · {names[label]}" if label >= 0 else names[label]
                blocks.append(_labelled(caption, [images[i] for i in mine]))
        of = pc.count_distinct(index["label"]).as_py()
        shown = f"{len(blocks):,} of {of:,}" if len(blocks) < of else f"{of:,}"
        plural = "es" if of != 1 else ""
        summary = f"{split}: {len(images):,} of {index.num_rows:,} pictures, {shown} class{plural}"
        parts.append(folded(summary, f'<div class="sheet">{"".join(blocks)}</div>', number == 0))
    told = note("As they are stored, the first of each class in the order of the shards.")
    return told + "".join(parts)


def fixes(out: str, indexes: dict[str, pa.Table]) -> str:
    """Each fix with its sentence, how often it was needed, and what came of it."""
    places = {split: _fixed(index) for split, index in indexes.items()}
    found = sorted({name for rows in places.values() for name in rows})
    if not found:
        return "<p>None was needed: every picture is a plain RGB JPEG.</p>"
    room = _EXAMPLES_ROOM // len(found)
    parts = []
    for name in found:
        numbers = {split: rows[name] for split, rows in places.items() if name in rows}
        counts = ", ".join(
            f"{len(rows):,} {split} ({share(len(rows), indexes[split].num_rows)})"
            for split, rows in numbers.items()
        )
        chosen: list[dict[str, Any]] = []
        for split, rows in numbers.items():
            chosen += indexes[split].take(pa.array(rows[:_EXAMPLES])).to_pylist()
        images = thumbnails(out, chosen[:_EXAMPLES], room)
        sentence = FIXES.get(name, "A fix that this version does not know.")
        parts.append(
            f"<h3>{escape(name)}</h3><p>{escape(sentence)} "
            f'<span class="soft">{escape(counts)}</span></p>'
            f'<div class="thumbs">{"".join(images)}</div>'
        )
    return "".join(parts)


def thumbnails(out: str, rows: Sequence[dict[str, Any]], room: int) -> list[str]:
    """HTML of the stored pictures of these index rows: of the first ones that fit into `room`
    characters. A picture that cannot be decoded is told by its name."""

    def read(row: dict[str, Any]) -> bytes:
        tar = storage.join(out, f"{row['shard']}.tar")
        return storage.read(tar, row["offset"], row["size"])

    images: list[str] = []
    with ThreadPoolExecutor(_READS_AHEAD) as pool:
        for row, jpeg in zip(rows, pool.map(read, rows), strict=True):
            image = _thumbnail(row["key"], jpeg)
            room -= len(image)
            if room < 0:
                break
            images.append(image)
    return images


def embedded(jpeg: bytes, title: str) -> str:
    data = base64.b64encode(jpeg).decode()
    text = escape(title)
    return f'<img alt="{text}" title="{text}" loading="lazy" src="data:image/jpeg;base64,{data}">'


def _thumbnail(key: str, jpeg: bytes) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as picture:
            small = picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError):
        return f'<div class="blank">{escape(key)} cannot be decoded</div>'
    small.save(buffer, "JPEG", quality=78)
    return embedded(buffer.getvalue(), key)


def _labelled(caption: str, images: Sequence[str]) -> str:
    text = escape(caption)
    return (
        f'<figure><figcaption title="{text}"><b>{text}</b></figcaption>'
        f'<div class="thumbs">{"".join(images)}</div></figure>'
    )


def _first_of_each(index: pa.Table, most: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Labels, evenly chosen where there are more than `most`, and the row numbers of the first
    pictures of each."""
    column = index["label"].to_numpy()
    order = np.argsort(column, kind="stable")
    labels, starts, counts = np.unique(column[order], return_index=True, return_counts=True)
    each = min(max(most // max(len(labels), 1), 1), _PER_CLASS)
    chosen = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), most)).astype(np.int64))
    rows = [order[starts[i] : starts[i] + min(each, counts[i])] for i in chosen.tolist()]
    return labels[chosen], np.concatenate([np.empty(0, np.int64), *rows])


def _fixed(index: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    """Row numbers of the pictures that each fix was applied to."""
    column = index["fixes"].combine_chunks()
    parents = pc.list_parent_indices(column).to_numpy()
    names = pc.list_flatten(column)
    return {
        name: parents[pc.equal(names, name).to_numpy(zero_copy_only=False)]
        for name in pc.unique(names).to_pylist()
    }
