"""pipelines/index.py: archives are read once, and again when they change."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from pipelines import index, tars


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALEXNET_HOME", str(tmp_path / "home"))
    inner = {"n1.tar": tar([("a.JPEG", b"first"), ("b.JPEG", b"2nd")])}
    inner["n0.tar"] = tar([("c.JPEG", b"the third")])
    path = tmp_path / "outer.tar"
    path.write_bytes(tar(list(inner.items())))
    return path


def test_offsets_of_nested_members_are_those_of_their_bytes(archive):
    for members in (index.nested(str(archive)), index.nested(str(archive))):  # read, then kept
        data = archive.read_bytes()
        found = {
            name: [(m.name, data[m.offset : m.offset + m.size]) for m in inner]
            for name, inner in members.items()
        }
        assert found == {
            "n1.tar": [("a.JPEG", b"first"), ("b.JPEG", b"2nd")],
            "n0.tar": [("c.JPEG", b"the third")],
        }
        assert list(found) == ["n1.tar", "n0.tar"]


def test_the_second_time_no_header_is_read(archive, monkeypatch):
    nested, flat = index.nested(str(archive)), index.flat(str(archive))
    monkeypatch.setattr(tars, "members", lambda *_, **__: pytest.fail("read again"))
    assert index.nested(str(archive)) == nested
    assert index.flat(str(archive)) == flat


def test_a_changed_archive_of_the_same_size_is_read_again(archive):
    before, stat = index.flat(str(archive)), archive.stat()
    archive.write_bytes(tar([("n1.tar", bytes(before[0].size)), ("n9.tar", bytes(before[1].size))]))
    os.utime(archive, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert archive.stat().st_size == stat.st_size
    assert [member.name for member in before] == ["n1.tar", "n0.tar"]
    assert [member.name for member in index.flat(str(archive))] == ["n1.tar", "n9.tar"]


def test_a_home_that_cannot_be_written_costs_the_index_not_the_build(archive, monkeypatch, caplog):
    monkeypatch.setenv("ALEXNET_HOME", "/proc/nowhere")
    assert len(index.flat(str(archive))) == 2
    assert "is not kept" in caplog.text
