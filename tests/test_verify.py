"""pipelines/verify.py and report.py: damage is found, samples are traced, the page is whole."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from alexnet.errors import UserError
from pipelines import shards, storage
from pipelines.report import report
from pipelines.verify import inspect, verify


@pytest.fixture
def copy(drawn_shards: str, tmp_path: Path) -> Path:
    shutil.copytree(drawn_shards, tmp_path / "copy")
    return tmp_path / "copy"


def test_an_untouched_set_has_no_problems(drawn_shards: str) -> None:
    assert verify(drawn_shards)[0] == []
    problems, checked = verify(drawn_shards, full=True)
    assert problems == []
    assert "43 pictures decoded" in checked


def test_sha256sum_needs_no_help_from_us(copy: Path) -> None:
    command = ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=copy, capture_output=True).returncode == 0
    (copy / "val-000000.tar").write_bytes(b"")
    assert subprocess.run(command, cwd=copy, capture_output=True).returncode == 1


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("train-000002.tar", flip_byte, "train-000002.tar: its .* another sha256"),
        ("train-000002.tar", cut, "train-000002.tar: its .* another sha256"),
        ("val-000001.tar", Path.unlink, "val-000001.tar: missing"),
        ("quarantine/train/n09104412_19.bin", Path.unlink, "quarantine/.*19.bin: missing"),
        ("shardindex-val.json", cut, "shardindex-val.json: its"),
        (
            "manifest.json",
            lambda path: path.write_bytes(path.read_bytes() + b"\n"),
            "manifest.json",
        ),
    ],
)
def test_damage_is_found_and_named(
    copy: Path, name: str, damage: Callable[[Path], None], told: str
) -> None:
    damage(copy / name)
    problems, _ = verify(str(copy))
    assert any(re.match(told, problem) for problem in problems), problems


def forge(copy: Path, name: str, data: bytes) -> None:
    """Replace a file and its line in SHA256SUMS, as a careful liar would."""
    old = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    (copy / name).write_bytes(data)
    sums = copy / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(old, hashlib.sha256(data).hexdigest()))


def test_a_consistent_forgery_of_the_index_is_found(copy: Path) -> None:
    rows = shards.load_index(str(copy), "val").to_pylist()
    for change, told in (
        ({"label": 3 - rows[0]["label"]}, "has label"),
        ({"shard": "val-000009"}, "other number of rows|lacks"),
        ({"key": rows[1]["key"]}, "twice"),
    ):
        changed = [rows[0] | change, *rows[1:]]
        table = shards.INDEX.empty_table().from_pylist(changed, schema=shards.INDEX)
        forge(copy, "index/val.parquet", shards.parquet_bytes(table))
        problems, _ = verify(str(copy))
        assert any(re.search(told, problem) for problem in problems), (change, problems)


def test_full_compares_every_sample_with_the_index(copy: Path) -> None:
    rows = shards.load_index(str(copy), "val").to_pylist()
    rows[0] |= {"sha256": "0" * 64, "width": 7}
    table = shards.INDEX.empty_table().from_pylist(rows, schema=shards.INDEX)
    forge(copy, "index/val.parquet", shards.parquet_bytes(table))
    assert verify(str(copy))[0] == []
    problems, _ = verify(str(copy), full=True)
    key = rows[0]["key"]
    assert [problem.partition(": ")[2] for problem in problems if key in problem] == [
        "another sha256 than in the index",
        "its JSON and the index disagree",
    ]


def test_an_unfinished_set_is_no_set(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished shard set"):
        verify(str(copy))


def test_a_sample_is_traced_to_the_bytes_it_came_from(drawn_shards: str, drawn_raw: str) -> None:
    row = shards.load_index(drawn_shards, "val").to_pylist()[4]
    text = inspect(drawn_shards, row["key"])
    assert text == inspect(drawn_shards, f"{row['key']}.jpg")
    place = re.search(r"RAW/(\S+), bytes ([\d,]+) \+ ([\d,]+), sha256 (\w+)", text)
    assert place is not None
    offset, size = (int(place[group].replace(",", "")) for group in (2, 3))
    data = storage.read(f"{drawn_raw}/{place[1]}", offset, size)
    assert hashlib.sha256(data).hexdigest() == place[4]
    assert f"label {row['label']}, {row['wnid']}" in text


def test_a_rejected_picture_is_traced_with_its_reason(drawn_shards: str) -> None:
    text = inspect(drawn_shards, "n09104412_19")
    assert "rejected, truncated" in text
    assert "RAW/ILSVRC2012_img_train.tar, bytes" in text


def test_a_shard_is_described(drawn_shards: str) -> None:
    for name in ("train-000001", "train-000001.tar", f"{drawn_shards}/train-000001.tar"):
        assert "8 samples" in inspect(drawn_shards, name)
    with pytest.raises(UserError, match="no shard and no sample"):
        inspect(drawn_shards, "train-000099")


def test_the_report_is_one_page_that_loads_nothing(copy: Path) -> None:
    location = Path(report(str(copy)))
    assert location == copy / "report" / "index.html"
    page = location.read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    assert page.count("<img ") == 31 + 12
    for expected in ("red disc", "truncated", "cmyk", "n09104412_19", "train-000003"):
        assert expected in page
    assert verify(str(copy))[0] == []  # the page is no part of what SHA256SUMS covers
