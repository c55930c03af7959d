"""RAW and OUT in an S3 store: the same as on a disk, with few requests."""

import csv
import hashlib
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from drawn import archives_2010, tar
from drawn_layouts import hugging_face, kaggle
from labelled_tars import timm

from alexnet.errors import UserError
from pipelines import reads, report, shards, sources, storage
from pipelines.inspect import status
from pipelines.sources import index, official, tars
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


DRAWN: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "ilsvrc2010": (archives_2010, ALL),
    "kaggle": (kaggle, ALL),
    "huggingface": (hugging_face, ALL),
    "webdataset": (timm, ALL[:2]),
}


@pytest.mark.parametrize("layout", ["ilsvrc2012", "shards", *DRAWN])
def test_every_layout_has_the_same_table_accounts_and_bytes_as_on_disk(
    layout: str, place: str, tmp_path: Path, drawn_raw: str, drawn_shards: str
) -> None:
    raw, splits = {"ilsvrc2012": drawn_raw, "shards": drawn_shards}.get(layout, ""), ALL[:2]
    if not raw:
        draw, splits = DRAWN[layout]
        raw = str(draw(tmp_path))
    here, there = (sources.scan(uri, splits) for uri in (raw, put(raw, place)))
    assert (there.layout, there.announced) == (layout, here.announced)
    assert there.table.equals(here.table) and there.accounts == here.accounts
    rows = here.table.to_pylist()
    assert [*reads.Reader(place, rows)] == [*reads.Reader(raw, rows)]


@pytest.mark.parametrize("layout", ["ilsvrc", "imagefolder", "kaggle", "hf_parquet"])
def test_tiny20_has_the_same_labels_and_bytes_in_every_layout(
    data_folder: Path, place: str, layout: str
) -> None:
    raw = put(data_folder / "tiny20" / layout, place)
    with (data_folder / "tiny20" / "ground_truth.csv").open() as file:
        truth = {
            (row["split"], Path(row["file"]).stem, int(row["index"]), row["wnid"]): row["sha256"]
            for row in csv.DictReader(file)
        }
    rows = sources.scan(raw, ["train", "val"], partial=layout == "ilsvrc").table.to_pylist()
    random.Random(0).shuffle(rows)
    hashes = {number: hashlib.sha256(data).hexdigest() for number, data in reads.Reader(raw, rows)}
    columns = ("split", "key", "label", "wnid")
    assert {tuple(r[name] for name in columns): hashes[i] for i, r in enumerate(rows)} == truth


def test_empty_folders_are_seen_by_their_markers(place: str) -> None:
    files = [f"{split}/{c}/{c}{n}.jpg" for split in ALL[:2] for c in "abc" for n in (1, 2)]
    for name in (*files, "train/a/", "train/d/", "train/.git/x.jpg", "train/.git/y.jpg"):
        storage.write(f"{place}/{name}", b"" if name.endswith("/") else b"x")
    with pytest.raises(UserError, match=r"train/d \(it is empty\)"):
        sources.scan(place, ALL[:2])
    accounts = sources.scan(place, ALL[:2], partial=True).accounts
    assert (accounts.images, accounts.ignored) == (len(files), {"hidden": 1})
    assert accounts.left_out == {"train/d": "an empty class folder"}


def test_md5_sums_are_read_and_compared(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, data = "ILSVRC2012_img_val.tar", bytes(range(256)) * 1000
    digest = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(official, "ARCHIVES", {name: official.Published(digest, len(data))})
    monkeypatch.setattr(official, "_PIECE", 10_000)
    storage.write(f"{place}/{name}", data)
    (line,) = official.verify_md5(place, {name: len(data)})
    assert line == f"{name}: MD5 {digest} as published (256,000 bytes)"


def test_inner_tars_are_read_at_the_same_time(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, read = f"{place}/outer.tar", storage.read
    storage.write(uri, tar([(f"n{n}.tar", tar([("x.JPEG", b"1")])) for n in range(4)]))
    together = threading.Barrier(4, timeout=120)  # breaks unless four reads are under way

    def waiting(uri: str, offset: int = 0, length: int | None = None) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            together.wait()
        return read(uri, offset, length)

    monkeypatch.setattr(storage, "read", waiting)
    assert index.nested(uri)["outer"].to_pylist() == ["n0.tar", "n1.tar", "n2.tar", "n3.tar"]


def test_close_headers_cost_few_requests_and_distant_ones_no_images(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read = storage.read

    def counted(uri: str, offset: int = 0, length: int | None = None) -> bytes:
        sizes.append(length or 0)
        return read(uri, offset, length)

    large = tar([(f"{n}.JPEG", bytes(1 << 20)) for n in range(8)])
    storage.write(f"{place}/small.tar", tar([(f"{n}.JPEG", bytes(3000)) for n in range(600)]))
    storage.write(f"{place}/large.tar", large)
    monkeypatch.setattr(storage, "read", counted)
    assert len(tars.members(f"{place}/small.tar", "it")) == 600
    assert len(sizes) < 12  # 600 headers; pieces of 64 KiB, 128 KiB, …
    sizes.clear()
    assert len(tars.members(f"{place}/large.tar", "it")) == 8
    assert len(sizes) <= 10
    assert sum(sizes) < len(large) / 8


def test_a_report_is_the_same_page(place: str, copy: Path) -> None:
    put(copy, place)
    here, there = report.report(str(copy)), report.report(place)
    assert storage.read(there) == storage.read(here)


def test_status_asks_for_one_listing_and_footers_only(
    place: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "manifest.json").unlink()
    for name in ("_meta/val-000001.parquet", "val-000001.tar"):
        (copy / name).unlink()
    put(copy, place)
    here = status(str(copy))
    asked: list[str] = []

    def noted(real: Callable[..., object]) -> Callable[..., object]:
        return lambda uri, *args: asked.append(uri) or real(uri, *args)

    for name in ("list_files", "read"):
        monkeypatch.setattr(storage, name, noted(getattr(storage, name)))
    there = status(place)
    timed = ("seconds_since_last_shard", "images_per_second", "eta_seconds")
    assert here | {"out": place} | {name: there[name] for name in timed} == there
    assert asked.count(place) == 1 and len(asked) <= 2 + 2 * 5
    assert not [uri for uri in asked if uri.endswith(".tar")]


def test_a_set_is_verified_as_on_disk(place: str, copy: Path, drawn_raw: str) -> None:
    put(copy, place)
    assert verify(place).problems == ()
    assert verify(place, full=True, raw=drawn_raw).problems == ()
    data = bytearray((copy / "val-000000.tar").read_bytes())
    data[700] ^= 1
    storage.write(f"{place}/val-000000.tar", bytes(data))
    storage.delete(f"{place}/train-000000.tar")
    assert verify(place).bad_files == ("train-000000.tar",)
    assert verify(place, full=True).bad_files == ("train-000000.tar", "val-000000.tar")
    assert shards.load_index(place, "val").equals(shards.load_index(str(copy), "val"))
