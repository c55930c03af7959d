"""The report's gallery of rejected files: why, where they lie, and what can be seen of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines import shards, storage
from pipelines.report import lenient
from pipelines.report.page import escape, folded, in_bytes, note, table
from pipelines.report.pictures import embedded
from pipelines.transform import REASONS

_GALLERY = 60  # files shown with a picture
_ROOM = 1_500_000  # characters of the page for those pictures
_LISTED = 1000  # more of them, as a table
_LIST_BYTES = 8 << 20  # read of each split's list
_PICTURE_BYTES = 4 << 20  # read of each file: enough to see what it was
_HEX_BYTES, _HEX_ROW = 64, 8
_READS_AHEAD = 16

Entry = dict[str, Any]  # a line of quarantine/SPLIT.jsonl, with its split


def quarantine(out: str, manifest: shards.Manifest, splits: Sequence[str]) -> str:
    counts: dict[str, int] = manifest.document["rejected"]
    if not counts:
        return "<p>Empty: every picture was stored.</p>"
    reasons = [[name, counts[name], _sentence(name)] for name in sorted(counts)]
    entries = [entry for split in splits for entry in _listed(out, split)]
    gallery, rest = _chosen(entries)
    with ThreadPoolExecutor(_READS_AHEAD) as pool:
        raws = list(pool.map(lambda entry: _beginning(out, entry), gallery))
    cards = "".join(_cards(gallery, raws, lenient.thumbnails(raws)))
    parts = [table(["reason", "files", ""], reasons), f'<div class="cards">{cards}</div>']
    if rest:
        heads = ["split", "file", "reason", "detail", "container"]
        rows = [
            [e["split"], e["name"], e["reason"], e["detail"], _place(e)] for e in rest[:_LISTED]
        ]
        parts.append(folded(f"{len(rows):,} more", table(heads, rows)))
    if (hidden := sum(counts.values()) - len(gallery) - min(len(rest), _LISTED)) > 0:
        parts.append(note(f"{hidden:,} more are in quarantine/SPLIT.jsonl and not shown here."))
    return "".join(parts)


def _listed(out: str, split: str) -> list[Entry]:
    data = storage.read(storage.join(out, "quarantine", f"{split}.jsonl"), 0, _LIST_BYTES)
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")  # the last one may be cut by the limit
    return [{"split": split, **json.loads(line)} for line in lines if line]


def _chosen(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The gallery, in which every reason has its turn, and the others; both in the order given."""
    seen: Counter[str] = Counter()
    turns = []
    for number, entry in enumerate(entries):
        turns.append((seen[entry["reason"]], number))
        seen[entry["reason"]] += 1
    chosen = {number for _, number in sorted(turns)[:_GALLERY]}
    return (
        [entry for number, entry in enumerate(entries) if number in chosen],
        [entry for number, entry in enumerate(entries) if number not in chosen],
    )


def _beginning(out: str, entry: Entry) -> bytes:
    uri = storage.join(out, "quarantine", entry["split"], f"{entry['key']}.bin")
    return storage.read(uri, 0, _PICTURE_BYTES)


def _cards(entries: Sequence[Entry], raws: Sequence[bytes], seen: Iterable[bytes]) -> list[str]:
    room, cards = _ROOM, []
    for entry, raw, jpeg in zip(entries, raws, seen, strict=True):
        picture = embedded(jpeg, entry["key"]) if jpeg else _dump(raw)
        room -= len(picture)
        cards.append(
            f"<figure>{picture if room > 0 else _dump(raw)}"
            f"<p><code>{escape(entry['name'])}</code></p>"
            f'<p><span class="reason">{escape(entry["reason"])}</span> '
            f"{escape(_sentence(entry['reason']))}</p>"
            f'<p class="soft">{escape(entry["detail"])}</p>'
            f'<p class="soft">{escape(entry["split"])} · {escape(_place(entry))}</p></figure>'
        )
    return cards


def _sentence(reason: str) -> str:
    return REASONS.get(reason, "A reason that this version does not know.")


def _place(entry: Entry) -> str:
    source, offset, size = (entry[name] for name in ("source", "source_offset", "source_size"))
    if source.endswith(".parquet"):
        return f"row {offset:,} of {source}"
    return f"{source}, {in_bytes(size)} at byte {offset:,}"


def _dump(raw: bytes) -> str:
    """The first bytes as hexadecimal numbers and as text."""
    if not raw:
        return "<pre>no bytes</pre>"
    lines = []
    for start in range(0, min(len(raw), _HEX_BYTES), _HEX_ROW):
        row = raw[start : min(start + _HEX_ROW, _HEX_BYTES)]
        text = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in row)
        lines.append(f"{row.hex(' '):<{3 * _HEX_ROW}} {text}")
    return f"<pre>{escape(lines[0])}" + "".join(f"\n{escape(x)}" for x in lines[1:]) + "</pre>"
