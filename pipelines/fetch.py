"""Public raw images, downloaded into a folder that `build --raw` reads: fast.ai's Imagenette.

Ten classes of ImageNet with 9,469 train and 3,925 val images, in their original size or with a
shorter side of 320 or 160 pixels. MD5 and class names of the archives are those of pytorch/vision,
torchvision/datasets/imagenette.py; their bytes are the same in fastai/fastai, data/checks.txt, and
tensorflow/datasets, datasets/imagenette/checksums.tsv.

Beside RAW, not in it, lie .RAW.FILE.part, which a later run continues, and .RAW.FILE.images; RAW
itself appears by one rename, when all is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import http.client
import json
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from io import BufferedRandom
from pathlib import Path
from typing import NamedTuple

from alexnet.errors import UserError
from pipelines import command, shards, storage
from pipelines.sources.folders import SYNSET_MAPPING

MIRROR = "https://s3.amazonaws.com/fast-ai-imageclas"


class Archive(NamedTuple):
    file: str
    num_bytes: int
    md5: str


SIZES = {
    "160": Archive("imagenette2-160.tgz", 99_003_388, "e793b78cc4c9e9a4ccc0c1155377a412"),
    "320": Archive("imagenette2-320.tgz", 341_663_724, "3df6f0d01a2c9592104656642f5e78a3"),
    "full": Archive("imagenette2.tgz", 1_557_161_267, "fe2fc210e6bb7c5664d602c3cd71e612"),
}
_CLASSES = """\
n01440764 tench, Tinca tinca
n02102040 English springer, English springer spaniel
n02979186 cassette player
n03000684 chain saw, chainsaw
n03028079 church, church building
n03394916 French horn, horn
n03417042 garbage truck, dustcart
n03425413 gas pump, gasoline pump, petrol pump, island dispenser
n03445777 golf ball
n03888257 parachute, chute
"""
_NOTE = "fetch.json"  # what was fetched, so that a second run knows it again
_IMAGE = re.compile(r"(?:\./)?[\w-]+/(train|val)/(n\d{8})/(\w[\w.-]*\.JPEG)")
_BLOCK = 1 << 20
_TRIES = 5  # in a row without a new byte
_WAIT_SECONDS = 1.0  # before the second try; then twice as long each time
_SILENCE_SECONDS = 30
_PROGRESS_SECONDS = 5


def fetch(name: str, to: str, size: str, mirror: str | None = None) -> str:
    """Fill the folder `to`; returns a line about it. `mirror`: URL under which the files lie.

    Raises UserError for what is unknown, when `to` holds anything else, the server cannot be
    reached or serves other bytes, or the disk is full.
    """
    if name != "imagenette":
        raise UserError(f"fetch {name}: not known; choose imagenette")
    if size not in SIZES:
        raise UserError(f"--size {size}: choose {', '.join(SIZES)}")
    if "://" in to:
        raise UserError(f"--to {to}: give a local folder; copy it to a store afterwards")
    raw, archive = Path(to).expanduser().resolve(), SIZES[size]
    if raw.is_mount():
        raise UserError(f"--to {to} is a mount point; choose a folder in it, such as {raw / name}")
    url = f"{(mirror or MIRROR).rstrip('/')}/{archive.file}"
    if not re.match(r"https?://[^/]", url):
        raise UserError(f"--mirror {mirror}: give a URL such as {MIRROR}")
    part = raw.with_name(f".{raw.name}.{archive.file}.part")
    wanted = {"name": name, "size": size, "md5": archive.md5}
    try:
        if raw.exists() and (found := sorted(path.name for path in raw.iterdir())):
            note = shards.read_json(str(raw / _NOTE)) if _NOTE in found else {}
            if not wanted.items() <= note.items():
                holds = f"{note['name']} {note['size']}" if note else found[0]
                raise UserError(f"{raw} is not empty and holds {holds}; choose another --to")
            part.unlink(missing_ok=True)  # of a run that was killed at its very end
            return f"{raw} holds {name} {size} already"
        raw.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a+b") as file:
            _lock(file, raw.parent)
            _download(url, archive, file)
            images = _extract(part, raw, wanted)
            part.unlink()
    except OSError as error:
        raise UserError(f"{error.filename or raw}: {error.strerror or error}") from error
    counts = " + ".join(f"{count:,} {split}" for split, count in images.items())
    return f"{raw}: fetched {name} {size}, {counts} images"


def _lock(part: BufferedRandom, folder: Path) -> None:
    """Until `part` is closed no other process may work on it."""
    lock = functools.partial(fcntl.flock, part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        storage.offers(folder, "file locks", lock, "let one command at a time fetch there")
    except BlockingIOError as error:
        raise UserError(f"{part.name}: another process fetches it; wait for that one") from error


def _download(url: str, archive: Archive, part: BufferedRandom) -> None:
    """Fill `part` with the published bytes; where the connection breaks off, go on from there."""
    before, needed = part.tell(), 2 * archive.num_bytes - part.tell()  # JPEGs hardly compress
    folder = Path(part.name).parent
    if (free := storage.free_bytes(str(folder))) is not None and free < needed:
        sizes = f"{free / 1e9:.2f} GB free, {archive.file} needs {needed / 1e9:.2f} GB"
        raise UserError(f"{folder}: {sizes} with its images; choose another --to")
    command.say(f"downloading {url}")
    started = reported = time.monotonic()
    furthest, failures, problem = before, 0, ""

    def progress(pause: float) -> None:
        """A line, unless the last one was less than `pause` seconds ago."""
        nonlocal reported
        if time.monotonic() - reported < pause:
            return
        reported = time.monotonic()
        have, total = part.tell() / 1e6, archive.num_bytes / 1e6
        rate = max(have - before / 1e6, 0) / max(reported - started, 1e-9)
        eta = f"{(total - have) / rate:.0f} s" if rate else "?"
        command.say(f"{have:.1f}/{total:.1f} MB  {rate:.1f} MB/s  ETA {eta}")

    while part.tell() < archive.num_bytes:
        if failures == _TRIES:
            raise UserError(
                f"{url} {problem}, {_TRIES} times in a row; check the network or choose another "
                "--mirror (what came so far is kept)"
            )
        if failures:
            wait = _WAIT_SECONDS * 2 ** (failures - 1)
            command.say(f"the server {problem}; trying again in {wait:g} s")
            time.sleep(wait)
        problem = _receive(url, archive, part, progress)
        failures = 1 if part.tell() > furthest else failures + 1
        furthest = max(furthest, part.tell())
    progress(0)
    part.seek(0)
    if (found := hashlib.file_digest(part, "md5").hexdigest()) != archive.md5:
        part.truncate(0)
        raise UserError(
            f"{url} has MD5 {found}, the published file {archive.md5}; nothing of it is kept, "
            "fetch again or choose another --mirror"
        )


def _receive(
    url: str, archive: Archive, part: BufferedRandom, progress: Callable[[float], None]
) -> str:
    """Append to `part` what one request brings, and return what ended it. `part` is emptied when
    the server sends the file from its start. Raises UserError for what no other try may mend."""
    asked = {"Range": f"bytes={part.tell()}-"} if part.tell() else {}
    request = urllib.request.Request(url, headers={"User-Agent": "alexnet-workflow"} | asked)
    try:
        answer = urllib.request.urlopen(request, timeout=_SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        line = f"answered {error.code} {error.reason}"
        if error.code == 416:  # not even so long as what is here: another file by now
            part.truncate(part.seek(0))
        elif error.code < 500 and error.code not in (408, 429):
            raise UserError(f"{url} {line}; check --mirror") from error
        return line
    except (OSError, ValueError, http.client.HTTPException) as error:  # no host, TLS, silence
        reason = getattr(error, "reason", error)
        return f"cannot be reached ({getattr(reason, 'strerror', None) or reason})"
    with answer:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        total = total or answer.headers.get("Content-Length", "")
        if total.isdecimal() and int(total) != archive.num_bytes:
            raise UserError(
                f"{url} has {int(total):,} bytes, the published file {archive.num_bytes:,}; "
                "choose another --mirror"
            )
        if answer.status != 206:
            part.truncate(part.seek(0))
        block = b"begun"
        while block and part.tell() <= archive.num_bytes:
            block = b""
            with contextlib.suppress(OSError, http.client.HTTPException):  # it breaks off
                block = answer.read1(_BLOCK)
            part.write(block)
            progress(_PROGRESS_SECONDS)
    return "broke off"


def _extract(part: Path, raw: Path, wanted: dict[str, str]) -> dict[str, int]:
    """Images of each split. Names are matched as a whole: nothing lands outside of `raw`."""
    hidden = part.with_suffix(".images")
    if hidden.exists():  # of a run that was killed
        shutil.rmtree(hidden)
    command.say(f"extracting to {raw}")
    images: Counter[str] = Counter()
    with tarfile.open(part, "r:gz") as tar:
        for member in tar:
            if not (match := _IMAGE.fullmatch(member.name)):
                continue  # folders, lists of labels, a file system's own files
            if not member.isreg() or (content := tar.extractfile(member)) is None:
                raise UserError(f"{part}: {member.name} is no plain file; delete the archive")
            path = hidden.joinpath(*match.groups())
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(content, file)
            images[match[1]] += 1
    (hidden / SYNSET_MAPPING).write_text(_CLASSES)
    (hidden / _NOTE).write_text(json.dumps(wanted | {"pictures": images}, indent=1) + "\n")
    hidden.rename(raw)  # fails where other files came to lie meanwhile
    return dict(images)
