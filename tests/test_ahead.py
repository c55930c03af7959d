"""pipelines/ahead.py and reads.py: threads that fetch before they are asked, and how they end."""

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from drawn import A
from drawn_layouts import parquet, train_row
from waiting import wait_until

from alexnet.errors import UserError
from pipelines import reads, storage
from pipelines.ahead import Ahead

KIB, MIB = 1 << 10, 1 << 20


def row(source: str, offset: int, size: int) -> dict[str, Any]:
    return {"source": source, "offset": offset, "size": size, "name": source}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


class Slow(http.server.BaseHTTPRequestHandler):
    """An object store whose every answer takes a while. Any key is its last letter, without end."""

    DELAY = 0.05  # seconds
    lock: ClassVar = threading.Lock()
    answers: ClassVar[int] = 0
    under_way: ClassVar[int] = 0
    most: ClassVar[int] = 0
    spent: ClassVar[float] = 0.0  # seconds, summed over the answers
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        started = time.monotonic()
        with Slow.lock:
            Slow.answers += 1
            Slow.under_way += 1
            Slow.most = max(Slow.most, Slow.under_way)
        time.sleep(self.DELAY)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        body = self.path[-1:].encode() * (int(last) - int(first) + 1)
        with Slow.lock:
            Slow.under_way -= 1
            Slow.spent += time.monotonic() - started
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def slow_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    storage.read("s3://bucket/raw/x", 0, 1)  # makes the client, which takes a second
    Slow.answers = Slow.under_way = Slow.most = 0
    Slow.spent = 0.0
    yield "s3://bucket/raw"
    server.shutdown()
    thread.join()
    server.server_close()


def test_many_requests_are_under_way_so_that_waits_do_not_add_up(slow_store: str) -> None:
    rows = [row(f"{number:03d}", 512, KIB) for number in range(160)]
    reader = reads.Reader(slow_store, rows)
    assert [data[:1].decode() for _, data in reader] == [f"{n:03d}"[-1] for n in range(160)]
    assert reader.requests == Slow.answers == 160
    assert 8 <= Slow.most <= 16
    assert reader.wait_seconds < Slow.spent / 3


def test_a_slow_consumer_waits_for_the_first_answer_only(slow_store: str) -> None:
    rows = [row(f"{number:03d}", 512, KIB) for number in range(16)]
    reader = reads.Reader(slow_store, rows)
    with reader:
        stream = iter(reader)
        next(stream)
        first = reader.wait_seconds
        wait_until(lambda: not threads())  # as decoding would take long enough: all is there
        assert len(list(stream)) == 15
    assert first > 0
    assert reader.wait_seconds - first < 15 * Slow.DELAY / 3


class SlowFile(Slow):
    """One file under every name."""

    data: ClassVar[bytes] = b""

    def do_HEAD(self) -> None:
        time.sleep(self.DELAY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()

    def do_GET(self) -> None:
        time.sleep(self.DELAY)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = self.data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_waiting_for_the_footers_of_parquet_files_is_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "x.parquet", [train_row(A, number, number) for number in range(4)])
    monkeypatch.setattr(SlowFile, "data", (tmp_path / "x.parquet").read_bytes())
    raw = [row("x.parquet", 0, KIB)]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowFile) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        storage.size("s3://bucket/x.parquet")  # makes the client
        reader = reads.Reader("s3://bucket", raw)
        reader._fetches()  # asks for the size and the footer
        assert reader.wait_seconds >= 2 * Slow.DELAY
        server.shutdown()
        thread.join()


def test_leaving_the_loop_ends_the_threads(
    slow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.ahead._JOIN_SECONDS", 120.0)
    rows = [row(f"{number:04d}", 512, MIB) for number in range(1000)]
    with pytest.raises(KeyboardInterrupt), reads.Reader(slow_store, rows) as reader:
        for position, _ in reader:
            assert threads()
            if position == 3:
                raise KeyboardInterrupt
    assert not threads()
    assert Slow.answers < 100  # 64 MiB ahead


def test_a_closed_iterator_ends_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.ahead._JOIN_SECONDS", 120.0)
    (tmp_path / "c.tar").write_bytes(bytes(MIB))
    rows = [row("c.tar", offset, 10) for offset in range(0, MIB, 64 * KIB)]
    stream = iter(reads.Reader(str(tmp_path), rows))
    next(stream)
    del stream
    assert not threads()


def test_what_is_held_is_bounded_unless_one_job_is_larger() -> None:
    lock = threading.Lock()
    held: dict[int, int] = {}
    most = []

    def work(job: int, room: Any) -> Iterator[list[int]]:
        for _ in range(3):
            if not room(job):
                return
            with lock:
                held[job] = held.get(job, 0) + job
                most.append(sum(held.values()))
            yield [job]

    jobs = [10, 20, 30, 500, 40, 25, 35, 15]
    ahead = Ahead(jobs, work, threads=8, limit=100)
    taken = []
    for item in ahead:
        taken.append(item)
        time.sleep(0.002)
        with lock:
            held[item] -= item
    assert taken == [job for job in jobs for _ in range(3)]
    assert max(most) <= 500 + 100
    assert sorted(most)[len(most) // 2] <= 100 + 40


def test_an_error_comes_in_its_turn() -> None:
    def work(job: int, room: Any) -> Iterator[list[int]]:
        assert room(1)
        if job == 5:
            raise UserError("five")
        yield [job]

    taken = []
    with pytest.raises(UserError, match="five"):
        for item in Ahead(range(10), work, threads=4, limit=100):
            taken.append(item)
    assert taken == [0, 1, 2, 3, 4]
    assert not threads()
