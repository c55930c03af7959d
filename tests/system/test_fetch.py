"""pipelines/fetch.py: what lies in RAW afterwards, and what is refused before and after."""

import errno
import fcntl
import hashlib
import os
import tarfile
from pathlib import Path

import pytest
from archive_server import (
    FILE,
    IMAGES,
    Server,
    images_in,
    packed,
    part_of,
    publish,
    refusal,
    run,
)

from alexnet.errors import UserError
from pipelines import fetch, sources


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "raw"


def test_the_images_alone_lie_in_class_folders_as_the_builder_takes_them(archives, tmp_path):
    new, empty = tmp_path / "new" / "raw", tmp_path / "empty" / "raw"
    empty.mkdir(parents=True)
    for raw in (new, empty):
        assert run(archives, raw) == f"{raw}: fetched imagenette 160, 3 train + 2 val images"
        assert images_in(raw) == IMAGES
        assert [path.name for path in raw.parent.iterdir()] == ["raw"]
    source = sources.scan(str(new), ["train", "val"])
    assert (source.layout, source.count("train"), source.count("val")) == ("imagefolder", 3, 2)
    assert source.wnids == ("n01440764", "n03888257")
    assert source.class_names == ("tench, Tinca tinca", "parachute, chute")
    assert source.notes == ()


def test_a_second_run_asks_nobody_and_another_size_is_not_mixed_in(archives, raw):
    run(archives, raw)
    asked = len(archives.seen)
    assert run(archives, raw) == f"{raw} holds imagenette 160 already"
    with pytest.raises(UserError, match=r"holds imagenette 160; choose another --to"):
        fetch.fetch("imagenette", str(raw), "320", archives.url)
    assert len(archives.seen) == asked


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_image_that_is_no_plain_file_is_refused(archives, raw, monkeypatch, kind):
    name = "imagenette2-160/train/n01440764/n01440764_1.JPEG"
    publish(archives, packed({name: link(name, kind)}), monkeypatch)
    assert f"{name} is no plain file" in refusal(archives, raw)


def test_nothing_is_written_outside_of_raw(archives, raw, tmp_path, monkeypatch):
    names = [
        "../train/n01440764/out.JPEG",
        "x/train/n01440764/../../../../out.JPEG",
        "x/train/n01440764/..",
        "/x/train/n01440764/out.JPEG",
        f"{tmp_path}/out.JPEG",
        "x/train/n01440764/deeper/out.JPEG",
        "x/train/n01440764/.hidden.JPEG",
        "x/test/n01440764/out.JPEG",
        "x/train/out/out.JPEG",
        "x/train/n01440764/out.JPEG.sh",
    ]
    evil = dict.fromkeys(names, b"out") | {"x/train": link("x/train", tarfile.SYMTYPE)}
    good = {f"./x/{name}": data for name, data in IMAGES.items()}
    publish(archives, packed(evil | good), monkeypatch)
    run(archives, raw)
    assert images_in(raw) == IMAGES
    names = ["LOC_synset_mapping.txt", "fetch.json", "train", "val"]
    assert sorted(path.name for path in raw.iterdir()) == names
    assert list(tmp_path.rglob("out*")) == []


