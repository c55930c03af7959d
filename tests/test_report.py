"""pipelines/report/: a page that is whole, safe and bounded; its numbers are the index's."""

import io
import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from built import build_set, write_folders
from drawn import jpeg
from pages import Page, column_heights, edit, page, put_index, put_rejected
from PIL import Image

from pipelines import journal, shards, storage
from pipelines.journal import Journal, Point
from pipelines.plan import Recipe
from pipelines.report import charts, counts, pictures, report

HOSTILE = (
    '</style></details><img src=x onerror="alert(1)"><script>alert(2)</script>\u202e\x1b[31m&amp;'
)


def test_the_page_is_well_formed_loads_nothing_and_is_written_beside_the_set(copy: Path) -> None:
    location = Path(report(str(copy)))
    assert location == copy / "report" / "index.html"
    text = location.read_text()
    assert not re.search(r"https?:", text)
    found = Page(text)
    anchors = re.findall(r'href="#(\w+)"', text)
    assert anchors == re.findall(r'<section id="(\w+)"', text) == [*found.text][-len(anchors) :]
    manifest = shards.load_manifest(str(copy))
    assert manifest.plan_id in found.text[""] and manifest.digest in found.text[""]
    for shard in manifest.shards:
        assert shard.name in found.text["shards"] and shard.sha256[:16] in found.text["shards"]
    for name, version in manifest.document["versions"].items():
        assert f"{name}\n{version}\n" in found.text["made"]
    assert "sha256sum --check SHA256SUMS" in found.text["verify"]


def test_the_same_set_gives_the_same_page_on_disk_and_on_s3(s3: str, copy: Path) -> None:
    first = Path(report(str(copy))).read_bytes()
    assert Path(report(str(copy))).read_bytes() == first
    for name, _ in storage.list_files(str(copy)):
        if not name.startswith("report/"):
            storage.write(f"{s3}/report-of/{name}", (copy / name).read_bytes())
    assert storage.read(report(f"{s3}/report-of")) == first


def test_every_picture_of_a_small_set_is_shown_as_it_is_stored(
    drawn_shards: str, copy: Path
) -> None:
    shown = page(copy).images["pictures"]
    rows = {
        row["key"]: row
        for split in ("train", "val")
        for row in shards.load_index(drawn_shards, split).to_pylist()
    }
    assert sorted(key for key, _ in shown) == sorted(rows)
    for key, small in shown:
        row = rows[key]
        tar = Path(drawn_shards, f"{row['shard']}.tar").read_bytes()
        stored = Image.open(io.BytesIO(tar[row["offset"] :][: row["size"]]))
        expected, found = (
            np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.float64)
            for picture in (stored, Image.open(io.BytesIO(small)))
        )
        assert np.abs(expected - found).max() < 8


def test_totals_and_labels_are_the_manifests(copy: Path) -> None:
    text = page(copy).text["totals"]
    document = shards.load_manifest(str(copy)).document
    for split, total in document["totals"].items():
        cells = [total[name] for name in ("pictures", "samples", "rejected", "bytes")]
        row = [split, document["announced"][split], *cells, document["labels_from"][split]]
        lines = "\n".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in row)
        assert lines in text


def test_entries_of_raw_are_told_by_rule_and_by_name(tmp_path: Path) -> None:
    write_folders(tmp_path / "raw", {"train/a/1.jpg": 1, "val/a/2.jpg": 2})
    (tmp_path / "raw/train/a/notes.txt").write_text("no image")
    (tmp_path / "raw/train/b").mkdir()
    out = build_set(str(tmp_path / "raw"), tmp_path / "out", Recipe(partial=True))
    text = Path(report(out)).read_text()
    for told in ("ignored: documents", "train/b", "an empty class folder"):
        assert told in text


