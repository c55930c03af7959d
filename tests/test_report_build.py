"""pipelines/report/: what the page tells of the build: fixes, rejected, duplicates, throughput."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from drawn import jpeg
from pages import page, put_index, put_rejected
from PIL import Image

from pipelines import journal, shards, storage
from pipelines.journal import Journal, Point
from pipelines.report import pace, quarantine
from pipelines.transform import FIXES, REASONS


def test_fixes_are_counted_explained_and_shown(copy: Path) -> None:
    found = page(copy)
    text = found.text["fixes"]
    counted = shards.load_manifest(str(copy)).document["fixes"]
    assert counted
    for fix, count in counted.items():
        block = text[text.index(f"{fix}\n{FIXES[fix]}") :]
        numbers = re.findall(r"(\d+) (?:train|val) \(", block.split("\n")[2])
        assert sum(map(int, numbers)) == count
    with_fixes = {
        row["key"]
        for split in ("train", "val")
        for row in shards.load_index(str(copy), split).to_pylist()
        if row["fixes"]
    }
    assert {key for key, _ in found.images["fixes"]} == with_fixes


def test_a_rejected_picture_is_shown_with_reason_sentence_and_place(copy: Path) -> None:
    found = page(copy)
    text = found.text["quarantine"]
    (line,) = (copy / "quarantine" / "train.jsonl").read_text().splitlines()
    entry = json.loads(line)
    for part in (entry["name"], entry["detail"], REASONS["truncated"], entry["source"]):
        assert part in text
    assert f"at byte {entry['source_offset']:,}" in text
    ((key, small),) = found.images["quarantine"]
    assert key == entry["key"]
    assert max(Image.open(io.BytesIO(small)).size) == 160


def test_what_shows_no_picture_is_shown_as_bytes(copy: Path) -> None:
    html = b"<html>" + bytes(range(256))
    parquet = {"reason": "zero_bytes", "source": "data/train.parquet", "source_offset": 17}
    put_rejected(copy, [({"reason": "not_an_image"}, html), (parquet, b"")])
    found = page(copy)
    assert "quarantine" not in found.images
    lines = re.findall(r"^((?:[0-9a-f]{2} ?){1,8}) ", found.text["quarantine"], re.MULTILINE)
    assert bytes.fromhex("".join(lines)) == html[:64]
    assert "3c 68 74 6d 6c 3e 00 01  <html>··" in found.text["quarantine"]
    assert "no bytes" in found.text["quarantine"]
    assert "row 17 of data/train.parquet" in found.text["quarantine"]


def test_every_reason_has_its_turn_in_the_gallery_and_the_rest_is_listed(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "_GALLERY", 3)
    monkeypatch.setattr(quarantine, "_LISTED", 4)
    cut = jpeg()[:-300]
    entries: list[tuple[dict[str, Any], bytes]] = [({}, cut)] * 8
    put_rejected(copy, [*entries, ({"reason": "corrupt"}, cut)])
    found = page(copy)
    assert [key for key, _ in found.images["quarantine"]] == ["k0", "k1", "k8"]
    assert "4 more" in found.text["quarantine"]
    assert "2 more are in quarantine/SPLIT.jsonl" in found.text["quarantine"]


def test_duplicates_and_leaks_are_told_with_their_samples(copy: Path) -> None:
    assert "None: no raw file and no stored picture occurs twice." in page(copy).text["duplicates"]
    train, val = (shards.load_index(str(copy), split) for split in ("train", "val"))
    sums = val["source_sha256"].to_pylist()
    sums[3] = train["source_sha256"][5].as_py()
    put_index(copy, "val", source_sha256=sums)
    text = page(copy).text["duplicates"]
    labels = "the same" if val["label"][3] == train["label"][5] else "different"
    assert f"equal raw files\ntwo splits\n{labels}\n1\n2\n" in text
    assert f"train {train['key'][5]} (" in text and f"val {val['key'][3]} (" in text


def a_journal(start: float, rates: list[tuple[float, float]], **fields: Any) -> Journal:
    """With a point every 5 s; `rates`: (seconds, pictures per second) one after the other."""
    entry = Journal(100, 10**6, host="h", pid=1, started=start, **fields)
    entry.updated = start
    now, pictures = 0.0, 0.0
    journal.add(entry, Point(0, 0, 0, 0, 0, 0))
    for seconds, rate in rates:
        for _ in range(int(seconds / 5)):
            now, pictures = now + 5, pictures + 5 * rate
            journal.add(entry, Point(now, 1, int(pictures), int(pictures) * 10**5, 0, 0))
            entry.updated = start + now
    return entry


def test_a_line_of_throughput_follows_the_journal() -> None:
    course = pace._course(a_journal(1000.0, [(300, 200), (300, 50)]))
    assert course[0][0] == 1000 and course[-1][0] == 1600
    assert {round(rate, 6) for at, rate in course if at < 1290} == {200}
    assert {round(rate, 6) for at, rate in course if at > 1310} == {50}


def test_a_shard_that_is_long_in_the_making_is_no_burst() -> None:
    entry = Journal(2, 10**4, started=0.0)
    for second in range(0, 1001, 5):
        journal.add(entry, Point(float(second), 0, 5000 * (second // 500), 0, 0, 0))
    assert {round(rate, 6) for _, rate in pace._course(entry)} == {10}


def test_pauses_are_shaded_and_drawn_short_and_each_builder_has_a_line(copy: Path) -> None:
    day = 86400.0
    for entry in (
        a_journal(0.0, [(600, 100)], state="stopped"),
        a_journal(day, [(300, 100)], state="failed", message="disk full"),
        a_journal(day + 100, [(300, 50)]),
    ):
        entry.builder = f"h-1-{entry.started:.3f}"
        storage.write(f"{copy}/_meta/progress/{entry.builder}.json", b"")
        journal.save(str(copy), entry)
    found = page(copy)
    shapes = found.shapes["throughput"]
    courses = [attrs["points"] for tag, attrs in shapes if tag == "polyline"]
    assert len(courses) == 3
    (gap,) = (attrs["d"] for tag, attrs in shapes if attrs.get("class") == "gap")
    begin, end = (float(x) for x in re.search(r"M([\d.]+) .*H([\d.]+)V", gap).groups())
    assert begin == pytest.approx(1000 * 600 / 1080, abs=0.2)
    assert end - begin == pytest.approx(1000 * 80 / 1080, abs=0.2)
    text = found.text["throughput"]
    assert "stopped" in text and "failed: disk full" in text and "without a word" in text
    assert "1970-01-02 00:00:00\n0:05:00\n1\n30,000\n100\n10\n" in text
    assert "1970-01-01 00:00:00 to " in found.text[""]
