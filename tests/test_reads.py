"""pipelines/reads.py: the raw pictures of a shard, fetched ahead."""

import csv
import hashlib
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drawn import A, imagefolder
from drawn_layouts import hugging_face, parquet, train_row

from alexnet.errors import UserError
from pipelines import reads, sources, storage

KIB, MIB = 1 << 10, 1 << 20
Row = dict[str, Any]


def row(source: str, offset: int, size: int | None, name: str = "") -> Row:
    return {"source": source, "offset": offset, "size": size, "name": name}


def table(rows: list[Row]) -> pa.Table:
    columns = [("source", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
    return pa.Table.from_pylist(rows, schema=pa.schema(columns))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.fixture
def container(tmp_path: Path) -> bytes:
    """20 MiB of noise in RAW/c.tar."""
    data = np.random.default_rng(0).bytes(20 * MIB)
    (tmp_path / "c.tar").write_bytes(data)
    return data


def test_pictures_come_in_the_order_of_the_source_with_their_positions(
    tmp_path: Path, container: bytes
) -> None:
    rng = random.Random(0)
    offsets = sorted(rng.sample(range(0, 6 * MIB, KIB), 300))  # some overlap
    rows = [row("c.tar", offset, rng.randrange(5 * KIB)) for offset in offsets]
    rng.shuffle(rows)
    (tmp_path / "b.tar").write_bytes(b"0123456789")
    rows += [row("b.tar", 4, 3), row("b.tar", 9, 0)]
    reader = reads.Reader(str(tmp_path), rows)
    found = list(reader)
    by_place = sorted(range(len(rows)), key=lambda i: (rows[i]["source"], rows[i]["offset"]))
    assert [position for position, _ in found] == by_place
    assert found[0][1] == b"456" and found[1][1] == b""
    for position, data in found[2:]:
        start = rows[position]["offset"]
        assert data == container[start : start + rows[position]["size"]]
    assert (reader.requests, reader.read_bytes) == reads.cost(table(rows))
    assert 0 < reader.requests < len(rows) / 2
    assert not threads()


@pytest.mark.parametrize(
    ("places", "requests", "num_bytes"),
    [
        ([], 0, 0),
        ([(0, 100), (100 + 16 * KIB, 50)], 1, 150 + 16 * KIB),
        ([(0, 100), (101 + 16 * KIB, 50)], 2, 150),
        ([(0, 8 * MIB), (8 * MIB, 1)], 2, 8 * MIB + 1),
        ([(0, 3 * MIB), (3 * MIB, 3 * MIB), (6 * MIB, 2 * MIB), (8 * MIB, MIB)], 2, 9 * MIB),
        ([(0, 12 * MIB), (12 * MIB, 10), (13 * MIB, 10)], 3, 12 * MIB + 20),
    ],
)
def test_neighbours_share_a_read(
    tmp_path: Path,
    container: bytes,
    places: list[tuple[int, int]],
    requests: int,
    num_bytes: int,
) -> None:
    rows = [row("c.tar", offset, size) for offset, size in places[::-1]]
    reader = reads.Reader(str(tmp_path), rows)
    found = dict(reader)
    assert [len(found[position]) for position in range(len(rows))] == [r["size"] for r in rows]
    assert (reader.requests, reader.read_bytes) == (requests, num_bytes)
    assert reads.cost(table(rows)) == (requests, num_bytes)


def test_rows_of_parquet_files_are_read_by_row_group(tmp_path: Path) -> None:
    train = [train_row(A, number, 0) for number in range(40)]
    raw = str(hugging_face(tmp_path, train=train, row_group=5, size=1000))
    rows = sources.scan(raw, ["train"], partial=True).table.to_pylist()
    wanted = [rows[i] for i in (39, 2, 7, 3, 21)]
    reader = reads.Reader(raw, wanted)
    found = list(reader)
    assert [position for position, _ in found] == [1, 3, 2, 4, 0]
    for position, data in found:
        name = f"{wanted[position]['name'].removesuffix('.JPEG')}_{A}.JPEG"
        assert data == (name * 1000).encode()[:1000]
    whole = reads.Reader(raw, rows)
    assert len(list(whole)) == 40
    assert reader.read_bytes < whole.read_bytes
    assert reads.cost(table(wanted)) == (4, 0)
    assert reads.cost(table(rows)) == (2, 0)


def test_a_changed_parquet_file_is_told(tmp_path: Path) -> None:
    raw = str(hugging_face(tmp_path))
    rows = sources.scan(raw, ["train"]).table.to_pylist()
    path = tmp_path / "data/train-00000-of-00002.parquet"
    parquet(path, [train_row(A, 5, 0), train_row(A, 6, 0)])
    with pytest.raises(UserError, match=r"0-of-00002\.parquet has changed: row 0 was .* and is"):
        list(reads.Reader(raw, rows))
    parquet(path, [train_row(A, 5, 0)])
    with pytest.raises(UserError, match="has changed: row 1 is gone, it has 1 rows now"):
        list(reads.Reader(raw, rows))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"0-of-00002\.parquet is damaged"):
        list(reads.Reader(raw, rows))
    path.unlink()
    with pytest.raises(UserError, match=r"0-of-00002\.parquet has changed: it is gone"):
        list(reads.Reader(raw, rows))


def test_damaged_pages_of_a_parquet_file_are_told(tmp_path: Path) -> None:
    raw = str(hugging_face(tmp_path, size=5000))
    rows = sources.scan(raw, ["train"]).table.to_pylist()
    path = tmp_path / "data/train-00000-of-00002.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 2000 + data[2004:])
    with pytest.raises(UserError, match=r"0-of-00002\.parquet is damaged .*fetch it again"):
        list(reads.Reader(raw, rows))


def test_a_picture_that_a_parquet_file_does_not_hold_is_empty(tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    images = pa.table([[{"bytes": None, "path": f"{A}_1_{A}.JPEG"}]], schema=schema)
    pa.parquet.write_table(images, tmp_path / "a.parquet")
    rows = [row("a.parquet", 0, None, f"{A}_1.JPEG")]
    assert list(reads.Reader(str(tmp_path), rows)) == [(0, b"")]


def test_short_and_vanished_files_are_told_with_their_bytes(
    tmp_path: Path, container: bytes
) -> None:
    rows = [row("c.tar", 0, 10), row("c.tar", 19 * MIB, 10)]
    (tmp_path / "c.tar").write_bytes(container[: 19 * MIB + 4])
    reader = iter(reads.Reader(str(tmp_path), rows))
    assert next(reader) == (0, container[:10])
    with pytest.raises(
        UserError, match=r"c\.tar has changed: of bytes 19,922,944 to 19,922,954 only 4 are there"
    ):
        next(reader)
    (tmp_path / "c.tar").unlink()
    with pytest.raises(UserError, match=r"c\.tar has changed: it is gone"):
        list(reads.Reader(str(tmp_path), rows))
    assert not threads()


# Every layout


@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("layout", ["ilsvrc", "imagefolder", "kaggle", "hf_parquet"])
def test_tiny20_has_the_same_labels_and_bytes_in_every_layout(
    data_folder: Path, s3: str, layout: str, where: str
) -> None:
    raw = str(data_folder / "tiny20" / layout)
    if where == "s3":
        local, raw = raw, f"{s3}/tiny20/{layout}"
        for name, _ in storage.list_files(local):
            storage.write(f"{raw}/{name}", Path(local, name).read_bytes())
    with (data_folder / "tiny20" / "ground_truth.csv").open() as file:
        truth = {
            (line["split"], Path(line["file"]).stem, int(line["index"]), line["wnid"]): line[
                "sha256"
            ]
            for line in csv.DictReader(file)
        }
    rows = sources.scan(raw, ["train", "val"], partial=layout == "ilsvrc").table.to_pylist()
    random.Random(0).shuffle(rows)
    with reads.Reader(raw, rows) as reader:
        hashes = {position: hashlib.sha256(data).hexdigest() for position, data in reader}
    columns = ("split", "key", "label", "wnid")
    found = {tuple(r[name] for name in columns): hashes[i] for i, r in enumerate(rows)}
    assert found == truth


def test_an_empty_shard_and_an_empty_folder_cost_nothing(tmp_path: Path) -> None:
    assert list(reads.Reader(str(tmp_path), [])) == []
    imagefolder(tmp_path, {"a.jpg": b""})
    assert list(reads.Reader(str(tmp_path), [row("a.jpg", 0, 0)])) == [(0, b"")]
