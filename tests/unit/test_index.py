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
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    inner = {"n1.tar": tar([("a.JPEG", b"first"), ("n1/b.JPEG", b"2nd")])}
    inner["train/n0.tar"] = tar([("c.JPEG", b"the third")])
    path = tmp_path / "outer.tar"
    path.write_bytes(tar(list(inner.items())))
    return path


def test_offsets_of_nested_members_are_those_of_their_bytes(archive: Path) -> None:
    for members in (index.nested(str(archive)), index.nested(str(archive))):  # read, then kept
        data = archive.read_bytes()
        found = [
            (row["outer"], row["name"], data[row["offset"] : row["offset"] + row["size"]])
            for row in members.to_pylist()
        ]
        assert found == [
            ("n1.tar", "a.JPEG", b"first"),
            ("n1.tar", "n1/b.JPEG", b"2nd"),
            ("n0.tar", "c.JPEG", b"the third"),
        ]


def test_the_second_time_no_header_is_read(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nested, flat = index.nested(str(archive)), index.flat(str(archive))
    monkeypatch.setattr(tars, "members", lambda *_, **__: pytest.fail("read again"))
    assert index.nested(str(archive)).equals(nested)
    assert index.flat(str(archive)).equals(flat)


def test_a_changed_archive_of_the_same_size_is_read_again(archive: Path) -> None:
    before, stat = index.flat(str(archive)), archive.stat()
    sizes = before["size"].to_pylist()
    archive.write_bytes(tar([("n1.tar", bytes(sizes[0])), ("n9.tar", bytes(sizes[1]))]))
    os.utime(archive, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert archive.stat().st_size == stat.st_size
    assert before["name"].to_pylist() == ["n1.tar", "train/n0.tar"]
    assert index.flat(str(archive))["name"].to_pylist() == ["n1.tar", "n9.tar"]


def test_a_home_that_cannot_be_written_costs_the_index_not_the_build(
    archive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ALEXNET_HOME", "/proc/nowhere")
    assert len(index.flat(str(archive))) == 2
    assert "is not kept" in caplog.text


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a/n1.tar", tar([("x", b"1")])), ("b/n1.tar", tar([("x", b"1")]))], r"n1\.tar twice"),
        ([("n1.tar", tar([("._x.JPEG", b"1")]))], r"n1\.tar holds no image"),
        ([("n1.tar", b"")], r"n1\.tar is empty"),
        ([("n1.tar", tar([]))], r"n1\.tar holds no file"),
        ([("n1.tar", gzip.compress(tar([("x", b"1")]), mtime=0))], r"n1\.tar is gzip-compressed"),
        ([("n1.tar", tar([("x", b"1")] * 2))], r"n1\.tar holds x twice"),
        ([("n1.tar", tar([("x", b"1")])[:700])], r"n1\.tar is truncated"),
        ([("n1.tar", tar([("x", b"1")])), ("x.JPEG", b"1")], r"holds x\.JPEG; expected only nX"),
    ],
)
def test_inner_tars_that_lack_something_are_refused_by_name(
    archive: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    archive.write_bytes(tar(members))
    with pytest.raises(UserError, match=message):
        index.nested(str(archive))


def test_litter_is_kept_apart_and_counted(archive: Path) -> None:
    inner = tar([("a.JPEG", b"1"), ("._a.JPEG", b"2"), ("x/.DS_Store", b"3")])
    archive.write_bytes(
        tar([("n1.tar", inner), ("._n1.tar", b"no tar"), ("__MACOSX/n1.tar", b"none either")])
    )
    notes: list[str] = []
    ignored: dict[str, int] = {}
    found = index.without_litter("outer.tar", index.nested(str(archive)), notes, ignored)
    assert ignored == {"outer.tar": 4}
    assert found.select(["outer", "name"]).to_pylist() == [{"outer": "n1.tar", "name": "a.JPEG"}]
    assert notes == ["outer.tar: ignored 4 files that desktop systems leave behind, first ._n1.tar"]


def test_a_long_reading_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(index.time, "monotonic", lambda: clock[0])
    with index.Meter("indexing x.tar", 4_000_000_000) as meter:
        for _ in range(4):
            clock[0] += 3
            meter.add(1500, 500_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "indexing x.tar: 3,000 members, 500/s, 25% of 4.0 GB, ETA 18 s",
        "indexing x.tar: 6,000 members, 500/s, 50% of 4.0 GB, ETA 12 s",
        "indexing x.tar: 6,000 members, 500/s, 50% of 4.0 GB, ETA 12 s",
    ]
    with index.Meter("MD5 of x.tar", 4_000_000_000) as meter:
        clock[0] += 10
        meter.add(0, 1_000_000_000)
    assert capsys.readouterr().err.startswith("MD5 of x.tar: 100 MB/s, 25% of 4.0 GB, ETA 30 s")
    with index.Meter("short", 10) as meter:
        meter.add(1, 10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cut", [0, 4, 300])
def test_kept_index_that_is_damaged_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    (tmp_path / "it.tar").write_bytes(tar([("a.JPEG", b"1"), ("b.JPEG", b"22")]))
    right = index.flat(str(tmp_path / "it.tar"))
    (kept,) = (tmp_path / "home" / "index").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:cut], shards.parquet_bytes(right.drop_columns("size"))):
        kept.write_bytes(damaged)
        assert index.flat(str(tmp_path / "it.tar")).equals(right)
        assert kept.read_bytes() == whole
