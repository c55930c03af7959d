"""pipelines/sources/tars.py and index.py: members lie where tarfile finds them, damage is refused,
and archives are read once, and again when they change."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from drawn import jpeg, tar

from alexnet.errors import UserError
from pipelines import shards, storage
from pipelines.sources import index, tars

IMAGES = [(f"val/ILSVRC2012_val_{n:08d}.JPEG", jpeg(n)) for n in range(1, 4)]
WHOLE = tar(IMAGES)


def written(folder: Path, data: bytes) -> str:
    (folder / "it.tar").write_bytes(data)
    return str(folder / "it.tar")


def read(folder: Path, data: bytes) -> list[dict]:
    return tars.members(written(folder, data), "it").to_pylist()


def refused(folder: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(folder, data)
    assert "\n" not in str(caught.value)


def packed(infos: list[tarfile.TarInfo], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for info in infos:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **fields: object):
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, size
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def by_tarfile(path: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isreg():
                yield member.name, archive.extractfile(member).read()


def summed(header: bytearray, signed: bool = False) -> bytes:
    """With its right checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(b - 256 * (signed and b > 127) for b in header)
    return bytes(header)


@pytest.mark.parametrize(
    ("form", "depth"),  # 290 characters, of a name 40 folders deep, don't fit ustar
    [
        *((form, depth) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for depth in (1, 40)),
        *((tarfile.USTAR_FORMAT, depth) for depth in (1, 12)),
    ],
)
def test_members_are_those_of_tarfile_in_every_format(tmp_path, form, depth):
    infos = [
        info("folder", tarfile.DIRTYPE),
        # pax stores a fraction of a second in a record
        info("/".join(["folder"] * depth) + "/n00000010_1.JPEG", size=700, mtime=1.5),
        info("ü.JPEG", size=512),
        info("plain.JPEG", size=0),
    ]
    path = written(tmp_path, packed(infos, form))
    found = tars.members(path, "it").to_pylist()
    contents = [(row["name"], storage.read(path, row["offset"], row["size"])) for row in found]
    assert contents == list(by_tarfile(path))
    assert len(contents) == 3


def test_a_size_that_needs_gnus_binary_form_is_read(tmp_path):
    size = 9 << 30
    header = info("big.JPEG", size=size).tobuf(tarfile.GNU_FORMAT)
    with Path(written(tmp_path, header)).open("r+b") as file:
        file.truncate(512 + size + 1024)  # no block of it is stored
    (row,) = tars.members(str(tmp_path / "it.tar"), "it").to_pylist()
    assert (row["offset"], row["size"]) == (512, size)


def test_checksums_of_signed_bytes_are_accepted(tmp_path):
    header = summed(bytearray(info("ü.JPEG").tobuf(tarfile.GNU_FORMAT)), signed=True)
    (row,) = read(tmp_path, header + bytes(1024))
    assert row["name"] == "ü.JPEG"


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    offsets = [row["offset"] for row in read(tmp_path, WHOLE)]
    last_end = offsets[-1] + len(IMAGES[-1][1])
    for length in [300, *(at - 512 for at in offsets[1:]), *(at + 5 for at in offsets), last_end]:
        refused(tmp_path, WHOLE[:length], "it is truncated: .*fetch it again")
    refused(tmp_path, b"", r"it is empty \(0 bytes\)")


def test_damage_inside_a_tar_is_found_and_not_taken_for_its_end(tmp_path):
    for at in (row["offset"] - 512 for row in read(tmp_path, WHOLE)[1:]):
        damages = [(0, bytes(1024)), (0, b"\xff" * 1024)]
        bits = (0, 30, 130, 150, 156, 260)
        damages += [(place, bytes([WHOLE[at + place] ^ 1])) for place in bits]
        for place, data in damages:
            whole = bytearray(WHOLE)
            whole[at + place : at + place + len(data)] = data
            refused(tmp_path, bytes(whole), rf"it is damaged: no valid member at byte {at:,} ")


def test_what_follows_the_end_mark_is_refused_but_a_block_of_zeros(tmp_path):
    for more in (WHOLE, b"x", bytes(2 << 20)):
        refused(tmp_path, WHOLE + more, "an end mark, and .* bytes follow")
    assert read(tmp_path, WHOLE + bytes(10240)) == read(tmp_path, WHOLE)