def test_bars_of_few_classes_carry_their_names_and_the_counts_of_the_index(copy: Path) -> None:
    found = page(copy)
    manifest = shards.load_manifest(str(copy))
    bars = [attrs["d"] for tag, attrs in found.shapes["classes"] if tag == "path"]
    expected = []
    for split in ("train", "val"):
        labels = shards.load_index(str(copy), split)["label"].to_pylist()
        expected += [labels.count(label) for label in range(manifest.num_classes)]
    assert bars == [f"M0 0h{count}v1h-{count}z" for count in expected]
    for wnid, name in zip(manifest.wnids, manifest.class_names, strict=True):
        assert f"{name} ({wnid})" in found.text["classes"]


def test_a_thousand_classes_are_columns_with_the_counts_of_the_index_and_one_picture_each(
    copy: Path,
) -> None:
    rng = np.random.default_rng(0)
    rows = shards.load_index(str(copy), "train")
    labels = np.concatenate([np.arange(1000), rng.integers(0, 1000, 19_000)])
    many = rows.take(pa.array(rng.integers(0, rows.num_rows, len(labels))))
    position = many.column_names.index("label")
    many = many.set_column(position, shards.INDEX.field("label"), pa.array(labels))
    (copy / "index" / "train.parquet").write_bytes(shards.parquet_bytes(many))
    classes = {"wnids": [f"n{i:08}" for i in range(1000)], "names": [HOSTILE] * 1000}
    edit(copy, lambda document: document.update(classes=classes))
    found = page(copy)
    assert len(found.images["pictures"]) == 1000 + 12
    (train,) = column_heights(found.shapes["classes"])[:1]
    assert train == dict(Counter(labels.tolist()))
    assert "train: 1,000 of 20,000 pictures, 1,000 classes" in found.text["pictures"]
    assert (copy / "report" / "index.html").stat().st_size < 15e6


