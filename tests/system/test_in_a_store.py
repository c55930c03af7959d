"""RAW and OUT in an S3 store: the same as on a disk, with few requests."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from drawn import archives_2010, class_folders, tar
from drawn_layouts import hugging_face, kaggle
from labelled_tars import timm

from alexnet.errors import UserError
from pipelines import reads, report, shards, sources, storage
from pipelines.inspect import status
from pipelines.sources import index, tars
from pipelines.verify import verify

ALL = ("train", "val", "test")


@pytest.fixture
def place(s3: str, tmp_path: Path) -> str:
    return f"{s3}/{tmp_path.name}"


def put(local: Path | str, place: str) -> str:
    """The folder in the store."""
    for name, _ in storage.list_files(str(local)):
        storage.write(f"{place}/{name}", Path(local, name).read_bytes())
    return place


def folders(place: Path) -> Path:
    names = [f"{split}/{c}/{c}{n}.jpg" for split in ALL[:2] for c in "abc" for n in (1, 2)]
    return Path(class_folders(place / "raw", {name: n for n, name in enumerate(names)}))


DRAWN: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "ilsvrc2010": (archives_2010, ALL),
    "imagefolder": (folders, ALL[:2]),
    "kaggle": (kaggle, ALL),
    "huggingface": (hugging_face, ALL),
    "webdataset": (timm, ALL[:2]),
}


@pytest.mark.parametrize("layout", ["ilsvrc2012", "shards", *DRAWN])
def test_every_layout_has_the_same_table_accounts_and_bytes_as_on_disk(
    layout, place, tmp_path, drawn_raw, drawn_shards
):
    raw, splits = {"ilsvrc2012": drawn_raw, "shards": drawn_shards}.get(layout, ""), ALL[:2]
    if not raw:
        draw, splits = DRAWN[layout]
        raw = str(draw(tmp_path))
    here, there = (sources.scan(uri, splits) for uri in (raw, put(raw, place)))
    assert (there.layout, there.announced) == (layout, here.announced)
    assert there.table.equals(here.table) and there.accounts == here.accounts
    rows = here.table.to_pylist()
    assert [*reads.Reader(place, rows)] == [*reads.Reader(raw, rows)]


def test_empty_folders_are_seen_by_their_markers(place):
    files = [f"{split}/{c}/{c}{n}.jpg" for split in ALL[:2] for c in "abc" for n in (1, 2)]
    for name in (*files, "train/a/", "train/d/", "train/.git/x.jpg", "train/.git/y.jpg"):
        storage.write(f"{place}/{name}", b"" if name.endswith("/") else b"x")
    with pytest.raises(UserError, match=r"train/d \(it is empty\)"):
        sources.scan(place, ALL[:2])
    accounts = sources.scan(place, ALL[:2], partial=True).accounts
    assert (accounts.images, accounts.ignored) == (len(files), {"hidden": 1})
    assert accounts.left_out == {"train/d": "an empty class folder"}


def test_inner_tars_are_read_at_the_same_time(place, monkeypatch):
    uri, read = f"{place}/outer.tar", storage.read
    storage.write(uri, tar([(f"n{n}.tar", tar([("x.JPEG", b"1")])) for n in range(4)]))
    together = threading.Barrier(4, timeout=120)  # breaks unless four reads are under way

    def waiting(uri: str, offset: int = 0, length: int | None = None) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            together.wait()
        return read(uri, offset, length)

    monkeypatch.setattr(storage, "read", waiting)
    assert index.nested(uri)["outer"].to_pylist() == ["n0.tar", "n1.tar", "n2.tar", "n3.tar"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Address of all that is listed or read from now on, and the length where one is given."""
    asked: list[tuple[str, int]] = []

    def noted(real: Callable[..., object]) -> Callable[..., object]:
        return lambda uri, *part: asked.append((uri, sum(part[1:]))) or real(uri, *part)

    for name in ("list_files", "read"):
        monkeypatch.setattr(storage, name, noted(getattr(storage, name)))
    return asked


def test_close_headers_cost_few_requests_and_distant_ones_no_images(place, asked):
    large = tar([(f"{n}.JPEG", bytes(1 << 20)) for n in range(8)])
    storage.write(f"{place}/small.tar", tar([(f"{n}.JPEG", bytes(3000)) for n in range(600)]))
    storage.write(f"{place}/large.tar", large)
    assert len(tars.members(f"{place}/small.tar", "it")) == 600
    assert len(asked) < 12  # 600 headers; pieces of 64 KiB, 128 KiB, …
    asked.clear()
    assert len(tars.members(f"{place}/large.tar", "it")) == 8
    assert len(asked) <= 10
    assert 0 < sum(length for _, length in asked) < len(large) / 8


def test_status_asks_for_one_listing_and_footers_only(place, copy, asked):
    for name in ("manifest.json", "_meta/val-000001.parquet", "val-000001.tar"):
        (copy / name).unlink()
    put(copy, place)
    here = status(str(copy))
    asked.clear()
    there = status(place)
    timed = ("seconds_since_last_shard", "images_per_second", "eta_seconds")
    assert here | {"out": place} | {name: there[name] for name in timed} == there
    uris = [uri for uri, _ in asked]
    assert uris.count(place) == 1 and len(uris) <= 2 + 2 * 5
    assert not [uri for uri in uris if uri.endswith(".tar")]


def test_a_set_is_read_reported_and_verified_as_on_disk(place, copy, drawn_raw):
    put(copy, place)
    here, there = report.report(str(copy)), report.report(place)
    assert storage.read(there) == storage.read(here)
    assert shards.load_index(place, "val").equals(shards.load_index(str(copy), "val"))
    assert verify(place).problems == ()
    assert verify(place, full=True, raw=drawn_raw).problems == ()
    data = bytearray((copy / "val-000000.tar").read_bytes())
    data[700] ^= 1
    storage.write(f"{place}/val-000000.tar", bytes(data))
    storage.delete(f"{place}/train-000000.tar")
    assert verify(place).bad_files == ("train-000000.tar",)
    assert verify(place, full=True).bad_files == ("train-000000.tar", "val-000000.tar")
