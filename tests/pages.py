"""A report page taken apart, and sets changed for it."""

import base64
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import shards, storage
from pipelines.report import report

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Parsed; raises when it is not well-formed or could load or run anything."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}  # by section
        self.images: dict[str, list[tuple[str, bytes]]] = {}  # (alt, JPEG) by section
        self.shapes: dict[str, list[tuple[str, dict[str, str]]]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._seen(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._seen(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
        else:
            self.text[self.section] = self.text.get(self.section, "") + data + "\n"

    def _seen(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert not [name for name in found if name.startswith("on")]
        assert all(value.startswith("#") for name, value in found.items() if name == "href")
        if tag == "section":
            self.section = found["id"]
        if tag == "img":
            kind, _, data = found["src"].partition(",")
            assert kind == "data:image/jpeg;base64"
            decoded = base64.b64decode(data, validate=True)
            self.images.setdefault(self.section, []).append((found["alt"], decoded))
        else:
            assert "src" not in found
        self.shapes.setdefault(self.section, []).append((tag, found))


def page(out: Path | str) -> Page:
    return Page(storage.read(report(str(out))).decode())


def edit(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((copy / "manifest.json").read_text())
    change(document)
    (copy / "manifest.json").write_bytes(shards.canonical_json(document))


def put_index(copy: Path, split: str, **columns: Any) -> None:
    table = shards.load_index(str(copy), split)
    for name, values in columns.items():
        position = table.column_names.index(name)
        column = pa.array(values, shards.INDEX.field(name).type)
        table = table.set_column(position, shards.INDEX.field(name), column)
    (copy / "index" / f"{split}.parquet").write_bytes(shards.parquet_bytes(table))


def put_rejected(copy: Path, entries: list[tuple[dict[str, Any], bytes]]) -> None:
    """Instead of what is in the quarantine of train."""
    lines = []
    for number, (entry, raw) in enumerate(entries):
        line = {
            "key": f"k{number}",
            "name": f"k{number}.JPEG",
            "reason": "truncated",
            "detail": "",
            "source": "train.tar",
            "source_offset": 512,
            "source_size": len(raw),
        }
        lines.append(shards.canonical_json(line | entry))
        (copy / "quarantine" / "train" / f"k{number}.bin").write_bytes(raw)
    (copy / "quarantine" / "train.jsonl").write_bytes(b"".join(lines))
    counts = Counter(json.loads(line)["reason"] for line in lines)
    edit(copy, lambda document: document.update(rejected=dict(counts)))


def column_heights(shapes: list[tuple[str, dict[str, str]]]) -> list[dict[int, int]]:
    """Of each chart of upright bars: position → height, in data units."""
    paths = [found["d"] for tag, found in shapes if tag == "path" and "v-" in found.get("d", "")]
    return [
        {int(at): int(height) for at, height in re.findall(r"M(\d+) 0v-(\d+)h1v\2z", path)}
        for path in paths
    ]