def test_pictures_that_do_not_fit_are_left_out_and_that_is_told(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = page(copy).images["pictures"]
    room = sum(4 * len(data) // 3 for _, data in whole[:31]) // 2
    monkeypatch.setattr(pictures, "_SHEET_ROOM", room)
    found = page(copy)
    shown = len(found.images["pictures"]) - 12
    assert 8 <= shown < 31
    assert re.search(rf"train: {shown} of 31 pictures, [123] of 4 classes", found.text["pictures"])


def test_more_classes_than_pictures_are_chosen_evenly() -> None:
    index = pa.table({"label": np.repeat(np.arange(5000), 3)[::-1]})
    labels, rows = pictures._first_of_each(index, 1000)
    assert len(labels) == len(rows) == 1000
    assert labels[0] == 0 and labels[-1] == 4999 and set(np.diff(labels)) <= {4, 5, 6}
    assert index["label"].to_numpy()[rows].tolist() == labels.tolist()


def test_the_charts_of_sizes_hold_every_picture_once(copy: Path) -> None:
    rng = np.random.default_rng(1)
    width = [1, 30000, *rng.integers(100, 900, 29).tolist()]
    height = [30000, 1, *rng.integers(100, 900, 29).tolist()]
    put_index(copy, "train", width=width, height=height)
    found = page(copy)
    sides, shapes = column_heights(found.shapes["sizes"])
    assert sum(sides.values()) == sum(shapes.values()) == 31 + 12
    assert shapes[0] >= 1 and shapes[max(shapes)] >= 1  # the strips, in the outermost bars
    tables = {split: shards.load_index(str(copy), split) for split in ("train", "val")}
    short = np.concatenate(
        [np.minimum(t["width"].to_numpy(), t["height"].to_numpy()) for t in tables.values()]
    )
    assert f"{(short < 256).sum()} of 43 pictures" in found.text["sizes"]
    assert "30,000.00 : 1" in found.text["sizes"]


def test_dark_cells_lie_where_the_pictures_are() -> None:
    width, height = np.array([100] * 50 + [1000]), np.array([1000] * 50 + [100])
    svg = charts.density("c", width, height, 256)
    cells = dict(re.findall(r'fill-opacity="([\d.]+)" d="(M\S+ \S+?h)', svg))
    last = charts._CELLS
    assert cells == {"1.00": f"M0 -{last}h", "0.34": f"M{last - 1} -1h"}


def test_nothing_that_a_name_can_hold_becomes_a_tag(copy: Path) -> None:
    wnids = [f"n{i}{HOSTILE}" for i in range(4)]
    edit(copy, lambda document: document.update(classes={"wnids": wnids, "names": [HOSTILE] * 4}))
    edit(copy, lambda document: document["labels_from"].update(train=HOSTILE))
    edit(copy, lambda document: document["source"].update(containers=[[HOSTILE, 1]]))
    hostile = dict.fromkeys(("name", "detail", "source", "reason"), HOSTILE)
    put_rejected(copy, [(hostile, HOSTILE.encode()), (hostile, jpeg())])
    put_index(copy, "val", key=[f"{i}{HOSTILE}" for i in range(12)], fixes=[[HOSTILE]] * 12)
    put_index(copy, "val", source_sha256=["0" * 64] * 12, wnid=[HOSTILE] * 12)
    entry = Journal(6, 44, host=HOSTILE, builder="b", state="failed", message=HOSTILE)
    entry.points = [Point(0, 0, 0, 0, 0, 0), Point(9, 6, 44, 0, 0, 0)]
    journal.save(str(copy), entry)
    found = page(copy)  # refuses scripts, handlers and foreign images
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\u001b")
    for section in ("totals", "pictures", "classes", "fixes", "quarantine", "duplicates"):
        assert shown in found.text[section], section
    for section in ("throughput", "made"):
        assert shown in found.text[section], section


def test_a_test_split_without_labels_is_called_unlabelled(copy: Path) -> None:
    table = shards.load_index(str(copy), "val")
    (copy / "index" / "test.parquet").write_bytes(shards.parquet_bytes(table))
    put_index(copy, "test", label=[-1] * 12, wnid=[""] * 12)
    (copy / "quarantine" / "test.jsonl").write_bytes(b"")
    edit(copy, lambda document: document["totals"].update(test=document["totals"]["val"]))
    found = page(copy)
    assert "test: 8 of 12 pictures, 1 class\nunlabelled\n" in found.text["pictures"]
    assert "12 pictures are unlabelled." in found.text["classes"]
    order = [found.text["totals"].index(f"{split}\n") for split in ("train", "val", "test")]
    assert order == sorted(order)


def test_a_set_without_journals_or_pictures_has_a_page_as_well(copy: Path) -> None:
    for split in ("train", "val"):
        empty = shards.load_index(str(copy), split).slice(0, 0)
        (copy / "index" / f"{split}.parquet").write_bytes(shards.parquet_bytes(empty))
    found = page(copy)
    assert "No picture was stored." in found.text["sizes"]
    assert "No builder left a journal here." in found.text["throughput"]
    assert "not recorded" in found.text[""]


def test_a_stored_picture_that_cannot_be_decoded_is_told_by_its_name(copy: Path) -> None:
    row = shards.load_index(str(copy), "val").to_pylist()[0]
    tar = bytearray((copy / f"{row['shard']}.tar").read_bytes())
    tar[row["offset"] : row["offset"] + 100] = bytes(100)
    (copy / f"{row['shard']}.tar").write_bytes(tar)
    found = page(copy)
    assert f"{row['key']} cannot be decoded" in found.text["pictures"]
    assert len(found.images["pictures"]) == 42


def test_long_tables_are_cut_and_that_is_told() -> None:
    from pipelines.report.page import table

    text = table(["n"], [[n] for n in itertools.repeat(1, 2500)])
    assert text.count("<td") == 2000 and "500 more rows are not shown" in text


def test_pictures_of_a_set_made_from_shards_were_scaled_from_the_stored_side(copy: Path) -> None:
    stored = {"resize": 512, "crop": 454, "quality": 90, "digest": "0" * 64}
    edit(copy, lambda document: document["source"].update(stored=stored))
    assert counts._scaled_to(shards.load_manifest(str(copy))) == 227
