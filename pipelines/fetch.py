"""Public raw pictures, downloaded into a folder that `build --raw` reads: fast.ai's Imagenette.

Ten classes of ImageNet with 9,469 train and 3,925 val pictures, in their original size or with a
shorter side of 320 or 160 pixels. MD5 and class names of the archives are those of pytorch/vision,
torchvision/datasets/imagenette.py; their bytes are the same in fastai/fastai, data/checks.txt, and
tensorflow/datasets, datasets/imagenette/checksums.tsv.

Beside RAW, not in it, lie .RAW.FILE.part, which a later run continues, .etag and .pictures;
RAW itself appears by one rename, when all is there.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from alexnet.errors import UserError
from pipelines import command, shards, storage
from pipelines.sources.folders import SYNSET_MAPPING

MIRROR = "https://s3.amazonaws.com/fast-ai-imageclas"
NAMES = ("imagenette",)


@dataclass(frozen=True)
class Archive:
    file: str
    num_bytes: int
    md5: str


SIZES = {
    "160": Archive("imagenette2-160.tgz", 99_003_388, "e793b78cc4c9e9a4ccc0c1155377a412"),
    "320": Archive("imagenette2-320.tgz", 341_663_724, "3df6f0d01a2c9592104656642f5e78a3"),
    "full": Archive("imagenette2.tgz", 1_557_161_267, "fe2fc210e6bb7c5664d602c3cd71e612"),
}
CLASSES = {
    "n01440764": "tench, Tinca tinca",
    "n02102040": "English springer, English springer spaniel",
    "n02979186": "cassette player",
    "n03000684": "chain saw, chainsaw",
    "n03028079": "church, church building",
    "n03394916": "French horn, horn",
    "n03417042": "garbage truck, dustcart",
    "n03425413": "gas pump, gasoline pump, petrol pump, island dispenser",
    "n03445777": "golf ball",
    "n03888257": "parachute, chute",
}
_NOTE = "fetch.json"  # what was fetched, so that a second run knows it again
_PICTURE = re.compile(r"(?:\./)?[\w-]+/(train|val)/(n\d{8})/(\w[\w.-]*\.JPEG)")
_BLOCK = 1 << 20
_TRIES = 5  # in a row without a new byte
_WAIT_SECONDS = 1.0  # before the second try; then twice as long each time
_SILENCE_SECONDS = 30
_PROGRESS_SECONDS = 5


def fetch(name: str, to: str, size: str, mirror: str | None = None) -> str:
    """Make the folder `to` of the archive `size` of the set `name`; returns a line about it.

    `mirror` is a URL under which the files have their names. Raises UserError for what is unknown,
    when `to` holds anything else, the server cannot be reached or serves other bytes, or the disk
    is full.
    """
    archive, raw, url = _checked(name, to, size, mirror)
    part = raw.with_name(f".{raw.name}.{archive.file}.part")
    wanted = {"name": name, "size": size, "md5": archive.md5}
    try:
        if line := _there_already(raw, wanted):
            _remove(part)  # of a run that was killed at its very end
            return line
        raw.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part, raw) as file:
            _check_space(raw, archive, file.tell())
            _download(url, archive, file, part.with_suffix(".etag"))
            _check_md5(url, archive, part)
            pictures = _extract(part, raw, wanted)
            _remove(part)
    except OSError as error:
        raise UserError(f"{error.filename or raw}: {error.strerror or error}") from error
    return f"{raw}: fetched {name} {size}, {_in_words(pictures)}"


def _checked(name: str, to: str, size: str, mirror: str | None) -> tuple[Archive, Path, str]:
    if name not in NAMES:
        raise UserError(f"fetch {name}: not known; choose {', '.join(NAMES)}")
    if size not in SIZES:
        raise UserError(f"--size {size}: choose {', '.join(SIZES)}")
    if "://" in to:
        raise UserError(f"--to {to}: give a local folder; copy it to a store afterwards")
    raw = Path(to).expanduser().resolve()
    if raw.is_mount():
        raise UserError(f"--to {to} is a mount point; choose a folder in it, such as {raw / name}")
    url = f"{(mirror or MIRROR).rstrip('/')}/{SIZES[size].file}"
    if not re.match(r"https?://[^/]", url):
        raise UserError(f"--mirror {mirror}: give a URL such as {MIRROR}")
    return SIZES[size], raw, url


def _there_already(raw: Path, wanted: dict[str, str]) -> str:
    """A line about it; "" when there is nothing. Raises UserError when there is anything else."""
    if not raw.exists() or not (found := sorted(path.name for path in raw.iterdir())):
        return ""
    note = shards.read_json(str(raw / _NOTE)) if _NOTE in found else {}
    if {key: note.get(key) for key in wanted} != wanted:
        holds = f"{note['name']} {note['size']}" if note else found[0]
        raise UserError(f"{raw} is not empty and holds {holds}; choose another --to")
    pictures = {split: len([*(raw / split).glob("*/*.JPEG")]) for split in note["pictures"]}
    if pictures != note["pictures"]:
        raise UserError(
            f"{raw} holds {_in_words(pictures)} instead of {_in_words(note['pictures'])}; delete "
            "the folder and fetch again"
        )
    return f"{raw} holds {wanted['name']} {wanted['size']} already, {_in_words(pictures)}"


def _in_words(pictures: dict[str, int]) -> str:
    return " + ".join(f"{count:,} {split}" for split, count in pictures.items()) + " pictures"


@contextlib.contextmanager
def _alone(part: Path, raw: Path) -> Iterator[IO[bytes]]:
    """The part, open at its end, while no other process works on it."""
    with part.open("ab") as file:
        lock = functools.partial(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            storage.offers(raw.parent, "file locks", lock, "let one command at a time fetch there")
        except BlockingIOError as error:
            raise UserError(f"{raw}: another process is fetching it; wait for that one") from error
        try:
            yield file
        finally:
            if not file.tell():
                _remove(part)


def _check_space(raw: Path, archive: Archive, have: int) -> None:
    """JPEGs hardly compress: the pictures need what the archive does."""
    needed, free = 2 * archive.num_bytes - have, storage.free_bytes(str(raw.parent))
    if free is not None and free < needed:
        sizes = f"{free / 1e9:.2f} GB free, {archive.file} needs {needed / 1e9:.2f} GB"
        raise UserError(f"{raw.parent}: {sizes} with its pictures; choose another --to")


# Download


def _download(url: str, archive: Archive, part: IO[bytes], etag: Path) -> None:
    """Fill `part`; where the connection breaks off, go on from there."""
    command.say(f"downloading {url}")
    progress, furthest, failures = _Progress(archive.num_bytes, part.tell()), part.tell(), 0
    while part.tell() < archive.num_bytes:
        problem = _request(url, archive, part, etag, progress)
        part.flush()
        if part.tell() >= archive.num_bytes:
            break
        failures = 1 if part.tell() > furthest else failures + 1
        furthest = max(furthest, part.tell())
        if failures == _TRIES:
            raise UserError(
                f"{url} {problem}, {_TRIES} times in a row; check the network or choose another "
                "--mirror (what came so far is kept)"
            )
        wait = _WAIT_SECONDS * 2 ** (failures - 1)
        command.say(f"the server {problem}; trying again in {wait:g} s")
        time.sleep(wait)
    command.say(progress.line(part.tell()))


def _request(url: str, archive: Archive, part: IO[bytes], etag: Path, progress: _Progress) -> str:
    """One request for what is missing; returns why it is over, to be read after the URL."""
    request = urllib.request.Request(url, headers={"User-Agent": "alexnet-workflow"})
    if part.tell() and etag.exists() and (seen := etag.read_text()):
        request.add_header("Range", f"bytes={part.tell()}-")
        request.add_header("If-Range", seen)  # another file by now is sent from its start
    try:
        answer = urllib.request.urlopen(request, timeout=_SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            return _refused(url, part, error)
    except (OSError, ValueError, http.client.HTTPException) as error:  # no host, TLS, silence
        reason = getattr(error, "reason", error)
        return f"cannot be reached ({getattr(reason, 'strerror', None) or reason})"
    with answer:
        start = _first_byte(url, archive, answer)
        if start == 0:
            part.truncate(part.seek(0))
            etag.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        elif start != part.tell():
            return "sent another range than the one asked for"
        for block in _blocks(answer):  # written outside of what catches the network's errors
            part.write(block)
            progress.tell(part.tell())
            if part.tell() > archive.num_bytes:
                break
    return "broke off"


def _refused(url: str, part: IO[bytes], error: urllib.error.HTTPError) -> str:
    if error.code == 416:  # not even so long as what is here: another file by now
        part.truncate(part.seek(0))
    elif error.code < 500 and error.code not in (408, 429):
        raise UserError(f"{url} answered {error.code} {error.reason}; check --mirror") from error
    return f"answered {error.code} {error.reason}"


def _first_byte(url: str, archive: Archive, answer: Any) -> int:
    """Where in the file the body starts. Raises UserError when the file has another size."""
    start, total = "0", answer.headers.get("Content-Length")
    if match := re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", "")):
        start, total = match.groups()
    if total is not None and int(total) != archive.num_bytes:
        raise UserError(
            f"{url} has {int(total):,} bytes, the published file {archive.num_bytes:,}; "
            "choose another --mirror"
        )
    return int(start)


def _blocks(answer: Any) -> Iterator[bytes]:
    """The body, until it ends or breaks off."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while block := answer.read1(_BLOCK):
            yield block


