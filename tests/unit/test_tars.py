"""pipelines/sources/tars.py: members lie where tarfile finds them; damage is refused."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from drawn import jpeg, tar

from alexnet.errors import UserError
from pipelines import storage
from pipelines.sources import tars

IMAGES = [(f"val/ILSVRC2012_val_{n:08d}.JPEG", jpeg(n)) for n in range(1, 4)]


def written(folder: Path, data: bytes) -> str:
    (folder / "it.tar").write_bytes(data)
    return str(folder / "it.tar")


def refused(folder: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tars.members(written(folder, data), "it")
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


@pytest.mark.parametrize(
    ("form", "depth"),  # 290 characters, of a name 40 folders deep, don't fit ustar
    [
        *((form, depth) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for depth in (1, 40)),
        *((tarfile.USTAR_FORMAT, depth) for depth in (1, 12)),
    ],
)
def test_members_are_those_of_tarfile_in_every_format(
    tmp_path: Path, form: int, depth: int
) -> None:
    name = "/".join(["folder"] * depth) + "/n00000010_1.JPEG"
    infos = [
        info("folder", tarfile.DIRTYPE),
        info(name, size=700, mtime=1.5),  # pax stores a fraction of a second in a record
        info("ü.JPEG", size=512),
        info("plain.JPEG", size=0),
    ]
    path = written(tmp_path, packed(infos, form))
    found = tars.members(path, "it").to_pylist()
    read = [(row["name"], storage.read(path, row["offset"], row["size"])) for row in found]
    assert read == list(by_tarfile(path))
    assert len(read) == 3


def test_an_inner_tar_is_found_by_its_range(tmp_path: Path) -> None:
    path = written(tmp_path, tar([("a.tar", tar(IMAGES[:1])), ("b.tar", tar(IMAGES[1:]))]))
    for row, images in zip(
        tars.members(path, "it").to_pylist(), (IMAGES[:1], IMAGES[1:]), strict=True
    ):
        inner = tars.members(path, "it", row["offset"], row["size"]).to_pylist()
        assert [(r["name"], storage.read(path, r["offset"], r["size"])) for r in inner] == images


def test_a_size_that_needs_gnus_binary_form_is_read(tmp_path: Path) -> None:
    size = 9 << 30
    header = info("big.JPEG", size=size).tobuf(tarfile.GNU_FORMAT)
    with Path(written(tmp_path, header)).open("r+b") as file:
        file.truncate(512 + size + 1024)  # no block of it is stored
    (row,) = tars.members(str(tmp_path / "it.tar"), "it").to_pylist()
    assert (row["offset"], row["size"]) == (512, size)


def test_checksums_of_signed_bytes_are_accepted(tmp_path: Path) -> None:
    header = bytearray(info("ü.JPEG", size=0).tobuf(tarfile.GNU_FORMAT))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(b - 256 if b > 127 else b for b in header)
    path = written(tmp_path, bytes(header) + bytes(1024))
    assert tars.members(path, "it")["name"].to_pylist() == ["ü.JPEG"]


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tar(IMAGES)
    offsets = tars.members(written(tmp_path, whole), "it")["offset"].to_pylist()
    last_end = offsets[-1] + len(IMAGES[-1][1])
    for length in [300, *(at - 512 for at in offsets[1:]), *(at + 5 for at in offsets), last_end]:
        refused(tmp_path, whole[:length], "it is truncated: .*fetch it again")
    refused(tmp_path, b"", r"it is empty \(0 bytes\)")


@pytest.mark.parametrize("rubbish", [bytes(1024), b"\xff" * 1024], ids=["zeros", "ones"])
@pytest.mark.parametrize("member", [1, 2])
def test_rubbish_inside_a_tar_is_not_taken_for_its_end(
    tmp_path: Path, rubbish: bytes, member: int
) -> None:
    whole = bytearray(tar(IMAGES))
    at = tars.members(written(tmp_path, bytes(whole)), "it")["offset"][member].as_py() - 512
    whole[at : at + 1024] = rubbish
    refused(tmp_path, bytes(whole), rf"it is damaged: no valid member at byte {at:,}")


def test_one_wrong_bit_in_a_header_is_found(tmp_path: Path) -> None:
    whole = bytearray(tar(IMAGES))
    at = tars.members(written(tmp_path, bytes(whole)), "it")["offset"][1].as_py() - 512
    for place in (0, 30, 130, 150, 156, 260):
        damaged = bytearray(whole)
        damaged[at + place] ^= 1
        refused(tmp_path, bytes(damaged), rf"no valid member at byte {at:,} \(")


def test_what_follows_the_end_mark_is_refused(tmp_path: Path) -> None:
    end = tars.members(written(tmp_path, tar(IMAGES)), "it")
    refused(tmp_path, tar(IMAGES) + tar(IMAGES), "an end mark, and .* bytes follow")
    refused(tmp_path, tar(IMAGES) + b"x", "an end mark, and .* bytes follow")
    refused(tmp_path, tar(IMAGES) + bytes(2 << 20), "an end mark, and .* bytes follow")
    padded = written(tmp_path, tar(IMAGES) + bytes(10240))
    assert tars.members(padded, "it").equals(end)


def test_every_block_of_the_end_mark_is_looked_at_and_one_suffices(tmp_path: Path) -> None:
    whole = tar(IMAGES)
    last = tars.members(written(tmp_path, whole), "it").to_pylist()[-1]
    end = last["offset"] + -(-last["size"] // 512) * 512
    assert len(whole) >= end + 1024
    for place in range(end, len(whole), 512):
        refused(
            tmp_path, whole[: place + 99] + b"x" + whole[place + 100 :], "it is damaged: no val"
        )
    assert tars.members(written(tmp_path, whole[: end + 512]), "it").num_rows == 3
    refused(tmp_path, whole[: end + 511], "it is truncated: .* without an end mark")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(tar(IMAGES), mtime=0), "it is gzip-compressed; gunzip it first"),
        (bz2.compress(tar(IMAGES)), "it is bzip2-compressed"),
        (lzma.compress(tar(IMAGES)), "it is xz-compressed"),
        (b"PK\x03\x04" + bytes(600), "it is zip-compressed"),
        (b"\n<!DOCTYPE html><title>Log in</title>" + b" " * 600, "HTML or XML page, not a tar"),
        (b"<html>", "HTML or XML page, not a tar"),
        (jpeg(1), "not an uncompressed tar"),
        (tar([]), "it holds no file"),
    ],
)
def test_what_is_no_tar_says_what_it_is(tmp_path: Path, data: bytes, message: str) -> None:
    refused(tmp_path, data, message)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (info("a.JPEG", tarfile.SYMTYPE, linkname="/etc/passwd"), r"a\.JPEG is a link or device"),
        (info("a.JPEG", tarfile.LNKTYPE, linkname="b.JPEG"), r"a\.JPEG is a link or device"),
        (info("a.JPEG", tarfile.CHRTYPE), r"a\.JPEG is a link or device"),
        (info("a.JPEG", tarfile.FIFOTYPE), r"a\.JPEG is a link or device"),
        (info("a.JPEG", tarfile.GNUTYPE_SPARSE), r"a\.JPEG is stored sparse"),
        (
            info("a.JPEG", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
            r"a\.JPEG is stored sparse",
        ),
        (info("/etc/evil.JPEG"), r"/etc/evil\.JPEG is an absolute path"),
        (info("a/../../evil.JPEG"), r"a/\.\./\.\./evil\.JPEG is an absolute path or holds '\.\.'"),
        (info("../" * 60 + "evil.JPEG"), r"evil\.JPEG is an absolute path or holds '\.\.'"),
    ],
)
def test_members_that_are_no_image_of_the_archive_are_refused(
    tmp_path: Path, member: tarfile.TarInfo, message: str
) -> None:
    refused(tmp_path, packed([info("good.JPEG", size=3), member]), message)


def test_a_name_that_appears_twice_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, tar([*IMAGES, IMAGES[1]]), rf"it holds {IMAGES[1][0]} twice")


@pytest.mark.parametrize("record", [b"99 path=a\n", b"path=a\n", b"0 path=a\n", b"8 path=a", b"x"])
def test_an_unreadable_pax_record_is_refused(tmp_path: Path, record: bytes) -> None:
    pax = info("records", tarfile.XHDTYPE, size=len(record)).tobuf(tarfile.USTAR_FORMAT)
    data = pax + record.ljust(512, b"\0") + tar(IMAGES)
    refused(tmp_path, data, "a pax record at byte 512")


def test_an_absurd_extension_is_refused_before_it_is_read(tmp_path: Path) -> None:
    long_name = info("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=5 << 30)
    header = long_name.tobuf(tarfile.GNU_FORMAT)
    refused(tmp_path, header + tar(IMAGES), "a name of 5,368,709,120 bytes")


def test_random_damage_is_refused_in_one_line_or_leaves_every_range_inside(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    long = [info("f/" * 80 + f"{n}.JPEG", size=100) for n in range(3)]
    wholes = [packed(long, form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    refusals = 0
    for _ in range(300):
        data = bytearray(wholes[rng.integers(2)])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            found = tars.members(written(tmp_path, bytes(data)), "it")
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:
            assert all(row["offset"] + row["size"] <= len(data) for row in found.to_pylist())
    assert refusals > 50


@pytest.mark.parametrize("size", [b"-0000001000", b"-0000002000", b"+0000000003", b"0o17", b"1_0"])
def test_size_that_is_no_octal_number_is_refused(tmp_path: Path, size: bytes) -> None:
    """A negative one led back to the same header, for ever."""
    header = bytearray(info("a.JPEG").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    refused(tmp_path, bytes(header) + tar(IMAGES), "no valid member at byte 0 .*not octal")


def with_records(records: bytes) -> bytes:
    pax = info("records", tarfile.XHDTYPE, size=len(records)).tobuf(tarfile.USTAR_FORMAT)
    return pax + records + bytes(-len(records) % 512) + tar(IMAGES)


def test_numbers_of_thousands_of_digits_are_refused(tmp_path: Path) -> None:
    long = b"9" * 5000
    refused(tmp_path, with_records(b"5011 size=" + long + b"\n"), "a pax record says size 99")
    refused(tmp_path, with_records(long + b" path=a\n"), "a pax record at byte 512")


def test_hundred_thousand_records_are_read_in_one_pass(tmp_path: Path) -> None:
    """Each was once cut off by a copy of all that follows: time grew with the square."""
    found = tars.members(written(tmp_path, with_records(b"7 a=bc\n" * 100_000)), "it")
    assert found["name"].to_pylist() == [name for name, _ in IMAGES]


def test_folder_hides_no_image_whatever_its_size_says(tmp_path: Path) -> None:
    folder = info("folder", tarfile.DIRTYPE, size=512).tobuf(tarfile.USTAR_FORMAT)
    path = written(tmp_path, folder + tar(IMAGES))
    assert tars.members(path, "it")["name"].to_pylist() == [name for name, _ in by_tarfile(path)]


def test_file_named_as_a_folder_is_refused_instead_of_lost(tmp_path: Path) -> None:
    refused(tmp_path, packed([info("a.JPEG", size=3), info("b/", size=3)]), "a folder with data")