def test_every_block_of_the_end_mark_is_looked_at_and_one_suffices(tmp_path):
    last = read(tmp_path, WHOLE)[-1]
    end = last["offset"] + -(-last["size"] // 512) * 512
    assert len(WHOLE) >= end + 1024
    for place in range(end + 99, len(WHOLE), 512):
        refused(tmp_path, WHOLE[:place] + b"x" + WHOLE[place + 1 :], "it is damaged: no valid")
    assert len(read(tmp_path, WHOLE[: end + 512])) == 3
    refused(tmp_path, WHOLE[: end + 511], "it is truncated: .* without an end mark")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(WHOLE, mtime=0), "it is gzip-compressed; gunzip it first"),
        (bz2.compress(WHOLE), "it is bzip2-compressed"),
        (lzma.compress(WHOLE), "it is xz-compressed"),
        (b"PK\x03\x04" + bytes(600), "it is zip-compressed"),
        (b"\n<!DOCTYPE html><title>Log in</title>" + b" " * 600, "HTML or XML page, not a tar"),
        (b"<html>", "HTML or XML page, not a tar"),
        (jpeg(1), "not an uncompressed tar"),
        (tar([]), "it holds no file"),
        (tar([*IMAGES, IMAGES[1]]), rf"it holds {IMAGES[1][0]} twice"),
    ],
)
def test_what_is_no_sound_tar_says_what_it_is(tmp_path, data, message):
    refused(tmp_path, data, message)


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (info("a.JPEG", tarfile.SYMTYPE, linkname="/etc/passwd"), r"a\.JPEG is a link or device"),
        (info("a.JPEG", tarfile.LNKTYPE, linkname="b.JPEG"), r"a\.JPEG is a link or device"),
        (info("a.JPEG", tarfile.CHRTYPE), r"a\.JPEG is a link or device"),
        (info("a.JPEG", tarfile.FIFOTYPE), r"a\.JPEG is a link or device"),
        (info("a.JPEG", tarfile.GNUTYPE_SPARSE), r"a\.JPEG is stored sparse"),
        (info("a.JPEG", pax_headers=SPARSE), r"a\.JPEG is stored sparse"),
        (info("/etc/evil.JPEG"), r"/etc/evil\.JPEG is an absolute path"),
        (info("a/../../evil.JPEG"), r"a/\.\./\.\./evil\.JPEG is an absolute path or holds '\.\.'"),
        (info("../" * 60 + "evil.JPEG"), r"evil\.JPEG is an absolute path or holds '\.\.'"),
        (info("b/", size=3), "a folder with data"),
    ],
)
def test_members_that_are_no_image_of_the_archive_are_refused(tmp_path, member, message):
    refused(tmp_path, packed([info("good.JPEG", size=3), member]), message)


def with_records(records: bytes) -> bytes:
    pax = info("records", tarfile.XHDTYPE, size=len(records)).tobuf(tarfile.USTAR_FORMAT)
    return pax + records + bytes(-len(records) % 512) + WHOLE


LONG = b"9" * 5000


@pytest.mark.parametrize(
    ("records", "message"),
    [
        *((record, "a pax record at byte 512") for record in (b"99 path=a\n", b"path=a\n", b"x")),
        *((record, "a pax record at byte 512") for record in (b"0 path=a\n", b"8 path=a")),
        (LONG + b" path=a\n", "a pax record at byte 512"),
        (b"5011 size=" + LONG + b"\n", "a pax record says size 99"),
    ],
    ids=range(7),
)
def test_an_unreadable_pax_record_is_refused(tmp_path, records, message):
    refused(tmp_path, with_records(records), message)


def test_an_absurd_extension_is_refused_before_it_is_read(tmp_path):
    long_name = info("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=5 << 30)
    header = long_name.tobuf(tarfile.GNU_FORMAT)
    refused(tmp_path, header + WHOLE, "a name of 5,368,709,120 bytes")


@pytest.mark.parametrize("size", [b"-0000001000", b"-0000002000", b"+0000000003", b"0o17", b"1_0"])
def test_size_that_is_no_octal_number_is_refused(tmp_path, size):
    """A negative one led back to the same header, for ever."""
    header = bytearray(info("a.JPEG").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size.ljust(12, b"\0")
    refused(tmp_path, summed(header) + WHOLE, "no valid member at byte 0 .*not octal")


def test_hundred_thousand_records_are_read_in_one_pass(tmp_path):
    """Each was once cut off by a copy of all that follows: time grew with the square."""
    found = read(tmp_path, with_records(b"7 a=bc\n" * 100_000))
    assert [row["name"] for row in found] == [name for name, _ in IMAGES]


def test_folder_hides_no_image_whatever_its_size_says(tmp_path):
    folder = info("folder", tarfile.DIRTYPE, size=512).tobuf(tarfile.USTAR_FORMAT)
    assert [row["name"] for row in read(tmp_path, folder + WHOLE)] == [name for name, _ in IMAGES]


# What is kept of them


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
