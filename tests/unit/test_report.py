"""pipelines/report.py: a page that is whole, safe and bounded; its numbers are the index's."""

import base64
import io
import json
import re
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines import report, shards
from pipelines.transform import FIXES, REASONS

HOSTILE = '</style></details><img src=x onerror="a(1)"><script>b(2)</script>\u202e\x1b[31m&amp;$'


class Page(HTMLParser):
    """Parsed; raises when it is not well-formed or could load or run anything."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}  # by section, without markup
        self.rows: dict[str, list[list[str]]] = defaultdict(list)  # cells by section
        self.images: dict[str, list[tuple[str, bytes]]] = defaultdict(list)  # (alt, file)
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        assert not [name for name in found if name.startswith("on")]
        assert all(value.startswith("#") for name, value in found.items() if name == "href")
        assert "src" not in found or tag == "img"
        self.section = found["id"] if tag == "section" else self.section
        rows = self.rows[self.section]
        if tag == "img":
            data = re.fullmatch(r"data:image/(?:jpeg|png);base64,(\S+)", found["src"])
            assert data and found["alt"]
            file = base64.b64decode(data[1], validate=True)
            self.images[self.section].append((found["alt"], file))
        if tag == "tr":
            rows.append([])
        if tag == "td":
            rows[-1].append("")
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
            return
        self.text[self.section] = self.text.get(self.section, "") + data
        if "td" in self.open:
            self.rows[self.section][-1][-1] += data


def page(out: Path | str) -> Page:
    return Page(Path(report.report(str(out))).read_text())


def edit(copy: Path, **fields: Any) -> None:
    """Other top fields of the manifest."""
    document = json.loads((copy / "manifest.json").read_text()) | fields
    (copy / "manifest.json").write_bytes(shards.canonical_json(document))


def both(copy: Path) -> list[pa.Table]:
    return [shards.load_index(str(copy), split) for split in ("train", "val")]


def put_index(copy: Path, split: str, table: pa.Table | None = None, **columns: Any) -> None:
    """Of that split, or `table`, with other columns."""
    table = shards.load_index(str(copy), split) if table is None else table
    for name, values in columns.items():
        column = pa.array(values, shards.INDEX.field(name).type)
        table = table.set_column(table.column_names.index(name), shards.INDEX.field(name), column)
    (copy / "index" / f"{split}.parquet").write_bytes(shards.parquet_bytes(table))


def put_rejected(copy: Path, *entries: dict[str, Any]) -> None:
    """Instead of what is in the quarantine of train."""
    usual = {"reason": "truncated", "detail": "", "source": "train.tar", "source_offset": 512}
    lines = [
        usual | {"key": f"k{n}", "name": f"k{n}.JPEG", "source_size": 12_345} | entry
        for n, entry in enumerate(entries)
    ]
    text = b"".join(map(shards.canonical_json, lines))
    (copy / "quarantine" / "train.jsonl").write_bytes(text)
    edit(copy, rejected=dict(Counter(line["reason"] for line in lines)))


def test_the_page_is_well_formed_loads_nothing_and_is_written_beside_the_set(copy):
    location = Path(report.report(str(copy)))
    assert location == copy / "report" / "index.html"
    text = location.read_text()
    assert Path(report.report(str(copy))).read_text() == text
    assert not re.search(r"https?:", text)
    found, manifest = Page(text), shards.load_manifest(str(copy))
    anchors = re.findall(r'href="#(\w+)"', text)
    assert anchors == re.findall(r'<section id="(\w+)"', text) and len(anchors) == 11
    assert manifest.plan_id in found.text[""] and manifest.digest in found.text[""]
    told = [[s.name, f"{s.samples}", f"{s.num_bytes:,}", s.sha256[:16]] for s in manifest.shards]
    assert found.rows["shards"][1:] == told
    for name, version in manifest.document["versions"].items():
        assert name + version in found.text["made"]


def test_every_image_of_a_small_set_is_shown_as_it_is_stored(copy):
    shown = dict(page(copy).images["images"])
    rows = {row["key"]: row for table in both(copy) for row in table.to_pylist()}
    assert sorted(shown) == sorted(rows)
    for key, small in shown.items():
        row = rows[key]
        tar = (copy / f"{row['shard']}.tar").read_bytes()
        expected, found = (
            np.asarray(Image.open(io.BytesIO(data)).resize((8, 8), Image.Resampling.BOX), float)
            for data in (tar[row["offset"] :][: row["size"]], small)
        )
        assert np.abs(expected - found).max() < 8


def test_totals_and_classes_are_those_of_the_manifest_and_the_index(copy):
    found, manifest = page(copy), shards.load_manifest(str(copy))
    document = manifest.document
    expected = []
    for split, total in document["totals"].items():
        cells = [total[name] for name in ("pictures", "samples", "rejected", "bytes")]
        numbers = [f"{cell:,}" for cell in [document["announced"][split], *cells]]
        expected.append([split, *numbers, document["labels_from"][split]])
    assert found.rows["totals"][1:] == expected
    labels = [table["label"].to_pylist() for table in both(copy)]
    assert found.rows["classes"][1:] == [
        [str(label), wnid, name, *(str(of.count(label)) for of in labels)]
        for label, (wnid, name) in enumerate(zip(manifest.wnids, manifest.class_names, strict=True))
    ]
    assert len(found.images["classes"]) == len(found.images["sizes"]) == 2


def test_a_page_of_many_classes_has_an_image_of_each_up_to_a_limit(copy, monkeypatch):
    monkeypatch.setattr(report, "_SHEETS", (60, 9))
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(60), rng.integers(0, 60, 1200)])
    index = shards.load_index(str(copy), "train")
    many = index.take(pa.array(rng.integers(0, index.num_rows, len(labels))))
    put_index(copy, "train", many, label=labels)
    edit(copy, classes={"wnids": [f"n{i:08}" for i in range(60)], "names": [HOSTILE] * 60})
    found = page(copy)
    assert len(found.images["images"]) == 60 + 8  # 2 of each of val's 4 classes
    counts = Counter(labels.tolist())
    assert [int(row[3]) for row in found.rows["classes"][1:]] == [counts[i] for i in range(60)]
    assert "train: 60 of 1,260 images, 60 classes" in found.text["images"]


def test_sizes_are_those_of_the_raw_images(copy):
    rng = np.random.default_rng(1)
    width = [1, 30000, *rng.integers(100, 900, 29).tolist()]
    height = [30000, 1, *rng.integers(100, 900, 29).tolist()]
    put_index(copy, "train", width=width, height=height)
    short = np.minimum(width, height)
    quartiles = [f"{np.percentile(short, q):.0f}" for q in (0, 25, 50, 75, 100)]
    enlarged = str((short < 256).sum())
    expected = ["train", *quartiles, "30,000.00 : 1", enlarged]
    assert page(copy).rows["sizes"][1] == expected
    stored = {"resize": 512, "crop": 454, "quality": 90, "digest": "0" * 64}
    edit(copy, source=shards.load_manifest(str(copy)).document["source"] | {"stored": stored})
    assert "was scaled to 227 pixels" in page(copy).text["sizes"]  # 454 of 512, for 256


def test_nothing_that_a_name_can_hold_becomes_a_tag(copy):
    document = shards.load_manifest(str(copy)).document
    edit(
        copy,
        classes={"wnids": [f"n{i}{HOSTILE}" for i in range(4)], "names": [HOSTILE] * 4},
        labels_from=document["labels_from"] | {"train": HOSTILE},
        source=document["source"] | {"containers": [[HOSTILE, 1]]},
        entries=document["entries"] | {"ignored": {HOSTILE: 1}},
    )
    put_rejected(copy, dict.fromkeys(("name", "detail", "source", "reason"), HOSTILE))
    put_index(copy, "val", key=[f"{i}{HOSTILE}" for i in range(12)], fixes=[[HOSTILE]] * 12)
    put_index(copy, "val", source_sha256=["0" * 64] * 12, wnid=[HOSTILE] * 12)
    found = page(copy)  # refuses scripts, handlers and foreign images
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\u001b")
    sections = ("totals", "images", "classes", "entries", "fixes", "quarantine", "duplicates")
    for section in (*sections, "made"):
        assert shown in found.text[section], section


def test_splits_without_labels_or_images_are_reported_as_such(copy):
    put_index(copy, "test", both(copy)[1], label=[-1] * 12, wnid=[""] * 12)
    (copy / "quarantine" / "test.jsonl").write_bytes(b"")
    totals = shards.load_manifest(str(copy)).document["totals"]
    edit(copy, totals=totals | {"test": totals["val"]})
    found = page(copy)
    assert "test: 8 of 12 images, 1 class" in found.text["images"]
    assert "12 images are unlabelled." in found.text["classes"]
    assert [row[0] for row in found.rows["totals"][1:]] == ["train", "val", "test"]
    for split in ("train", "val", "test"):
        put_index(copy, split, both(copy)[0].slice(0, 0))
    put_rejected(copy)
    found = page(copy)
    assert "No image was stored." in found.text["sizes"]
    assert "None was needed" in found.text["fixes"] and "Empty" in found.text["quarantine"]


def test_a_stored_image_that_cannot_be_decoded_is_reported_by_its_name(copy):
    row = both(copy)[1].to_pylist()[0]
    tar = bytearray((copy / f"{row['shard']}.tar").read_bytes())
    tar[row["offset"] : row["offset"] + 100] = bytes(100)
    (copy / f"{row['shard']}.tar").write_bytes(tar)
    found = page(copy)
    assert f"{row['key']} cannot be decoded" in found.text["images"]
    assert len(found.images["images"]) == 42


def test_fixes_are_counted_explained_and_shown(copy):
    found, counted = page(copy), shards.load_manifest(str(copy)).document["fixes"]
    assert counted
    for fix, count in counted.items():
        [numbers] = re.findall(rf"{re.escape(FIXES[fix])} (.*)", found.text["fixes"])
        assert sum(map(int, re.findall(r"(\d+) (?:train|val) \(", numbers))) == count
    fixed = {row["key"] for table in both(copy) for row in table.to_pylist() if row["fixes"]}
    assert {key for key, _ in found.images["fixes"]} == fixed


def test_rejected_files_are_listed_with_reason_and_place_and_not_decoded(copy, monkeypatch):
    (entry,) = shards.load_quarantine(str(copy), "train")
    for path in (copy / "quarantine" / "train").iterdir():
        path.unlink()  # nobody reads them
    reasons, _, (name, reason, detail, place) = page(copy).rows["quarantine"][1:]
    assert reasons == ["truncated", "1", REASONS["truncated"]]
    assert name == f"{entry['name']}train {entry['key']}"
    assert (reason, detail) == (entry["reason"], entry["detail"])
    assert place.startswith(entry["source"])
    assert place.endswith(f" at byte {entry['source_offset']:,}")
    monkeypatch.setattr(report, "_MAX_ROWS", 3)
    parquet = {"reason": "zero_bytes", "source": "data/train.parquet", "source_offset": 17}
    put_rejected(copy, parquet, *[{}] * 7)
    found = page(copy)
    rows = [row for row in found.rows["quarantine"] if len(row) == 4]
    assert [row[0] for row in rows] == [f"k{i}.JPEGtrain k{i}" for i in range(3)]
    assert rows[0][3] == "row 17 of data/train.parquet"
    assert "5 more are in quarantine/SPLIT.jsonl" in found.text["quarantine"]


def test_duplicates_are_counted_as_a_dictionary_counts_them():
    rng = np.random.default_rng(0)
    splits, labels = rng.integers(0, 3, 4000), rng.integers(-1, 3, 4000)
    rows = [
        {"split": split, "label": label, "source_sha256": str(file), "sha256": str(image)}
        for split, label, file, image in np.column_stack(
            [splits, labels, rng.integers(0, 3000, (4000, 2))]
        ).tolist()
    ]
    named = [row | {"key": str(i), "wnid": "n"} for i, row in enumerate(rows)]
    expected: list[list[Any]] = []
    for column, what in (("source_sha256", "raw file"), ("sha256", "stored image")):
        groups = defaultdict(list)
        for row in rows:
            groups[row[column]].append(row)
        several = [group for group in groups.values() if len(group) > 1]
        for where, across in (("across splits", True), ("within a split", False)):
            chosen = [g for g in several if (len({row["split"] for row in g}) > 1) == across]
            differ = [g for g in chosen if len({row["label"] for row in g} - {-1}) > 1]
            numbers = [len(chosen), sum(map(len, chosen)), len(differ)]
            expected.append([f"equal {what}s", where, *numbers])
    found = report._duplicates(pa.Table.from_pylist(named), ("train", "val", "test"))
    assert found["rows"] == expected and all(row[-1] for row in expected)
