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
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

# What can happen to a request.
OF_READS = ("answer cut", "reset in the answer")
OF_WRITES = ("upload cut", "done, then reset", "done, then 500")
PAGE = "page for a list"
FLIPS = ("bit flipped in the answer", "bit flipped in the upload")
SILENT = "no answer"  # until the proxy is closed
ANSWERS = ("503 SlowDown", "500 InternalError", "502 with a page")
ANYWHERE = (*ANSWERS, "reset before", "delay", "twice")
FAULTS = (*ANYWHERE, *OF_READS, *OF_WRITES, PAGE)

_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>%s</Message></Error>'
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

    def can_have(self, fault: str) -> bool:
        if fault == "upload cut" or fault == FLIPS[1]:
            return len(self.body) > 1
        if fault in OF_WRITES:
            return self.method in ("PUT", "DELETE")
        if fault == PAGE:
            return self.is_list
        if fault == FLIPS[0]:  # a list has no checksum
            return self.method == "GET" and not self.is_list
        return fault not in OF_READS or self.method == "GET"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


def error_of(status: int, code: str) -> Answer:
    """What a store says of a request that it refuses."""
    text = _ERROR % (code, "a fault of this test")
    return Answer(status, [("Content-Type", "application/xml")], text.encode())


# What a store of another make does with a request: another one passed on, or an answer of its own.
Habit = Callable[[Request], Request | Answer]


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

    def fair(self) -> None:
        """From now on nothing fails, and everything is counted anew."""
        with self._lock:
            self.requests, self.faults = 0, Counter[str]()
            self.weather = Weather()
            self.habit: Habit = lambda request: request
            self._asked = Counter[tuple[str, str, str]]()

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
            self.requests += 1
            early = self.requests <= weather.begins
            self._asked[asked] += 1
            draw = random.Random(f"{weather.seed} {asked} {self._asked[asked]}")
            possible = [fault for fault in weather.faults if request.can_have(fault)]
            if early or not possible or draw.random() >= weather.rate:
                return "", draw
            fault = draw.choice(possible)
            self.faults[fault] += 1
            return fault, draw

    def ask(self, request: Request, cut: int | None = None) -> Answer:
        """The server's answer; after `cut` bytes of the body the connection to it ends."""
        headers = {name: value for name, value in request.headers if name.lower() not in _HOP}
        headers["Content-Length"] = str(len(request.body))
        connection = http.client.HTTPConnection(self._server, timeout=60)
        with contextlib.closing(connection):
            connection.request(request.method, request.target, request.body[:cut], headers)
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

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, list(self.headers.items()), body)
        passed = self.server.habit(request)
        if isinstance(passed, Answer):
            self._send(passed)
            return
        fault, draw = self.server.fault_of(passed)
        answer = self._answer(passed, fault, draw)
        is_cut = fault in OF_READS
        if answer is not None:
            self._send(answer, draw.randrange(max(1, len(answer.body))) if is_cut else None)
            self.close_connection |= is_cut
        if answer is None or fault == "reset in the answer":
            self._reset()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self, request: Request, fault: str, draw: random.Random) -> Answer | None:
        """None for a connection that is reset."""
        if fault in _INSTEAD:
            return _INSTEAD[fault]
        if fault == SILENT:
            self.server.closing.wait()
        if fault in ("reset before", SILENT):
            return None
        if fault == "upload cut":
            self.server.ask(request, cut=draw.randrange(1, len(request.body)))
            return None
        if fault == "bit flipped in the upload":
            request = replace(request, body=_flipped(request.body, draw))
        if fault == "twice":
            self.server.ask(request)
        answer = self.server.ask(request)
        if fault == "delay":
            time.sleep(draw.uniform(0, 0.2))
        if fault == "bit flipped in the answer" and answer.status < 300 and answer.body:
            return replace(answer, body=_flipped(answer.body, draw))
        if fault == "done, then 500":
            return error_of(500, "InternalError")
        return None if fault == "done, then reset" else answer

    def _send(self, answer: Answer, cut: int | None = None) -> None:
        is_head = self.command == "HEAD"
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() not in _HOP or (is_head and name.lower() == "content-length"):
                self.send_header(name, value)
        if not is_head and answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if not is_head:
            self.wfile.write(answer.body[:cut])

    def _reset(self) -> None:
        """Without a goodbye: the client's system reports a connection reset by its peer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, *_: object) -> None:
        pass


_PAGE = b"<html><body>We will be back soon"
_INSTEAD = {
    "503 SlowDown": error_of(503, "SlowDown"),
    "500 InternalError": error_of(500, "InternalError"),
    "502 with a page": Answer(502, [("Content-Type", "text/html")], _PAGE),
    PAGE: Answer(200, [("Content-Type", "text/html")], _PAGE),
}


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
