"""pipelines/reads.py: the raw images of a shard, fetched ahead; and how its threads end."""

import http.server
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from drawn import A, imagefolder
from drawn_layouts import IMAGE, hugging_face, parquet, train_row
from waiting import wait_until

from alexnet.errors import UserError
from pipelines import reads, sources, storage

KIB, MIB = 1 << 10, 1 << 20
Row = dict[str, Any]


def row(source: str, offset: int, size: int | None, name: str = "") -> Row:
    return {"source": source, "offset": offset, "size": size, "name": name}


def table(rows: list[Row]) -> pa.Table:
    columns = [("source", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
    return pa.Table.from_pylist(rows, schema=pa.schema(columns))


@pytest.fixture
def container(tmp_path: Path) -> bytes:
    """20 MiB of noise in RAW/c.tar."""
    data = np.random.default_rng(0).bytes(20 * MIB)
    (tmp_path / "c.tar").write_bytes(data)
    return data


def test_images_come_in_the_order_of_the_source_with_their_positions(tmp_path, container):
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
def test_neighbours_share_a_read(tmp_path, container, places, requests, num_bytes):
    rows = [row("c.tar", offset, size) for offset, size in places[::-1]]
    reader = reads.Reader(str(tmp_path), rows)
    found = dict(reader)
    assert [len(found[position]) for position in range(len(rows))] == [r["size"] for r in rows]
    assert (reader.requests, reader.read_bytes) == (requests, num_bytes)
    assert reads.cost(table(rows)) == (requests, num_bytes)


def test_rows_of_parquet_files_are_read_by_row_group(tmp_path):
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


def test_a_changed_parquet_file_is_told(tmp_path):
    raw = str(hugging_face(tmp_path, size=5000))
    rows = sources.scan(raw, ["train"]).table.to_pylist()
    path = tmp_path / "data/train-00000-of-00002.parquet"
    data = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=rf"0-of-00002\.parquet {message}"):
            list(reads.Reader(raw, rows))

    path.write_bytes(data[:4] + b"\xff" * 2000 + data[2004:])  # in its pages
    refused("is damaged .*fetch it again")
    path.write_bytes(data[:-20])
    refused("is damaged")
    parquet(path, [train_row(A, 5, 0), train_row(A, 6, 0)])
    refused("has changed: row 0 was .* and is")
    parquet(path, [train_row(A, 5, 0)])
    refused("has changed: row 1 is gone, it has 1 rows now")
    path.unlink()
    refused("has changed: it is gone")


def test_a_image_that_a_parquet_file_does_not_hold_is_empty(tmp_path):
    images = pa.array([{"bytes": None, "path": f"{A}_1_{A}.JPEG"}], IMAGE)
    pa.parquet.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    rows = [row("a.parquet", 0, None, f"{A}_1.JPEG")]
    assert list(reads.Reader(str(tmp_path), rows)) == [(0, b"")]


def test_short_and_vanished_files_are_told_with_their_bytes(tmp_path, container):
    rows = [row("c.tar", 0, 10), row("c.tar", 19 * MIB, 10)]
    (tmp_path / "c.tar").write_bytes(container[: 19 * MIB + 4])
    with pytest.raises(UserError, match=r"c\.tar has changed: .* 19,922,954 only 4 are there"):
        list(reads.Reader(str(tmp_path), rows))
    (tmp_path / "c.tar").unlink()
    with pytest.raises(UserError, match=r"c\.tar has changed: it is gone"):
        list(reads.Reader(str(tmp_path), rows))


def test_an_empty_shard_and_an_empty_folder_cost_nothing(tmp_path):
    assert list(reads.Reader(str(tmp_path), [])) == []
    imagefolder(tmp_path, {"a.jpg": b""})
    assert list(reads.Reader(str(tmp_path), [row("a.jpg", 0, 0)])) == [(0, b"")]


# Ahead of the consumer


class Slow(http.server.BaseHTTPRequestHandler):
    """An object store whose every answer takes a while, or until so many are asked for at once. Any
    key holds its own last letter, without end."""

    DELAY = 0.05  # seconds
    lock: ClassVar = threading.Lock()
    together: ClassVar[threading.Barrier | None] = None
    answered: ClassVar[set[str]] = set()  # keys: one may be asked for again
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if Slow.together:
            Slow.together.wait()
        else:
            time.sleep(self.DELAY)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        with Slow.lock:  # before the client can go on
            Slow.answered.add(self.path)
        self.wfile.write(self.path[-1:].encode() * (last - first + 1))

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def slow_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    storage.read("s3://bucket/raw/x", 0, 1)  # makes the client, which takes a second
    Slow.answered.clear()
    yield "s3://bucket/raw"
    server.shutdown()
    thread.join()
    server.server_close()


def test_sixteen_requests_are_under_way_at_once(slow_store, monkeypatch):
    monkeypatch.setattr(Slow, "together", threading.Barrier(16, timeout=120))  # or it breaks
    rows = [row(f"{number:03d}", 512, KIB) for number in range(160)]
    reader = reads.Reader(slow_store, rows)
    assert [data[:1].decode() for _, data in reader] == [f"{n:03d}"[-1] for n in range(160)]
    assert reader.requests == 160


def test_a_slow_consumer_waits_for_the_first_answer_only(slow_store, monkeypatch):
    rows = [row(f"{number:03d}", 512, KIB) for number in range(16)]
    with reads.Reader(slow_store, rows) as reader:
        stream = iter(reader)
        next(stream)
        assert reader.wait_seconds > 0
        wait_until(lambda: len(Slow.answered) == 16)
        monkeypatch.setattr(storage, "read", lambda *_: pytest.fail("nothing was read ahead"))
        assert len(list(stream)) == 15


def test_no_more_than_64_mib_are_read_ahead_and_leaving_the_loop_ends_the_threads(slow_store):
    rows = [row(f"{number:04d}", 512, MIB) for number in range(1000)]
    with pytest.raises(KeyboardInterrupt), reads.Reader(slow_store, rows) as reader:
        for position, _ in reader:
            if position == 3:
                wait_until(lambda: len(Slow.answered) >= 3 + 64)
                time.sleep(5 * Slow.DELAY)
                raise KeyboardInterrupt
    assert len(Slow.answered) == 3 + 64
    wait_until(lambda: not any(thread.name.startswith("ahead") for thread in threading.enumerate()))


def test_one_image_larger_than_that_is_read_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(reads, "_MAX_AHEAD", 100)
    monkeypatch.setattr(reads, "_MAX_READ", 10)
    (tmp_path / "c.tar").write_bytes(bytes(range(250)) * 4)
    rows = [row("c.tar", 0, 90), row("c.tar", 90, 500), row("c.tar", 590, 10)]
    assert [len(data) for _, data in reads.Reader(str(tmp_path), rows)] == [90, 500, 10]
