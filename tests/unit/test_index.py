"""pipelines/sources/index.py: archives are read once, and again when they change."""

import gzip
import os
from pathlib import Path

import pytest
from drawn import tar

from alexnet.errors import UserError
from pipelines import shards
from pipelines.sources import index, tars


@pytest.fixture
def archive(tmp_path: Path, home: Path) -> Path:
    inner = {"n1.tar": tar([("a.JPEG", b"first"), ("n1/b.JPEG", b"2nd")])}
    inner["train/n0.tar"] = tar([("c.JPEG", b"the third")])
    path = tmp_path / "outer.tar"
    path.write_bytes(tar(list(inner.items())))
    return path


def test_offsets_of_nested_members_are_those_of_their_bytes(archive, monkeypatch):
    data = archive.read_bytes()
    members = index.nested(str(archive))
    found = [
        (row["outer"], row["name"], data[row["offset"] : row["offset"] + row["size"]])
        for row in members.to_pylist()
    ]
    assert found == [
        ("n1.tar", "a.JPEG", b"first"),
        ("n1.tar", "n1/b.JPEG", b"2nd"),
        ("n0.tar", "c.JPEG", b"the third"),
    ]
    flat = index.flat(str(archive))
    monkeypatch.setattr(tars, "members", lambda *_, **__: pytest.fail("read again"))
    assert index.nested(str(archive)).equals(members) and index.flat(str(archive)).equals(flat)


def test_a_changed_archive_of_the_same_size_is_read_again(archive):
    before, stat = index.flat(str(archive)), archive.stat()
    sizes = before["size"].to_pylist()
    archive.write_bytes(tar([("n1.tar", bytes(sizes[0])), ("n9.tar", bytes(sizes[1]))]))
    os.utime(archive, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert archive.stat().st_size == stat.st_size
    assert before["name"].to_pylist() == ["n1.tar", "train/n0.tar"]
    assert index.flat(str(archive))["name"].to_pylist() == ["n1.tar", "n9.tar"]


def test_a_home_that_cannot_be_written_costs_the_index_not_the_build(archive, monkeypatch, caplog):
    monkeypatch.setenv("ALEXNET_HOME", "/proc/nowhere")
    assert len(index.flat(str(archive))) == 2
    assert "is not kept" in caplog.text


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a/n1.tar", tar([("x", b"1")])), ("b/n1.tar", tar([("x", b"1")]))], r"n1\.tar twice"),
        ([("n1.tar", tar([("._x.JPEG", b"1")]))], r"n1\.tar holds no image"),
        ([("n1.tar", b"")], r"n1\.tar is empty"),
        ([("n1.tar", gzip.compress(tar([("x", b"1")]), mtime=0))], r"n1\.tar is gzip-compressed"),
        ([("n1.tar", tar([("x", b"1")])), ("x.JPEG", b"1")], r"holds x\.JPEG; expected only nX"),
    ],
)
def test_inner_tars_that_lack_something_are_refused_by_name(archive, members, message):
    archive.write_bytes(tar(members))
    with pytest.raises(UserError, match=message):
        index.nested(str(archive))


def test_a_long_reading_says_how_far_it_is(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(index.time, "monotonic", lambda: clock[0])
    with index.Meter("indexing x.tar", 4_000_000_000) as meter:
        for _ in range(2):
            clock[0] += 6
            meter.add(3000, 1_000_000_000)
    told = [
        f"indexing x.tar: {n},000 members, 500/s, {share}% of 4.0 GB, ETA {s} s"
        for n, share, s in ((3, 25, 18), (6, 50, 12), (6, 50, 12))
    ]
    assert capsys.readouterr().err.splitlines() == told
    with index.Meter("short", 10) as meter:
        meter.add(1, 10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cut", [0, 4, 300])
def test_kept_index_that_is_damaged_is_read_anew(archive, home, cut):
    right = index.flat(str(archive))
    (kept,) = (home / "index").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:cut], shards.parquet_bytes(right.drop_columns("size"))):
        kept.write_bytes(damaged)
        assert index.flat(str(archive)).equals(right)
        assert kept.read_bytes() == whole