@dataclass
class _Progress:
    total: int
    have_before: int
    _started: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)

    def tell(self, have: int) -> None:
        """A line every few seconds."""
        if time.monotonic() - self._told >= _PROGRESS_SECONDS:
            self._told = time.monotonic()
            command.say(self.line(have))

    def line(self, have: int) -> str:
        rate = max(have - self.have_before, 0) / max(time.monotonic() - self._started, 1e-9)
        eta = f"{(self.total - have) / rate:.0f} s" if rate else "?"
        return f"{have / 1e6:.1f}/{self.total / 1e6:.1f} MB  {rate / 1e6:.1f} MB/s  ETA {eta}"


def _check_md5(url: str, archive: Archive, part: Path) -> None:
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != archive.md5:
        _remove(part)
        raise UserError(
            f"{url} has MD5 {found}, the published file {archive.md5}; it is removed here, "
            "fetch again or choose another --mirror"
        )


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_suffix(".etag").unlink(missing_ok=True)


# Pictures


def _extract(part: Path, raw: Path, wanted: dict[str, str]) -> dict[str, int]:
    """Pictures of each split. Names are matched as a whole: nothing lands outside of `raw`."""
    hidden = part.with_suffix(".pictures")
    if hidden.exists():  # of a run that was killed
        shutil.rmtree(hidden)
    command.say(f"extracting to {raw}")
    pictures: Counter[str] = Counter()
    with tarfile.open(part, "r:gz") as tar:
        for member in tar:
            if not (match := _PICTURE.fullmatch(member.name)):
                continue  # folders, lists of labels, a file system's own files
            if not member.isreg() or (content := tar.extractfile(member)) is None:
                raise UserError(f"{part}: {member.name} is no plain file; delete the archive")
            path = hidden.joinpath(*match.groups())
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(content, file)
            pictures[match[1]] += 1
    mapping = "".join(f"{wnid} {words}\n" for wnid, words in CLASSES.items())
    (hidden / SYNSET_MAPPING).write_text(mapping)
    (hidden / _NOTE).write_text(json.dumps(wanted | {"pictures": pictures}, indent=1) + "\n")
    hidden.rename(raw)  # fails where other files came to lie meanwhile
    return dict(pictures)
