"""A drawn archive in the form of fast.ai's, and a server of it with the faults of servers."""

import contextlib
import functools
import hashlib
import http.server
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from drawn import jpeg

from alexnet.errors import UserError
from pipelines import fetch

FILE = "imagenette2-160.tgz"
NAMES = [
    "train/n01440764/n01440764_10026",
    "train/n01440764/ILSVRC2012_val_00000293",  # the published split is a new one
    "train/n03888257/n03888257_7",
    "val/n01440764/n01440764_141",
    "val/n03888257/ILSVRC2012_val_00000662",
]
IMAGES = {f"{name}.JPEG": jpeg(seed) for seed, name in enumerate(NAMES)}


def packed(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def published() -> bytes:
    """With the litter that an archive may hold; its bytes differ each time."""
    litter = {"noisy_imagenette.csv": b"path,noise\n", "train/.DS_Store": os.urandom(40)}
    return packed({f"imagenette2-160/{name}": data for name, data in (litter | IMAGES).items()})


class Server(http.server.ThreadingHTTPServer):
    """Serves `data` under any name, with the faults that a test sets."""

    data = b""
    ranges = True
    cut_after: list[int]  # bytes of the body after which each next answer breaks off
    statuses: list[int]  # of the next answers
    seen: list[tuple[str | None, int]]  # Range header and status of each answer

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut_after, self.statuses, self.seen = [], [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/some/folder"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        start, status = 0, server.statuses.pop(0) if server.statuses else 200
        if status == 200 and asked and server.ranges:
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        server.seen.append((asked, status))
        body = server.data[start:] if status < 400 else b"an error page"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            total = len(server.data)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        self.wfile.write(body[: server.cut_after.pop(0)] if server.cut_after else body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server, asked without a proxy and, after a failure, without much waiting."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "_WAIT_SECONDS", 0.001)
    with Server() as running:
        publish(running, published(), monkeypatch)
        threading.Thread(target=functools.partial(running.serve_forever, 0.01)).start()
        try:
            yield running
        finally:
            running.shutdown()


def publish(server: Server, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve `data`, and have it be what is expected."""
    server.data = data
    md5 = hashlib.md5(data).hexdigest()
    monkeypatch.setitem(fetch.SIZES, "160", fetch.Archive(FILE, len(data), md5))


def run(server: Server, raw: Path) -> str:
    return fetch.fetch("imagenette", str(raw), "160", server.url)


def refusal(server: Server, raw: Path) -> str:
    """The one line of the error; RAW must not look as if it held anything."""
    with pytest.raises(UserError) as refused:
        run(server, raw)
    assert "\n" not in str(refused.value)
    assert not raw.exists()
    return str(refused.value)


def part_of(raw: Path) -> Path:
    return raw.with_name(f".{raw.name}.{FILE}.part")


def images_in(raw: Path) -> dict[str, bytes]:
    paths = [path for split in ("train", "val") for path in (raw / split).rglob("*")]
    return {str(path.relative_to(raw)): path.read_bytes() for path in paths if path.is_file()}
