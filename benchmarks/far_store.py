"""An S3 store on this machine that is some milliseconds away: SeaweedFS behind a proxy that holds
each request up."""

import asyncio
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import processes

sys.path.append(str(processes.ROOT / "tests"))  # which start the same server
from seaweed import Seaweed, started, weed_program

_BUCKET = "bench"


@dataclass(frozen=True)
class FarStore:
    """environment: of a process that uses the store, by way of the proxy."""

    near: Seaweed
    environment: dict[str, str]

    def uri(self, prefix: str) -> str:
        return f"s3://{_BUCKET}/{prefix}"

    def upload(self, folder: Path, prefix: str) -> None:
        client = self.near.client()
        for path in sorted(folder.iterdir()):
            client.upload_file(str(path), _BUCKET, f"{prefix}/{path.name}")


@contextmanager
def far_store(seconds: float) -> Iterator[FarStore | None]:
    """With an empty bucket, each request to which takes `seconds` more; None where the server is
    not installed."""
    if weed_program() is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, started(Path(folder)) as near:
        near.client().create_bucket(Bucket=_BUCKET)
        address = urlsplit(near.endpoint)
        assert address.hostname and address.port
        with _proxy(address.hostname, address.port, seconds) as port:
            far = near.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
            yield FarStore(near, far)


@contextmanager
def _proxy(host: str, port: int, seconds: float) -> Iterator[int]:
    """Its port. Of every connection, what a client sends after an answer is a new request."""

    async def connected(client: Any, to_client: Any) -> None:
        server, to_server = await asyncio.open_connection(host, port)
        answered = True

        async def there() -> None:
            nonlocal answered
            while data := await client.read(1 << 20):
                if answered:
                    answered = False
                    await asyncio.sleep(seconds)
                to_server.write(data)
                await to_server.drain()
            to_server.close()

        async def back() -> None:
            nonlocal answered
            while data := await server.read(1 << 20):
                answered = True
                to_client.write(data)
                await to_client.drain()
            to_client.close()

        await asyncio.gather(there(), back(), return_exceptions=True)  # a lost connection

    async def served() -> None:
        listening = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 20)
        ready.append(listening.sockets[0].getsockname()[1])
        is_ready.set()
        await over.wait()
        listening.close()

    ready, is_ready, loop = list[int](), threading.Event(), asyncio.new_event_loop()
    over = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(served()), daemon=True)
    thread.start()
    is_ready.wait()
    try:
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
