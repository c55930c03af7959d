"""A bad store: an HTTP proxy before a real S3 server that injects faults into its requests.

It passes requests on with the header Host that they were signed with, so the server checks their
signatures. Whether and how a request fails is drawn from the seed, what it asks for and how often
that was asked before: the same in every run, whatever the order in which threads ask.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

# What can happen to a request, as the table of survivals tells it.
ANYWHERE = (
    "503 SlowDown",
    "500 InternalError",
    "502 with a page",
    "reset before",
    "delay",
    "twice",
)
OF_READS = ("answer cut", "reset in the answer")
OF_WRITES = ("upload cut", "done, then reset", "done, then 500")
OF_LISTS = ("stale list", "page for a list")
FLIPS = ("bit flipped in the answer", "bit flipped in the upload")
FAULTS = (*ANYWHERE, *OF_READS, *OF_WRITES, *OF_LISTS)
SILENT = "no answer"  # until the proxy is closed

_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}
_PAGE = b"<html><body>We will be back soon"
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>%s</Message></Error>'
_LONGEST_DELAY = 0.2
# What differs between runs: the bucket, endings of checkpoints.
_CHANCE = re.compile(r"^/[^/?]*|(?<=-)[0-9a-f]{6}(?=/)")


@dataclass(frozen=True)
class Weather:
    """Which share of the requests fails, and how; none by default."""

    seed: int = 0
    rate: float = 0.0
    faults: Collection[str] = FAULTS
    begins: int = 0  # after so many requests


@dataclass(frozen=True)
class Request:
    method: str
    target: str  # path and query
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def is_list(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.target

    def possible(self, faults: Collection[str]) -> list[str]:
        """Those of `faults` that can happen to it."""
        fitting = {*ANYWHERE, SILENT}
        if self.method == "GET":
            fitting |= {*OF_READS}
        if self.method in ("PUT", "DELETE"):
            fitting |= {*OF_WRITES} - ({"upload cut"} if len(self.body) < 2 else set())
        if self.is_list:
            fitting |= {*OF_LISTS}
        elif self.method == "GET":
            fitting.add("bit flipped in the answer")
        if self.body:
            fitting.add("bit flipped in the upload")
        return [fault for fault in faults if fault in fitting]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


# What a store of another make does with a request: another one passed on, or an answer of its own.
Habit = Callable[[Request], Request | Answer]


@dataclass
class Seen:
    """What came by since `Proxy.fair`."""

    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)


class Proxy(http.server.ThreadingHTTPServer):
    """Before the server at `endpoint`; `weather` and `habit` may be changed at any time."""

    request_queue_size = 64

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.closing = threading.Event()
        self._server = urlsplit(endpoint).netloc
        self._lock = threading.Lock()
        self.fair()

    def fair(self) -> Seen:
        """From now on nothing fails. Returns what was seen since the last call."""
        with self._lock:
            seen, self.seen = getattr(self, "seen", Seen()), Seen()
            self.weather = Weather()
            self.habit: Habit = lambda request: request
            self._asked: Counter[tuple[str, str, str]] = Counter()
            self._lists: dict[str, list[Answer]] = {}
            return seen

    def foul(self, weather: Weather) -> None:
        """From now on requests fail."""
        self.fair()
        self.weather = weather

    def fault_of(self, request: Request) -> tuple[str, random.Random]:
        """What happens to a request, "" for nothing, and where the details are drawn from."""
        weather = self.weather
        ranges = "".join(value for name, value in request.headers if name.lower() == "range")
        asked = (request.method, _CHANCE.sub("", request.target), ranges)
        with self._lock:
            self.seen.requests += 1
            early = self.seen.requests <= weather.begins
            self._asked[asked] += 1
            draw = random.Random(f"{weather.seed} {asked} {self._asked[asked]}")
        possible = request.possible(weather.faults)
        if early or not possible or draw.random() >= weather.rate:
            return "", draw
        return draw.choice(possible), draw

    def count(self, fault: str) -> None:
        with self._lock:
            self.seen.faults[fault] += 1

    def earlier(self, request: Request, now: Answer, draw: random.Random) -> Answer:
        """A listing as it was some time ago; `now` where there was none before."""
        with self._lock:
            before = self._lists.setdefault(request.target, [])
            others = [answer for answer in before if answer.body != now.body]
            before.append(now)
            return draw.choice(others) if others else now

    def ask(self, request: Request, cut: int | None = None) -> Answer:
        """The server's answer; after `cut` bytes of the body the connection to it ends."""
        connection = http.client.HTTPConnection(self._server, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(
                request.method, request.target, skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers:
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            if request.body or request.method == "PUT":
                connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body[:cut] or None)
            if cut is not None:
                return Answer(0, [], b"")
            answer = connection.getresponse()
            return Answer(answer.status, answer.getheaders(), answer.read())

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news, nor is a server that is being stopped."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, list(self.headers.items()), body)
        passed = self.server.habit(request)
        if isinstance(passed, Answer):
            self._send(passed)
            return
        fault, draw = self.server.fault_of(passed)
        answer = self._answer(passed, fault, draw)
        if answer is None:
            self._reset()
        elif fault == "answer cut" or fault == "reset in the answer":
            self._send(answer, draw.randrange(max(1, len(answer.body))))
            self.close_connection = True
            if fault == "reset in the answer":
                self._reset()
        else:
            self._send(answer)

    def _answer(self, request: Request, fault: str, draw: random.Random) -> Answer | None:
        """None for a connection that is reset."""
        if fault == "stale list":
            now = self.server.ask(request)
            found = self.server.earlier(request, now, draw)
            if found is not now:
                self.server.count(fault)
            return found
        if fault:
            self.server.count(fault)
        if fault in _INSTEAD:
            status, code = _INSTEAD[fault]
            return error_of(status, code) if code else Answer(status, _HTML, _PAGE)
        if fault == SILENT:
            self.server.closing.wait()
        if fault in ("reset before", SILENT):
            return None
        if fault == "upload cut":
            self.server.ask(request, cut=draw.randrange(1, len(request.body)))
            return None
        if fault == "bit flipped in the upload":
            request = Request(
                request.method, request.target, request.headers, _flipped(request.body, draw)
            )
        if fault == "twice":
            self.server.ask(request)
        answer = self.server.ask(request)
        if request.is_list:
            self.server.earlier(request, answer, draw)
        if fault == "delay":
            time.sleep(draw.uniform(0, _LONGEST_DELAY))
        if fault == "done, then reset":
            return None
        if fault == "done, then 500":
            return error_of(500, "InternalError")
        if fault == "bit flipped in the answer" and answer.status < 300 and answer.body:
            return Answer(answer.status, answer.headers, _flipped(answer.body, draw))
        return answer

    def _send(self, answer: Answer, cut: int | None = None) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        announced = {name.lower(): value for name, value in answer.headers}
        size = announced.get("content-length") if self.command == "HEAD" else len(answer.body)
        if answer.status != 204:
            self.send_header("Content-Length", str(size or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut])

    def _reset(self) -> None:
        """Without a goodbye: the client's system reports a connection reset by its peer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, *_: object) -> None:
        pass


_HTML = [("Content-Type", "text/html")]
_INSTEAD = {
    "503 SlowDown": (503, "SlowDown"),
    "500 InternalError": (500, "InternalError"),
    "502 with a page": (502, ""),
    "page for a list": (200, ""),
}


def error_of(status: int, code: str) -> Answer:
    """What a store says of a request that it refuses."""
    text = _ERROR % (code, "a fault of this test")
    return Answer(status, [("Content-Type", "application/xml")], text.encode())


def _flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


@contextlib.contextmanager
def proxied(endpoint: str) -> Iterator[Proxy]:
    """A running proxy before `endpoint`."""
    with Proxy(endpoint) as proxy:
        proxy.daemon_threads = True
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            proxy.shutdown()
            thread.join()