def test_a_run_killed_while_extracting_leaves_no_raw_and_is_repeated(archives, raw, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run(archives, raw)
    assert not raw.exists()
    run(archives, raw)
    assert len(archives.seen) == 1  # the archive was whole
    assert images_in(raw) == IMAGES
    assert list(raw.parent.iterdir()) == [raw]


def test_a_folder_with_anything_else_is_left_alone(archives, raw):
    raw.mkdir(parents=True)
    (raw / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds thesis.txt; choose another --to"):
        run(archives, raw)
    assert [path.name for path in raw.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="Not a directory"):
        run(archives, raw / "thesis.txt")
    assert archives.seen == []


def test_two_at_once_are_not_let_into_one_folder_where_there_are_locks(archives, raw, monkeypatch):
    raw.parent.mkdir()
    with part_of(raw).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process fetches it" in refusal(archives, raw)

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    run(archives, raw)
    assert images_in(raw) == IMAGES


def test_a_disk_that_is_too_small_is_told_before_the_download(archives, raw, monkeypatch):
    monkeypatch.setitem(fetch.SIZES, "160", fetch.Archive(FILE, 10**15, "0" * 32))
    assert "GB free, imagenette2-160.tgz needs 2000000.00 GB" in refusal(archives, raw)
    assert archives.seen == []


@pytest.mark.parametrize(
    ("ranges", "cuts", "statuses", "seen"),
    [
        (True, [700, 100], [], [(None, 200), ("bytes=700-", 206), ("bytes=800-", 206)]),
        (False, [900], [], [(None, 200), ("bytes=900-", 200)]),
        (True, [], [500, 503, 200], [(None, 500), (None, 503), (None, 200)]),
        (True, [], [429, 408, 200], [(None, 429), (None, 408), (None, 200)]),
        (True, [900], [200, 416], [(None, 200), ("bytes=900-", 416), (None, 200)]),
    ],
    ids=["breaks off", "ranges are ignored", "server errs", "too many", "file is shorter by now"],
)
def test_what_broke_off_is_continued_and_what_may_pass_is_tried_again(
    archives, raw, ranges, cuts, statuses, seen
):
    archives.ranges, archives.cut_after, archives.statuses = ranges, cuts.copy(), statuses.copy()
    run(archives, raw)
    assert archives.seen == seen
    assert images_in(raw) == IMAGES


def test_a_later_run_goes_on_and_a_file_that_changed_meanwhile_is_fetched_anew(
    archives, raw, monkeypatch
):
    monkeypatch.setattr(fetch, "_TRIES", 1)
    archives.cut_after = [900]
    assert "broke off" in refusal(archives, raw)
    assert part_of(raw).read_bytes() == archives.data[:900]
    part_of(raw).write_bytes(bytes(900))  # as another version began
    assert "has MD5" in refusal(archives, raw)
    run(archives, raw)
    assert [asked for asked, _ in archives.seen] == [None, "bytes=900-", None]
    assert images_in(raw) == IMAGES


@pytest.mark.parametrize(
    ("statuses", "end"),
    [
        ([500] * 50, "answered 500 Internal Server Error, 5 times in a row; check the network"),
        ([404], "answered 404 Not Found; check --mirror"),
    ],
)
def test_a_server_that_only_has_errors_is_one_line(archives, raw, statuses, end):
    archives.statuses = statuses
    assert refusal(archives, raw).startswith(f"{archives.url}/{FILE} {end}")


def test_a_host_that_cannot_be_reached_is_one_line(archives, raw):
    with Server() as closed:
        url = closed.url
    with pytest.raises(UserError, match=r"cannot be reached \(Connection refused\), 5 times"):
        fetch.fetch("imagenette", str(raw), "160", url)


def test_other_files_are_refused_by_size_at_once_and_by_md5_and_not_kept(archives, raw):
    good, size = archives.data, len(archives.data)
    archives.data += b"x"
    line = refusal(archives, raw)
    assert f"has {size + 1:,} bytes, the published file {size:,}" in line
    assert part_of(raw).stat().st_size == 0
    archives.data = good[:-1] + bytes([good[-1] ^ 1])
    line = refusal(archives, raw)
    assert all(hashlib.md5(data).hexdigest() in line for data in (good, archives.data))
    assert part_of(raw).stat().st_size == 0


@pytest.mark.parametrize(
    ("name", "to", "size", "mirror", "line"),
    [
        ("imagewoof", "raw", "160", None, "fetch imagewoof: not known; choose imagenette"),
        ("imagenette", "raw", "224", None, "--size 224: choose 160, 320, full"),
        ("imagenette", "s3://bucket/raw", "160", None, "--to s3://bucket/raw: give a local folder"),
        ("imagenette", "/", "160", None, "--to / is a mount point; choose a folder in it"),
        ("imagenette", "raw", "160", "file:///etc", "--mirror file:///etc: give a URL such as"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(name, to, size, mirror, line):
    with pytest.raises(UserError) as refused:
        fetch.fetch(name, to, size, mirror)
    assert str(refused.value).startswith(line)
