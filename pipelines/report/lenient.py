"""What can still be seen of a damaged picture, for people to look at; never for a shard.

It is decoded in a process of its own: Pillow's tolerance is a switch for the whole process, under
which a build would take a cut picture for a good one, and files made to crash a decoder end up
in quarantine, too. Asking starts that process, and one that dies is replaced.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

SIDE = 160  # pixels of the longer side
_MAX_PIXELS = 20_000_000
_SECONDS = 10  # for one picture
_MEMORY = 2 << 30  # bytes of address space
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
_LENGTH = struct.Struct(">I")


def thumbnails(pictures: Iterable[bytes]) -> Iterator[bytes]:
    """A JPEG for each, of at most SIDE × SIDE pixels; b"" where nothing can be seen."""
    process: subprocess.Popen[bytes] | None = None
    try:
        for raw in pictures:
            process = process or _start()
            try:
                yield _asked(process, raw)
            except (BrokenPipeError, EOFError):
                _end(process)
                process = None
                yield b""
    finally:
        if process is not None:
            _end(process)


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", str(Path(__file__).resolve())]  # -P: without our folder
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _asked(process: subprocess.Popen[bytes], raw: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    _send(process.stdin, raw)
    return _received(process.stdout)


def _send(stream: IO[bytes], data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _received(stream: IO[bytes]) -> bytes:
    """Raises EOFError when the other end is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        data = stream.read(length)
        if len(data) == length:
            return data
    raise EOFError("the other process has ended")


# In the other process


def _serve() -> None:
    import resource
    import signal

    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = True
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MEMORY if most == resource.RLIM_INFINITY else min(_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while True:
        try:
            raw = _received(sys.stdin.buffer)
        except EOFError:
            return
        signal.alarm(_SECONDS)  # ends this process, even inside a decoder
        seen = _seen(raw)
        signal.alarm(0)
        _send(sys.stdout.buffer, seen)


def _seen(raw: bytes) -> bytes:
    """Other errors than these end the process, which is the same as nothing to see."""
    import warnings

    from PIL import Image

    warnings.simplefilter("ignore")
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(raw), formats=_FORMATS) as picture:
            if picture.width * picture.height > _MAX_PIXELS:
                return b""
            picture.draft("RGB", (SIDE, SIDE))
            small = picture.convert("RGB")
            small.thumbnail((SIDE, SIDE))
            small.save(buffer, "JPEG", quality=80)
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error):
        return b""
    except Image.DecompressionBombError:
        return b""
    return buffer.getvalue()


if __name__ == "__main__":
    _serve()
