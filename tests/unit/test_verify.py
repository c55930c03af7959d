"""pipelines/verify.py: every damage of a finished set is found and named."""

import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from alexnet.errors import UserError
from pipelines.verify import Findings, _by_shard, verify

REJECTED = "quarantine/train/n09104412_19.bin"


def told(findings: Findings) -> list[str]:
    return [f"{problem.file}: {problem.text}" for problem in findings.problems]


def test_an_untouched_set_has_no_problems(drawn_shards, drawn_raw):
    assert told(verify(drawn_shards)) == []
    for raw in (None, drawn_raw):
        findings = verify(drawn_shards, full=True, raw=raw)
        assert told(findings) == [] and findings.notes == () and findings.bad_files == ()
        assert "43 images decoded" in findings.checked


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def spoil(path: Path) -> None:
    path.write_bytes(b"\0\xff{")


SMALL = ["manifest.json", "index/val.parquet", "shardindex-val.json", "quarantine/train.jsonl"]


@pytest.mark.parametrize("damage", [flip_byte, cut, spoil, Path.unlink])
@pytest.mark.parametrize("name", [*SMALL, "train-000001.idx"])
def test_damage_of_a_small_file_is_found_without_reading_shards(copy, name, damage):
    damage(copy / name)
    if (name, damage) == ("manifest.json", Path.unlink):
        with pytest.raises(UserError, match="no finished shard set"):
            verify(str(copy))
    else:
        assert verify(str(copy)).bad_files == (name,)


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        ("train-000002.tar", cut, r"its [\d,]+ bytes should be [\d,]+"),
        ("val-000001.tar", Path.unlink, "missing"),
        (REJECTED, Path.unlink, "missing"),
        (REJECTED, cut, r"its [\d,]+ bytes should be [\d,]+"),
        ("_meta/val-000000.parquet", Path.unlink, "missing"),
        ("_meta/val-000000.parquet", spoil, r"damaged \(.*\)"),
        ("_meta/plan.json", spoil, r"damaged \(.*\)"),
        ("SHA256SUMS", Path.unlink, "missing"),
    ],
)
def test_damage_of_other_files_is_found_and_named(copy, name, damage, text):
    damage(copy / name)
    for full in (False, True):
        (line,) = told(verify(str(copy), full=full))
        assert re.fullmatch(f"{name}: {text}", line)


@pytest.mark.parametrize("name", ["train-000002.tar", REJECTED])
def test_only_full_reads_what_is_large(copy, name):
    flip_byte(copy / name)
    assert told(verify(str(copy))) == []
    findings = verify(str(copy), full=True)
    assert findings.bad_files == (name,)
    assert "another sha256" in findings.problems[0].text


def test_a_file_that_nobody_lists_is_told_and_no_fault(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "report").mkdir()
    (copy / "report" / "index.html").write_text("made later")
    findings = verify(str(copy))
    assert told(findings) == []
    assert findings.notes == ("1 files that SHA256SUMS does not list: notes.txt",)


def test_random_damage_never_raises_and_is_found_in_every_listed_file(copy):
    rng = random.Random(5)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    for _ in range(60):
        path = rng.choice(files)
        data = path.read_bytes()
        damaged = bytearray(data or b"\0")
        for _ in range(rng.choice((1, 1, 4, 20))):
            place = rng.randrange(len(damaged) + 1)
            damaged[place : place + rng.randrange(30)] = rng.randbytes(rng.randrange(30))
        path.write_bytes(damaged)
        try:
            full = path.suffix in (".tar", ".bin") or path.name.startswith("plan")
            findings = verify(str(copy), full=full)
            assert findings.problems or "_meta" in path.parts or damaged == data, path
            assert all(problem.text.isprintable() for problem in findings.problems)
        except UserError as error:  # such as another format version
            assert path.name == "manifest.json" and "\n" not in str(error)
        path.write_bytes(data)


@pytest.mark.parametrize("names", [[], ["a", "a", "b"], ["b", "a", "b", "c", "a"]])
def test_rows_by_shard_are_those_that_a_look_for_each_shard_finds(names):
    table = pa.table({"shard": pa.array(names, pa.string()), "row": list(range(len(names)))})
    found = _by_shard(table)
    assert found.keys() == set(names)
    assert all(rows == table.filter(pc.equal(table["shard"], name)) for name, rows in found.items())
