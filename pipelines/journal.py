"""What each builder leaves about its pace in OUT/_meta/progress/: for `status` and `report`.

One file for every time that somebody built; no part of the set's identity, and no build reads it.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from pipelines import shards, storage

FOLDER = "_meta/progress/"
SECONDS = 5.0  # between two signs of life
MAX_POINTS = 500
RECENT_SECONDS = 60.0  # what "now" means in a rate

State = Literal["building", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Point:
    """Totals at one moment. Shards, pictures and rejected include what earlier builds had made."""

    seconds: float  # since the builder's start
    shards: int
    pictures: int
    read_bytes: int
    stored_bytes: int
    rejected: int


@dataclass
class Journal:
    """One builder's. Its name is unique: HOST-PID-STARTED."""

    shards: int  # of the plan
    pictures: int
    builder: str = ""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=time.time)  # epoch seconds, as is `updated`
    updated: float = 0.0
    state: State = "building"
    message: str = ""
    points: list[Point] = field(default_factory=list)
    spacing: float = SECONDS  # least seconds between two points; grows as they are thinned

    def __post_init__(self) -> None:
        host = re.sub(r"[^A-Za-z0-9.]+", "-", self.host)
        self.builder = self.builder or f"{host}-{self.pid}-{self.started:.3f}"


def add(journal: Journal, point: Point) -> None:
    """The newest point is always kept; the others are thinned to half when there are too many."""
    points = journal.points
    if len(points) > 1 and points[-1].seconds - points[-2].seconds < journal.spacing:
        points.pop()
    points.append(point)
    if len(points) > MAX_POINTS:
        journal.points = [*points[:-1:2], points[-1]]
        journal.spacing *= 2


def save(out: str, journal: Journal) -> None:
    """Raises UserError when OUT cannot be written."""
    journal.updated = time.time()
    document = asdict(journal)
    del document["spacing"]
    document["points"] = [list(asdict(point).values()) for point in journal.points]
    location = storage.join(out, FOLDER.rstrip("/"), f"{journal.builder}.json")
    storage.write(location, shards.canonical_json(document), below=out)


def load(out: str, names: Iterable[str]) -> list[Journal]:
    """Those among `names` (relative to OUT) that are journals, in order of their start."""
    uris = [storage.join(out, name) for name in names if is_journal(name)]
    with ThreadPoolExecutor(16) as pool:
        journals = [parse(data) for data in pool.map(storage.read, uris)]
    found = [journal for journal in journals if journal is not None]
    return sorted(found, key=lambda journal: (journal.started, journal.builder))


def is_journal(name: str) -> bool:
    return name.startswith(FOLDER) and name.endswith(".json")


def newest(names: Iterable[str], number: int) -> list[str]:
    """The `number` journals that were begun last, by their names."""

    def started(name: str) -> float:
        end = re.search(r"-(\d+(\.\d+)?)\.json$", name)
        return float(end[1]) if end else 0.0

    return sorted(filter(is_journal, names), key=lambda name: (-started(name), name))[:number]


def parse(data: bytes) -> Journal | None:
    """None when these bytes are no journal."""
    try:
        document = json.loads(data)
        points = [Point(float(row[0]), *map(int, row[1:])) for row in document.pop("points")]
        found = Journal(**document, points=points)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None
    times = [found.started, found.updated, *(point.seconds for point in points)]
    numbers = (found.shards, found.pictures, found.pid)
    texts = (found.builder, found.host, found.message)
    good = (
        all(type(time) in (int, float) and math.isfinite(time) for time in times)
        and all(type(number) is int for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and found.state in get_args(State)
    )
    return found if good else None


def rate(points: list[Point], recent: float | None = None) -> float:
    """Pictures per second, over all points or over the last `recent` seconds of them."""
    if not points:
        return 0.0
    first, last = window(points, recent)
    return (last.pictures - first.pictures) / max(last.seconds - first.seconds, 1e-9)


def window(points: list[Point], recent: float | None = None) -> tuple[Point, Point]:
    """The first and the last point of all, or of the last `recent` seconds and a little more."""
    last = points[-1]
    old = [point for point in points if recent and point.seconds <= last.seconds - recent]
    return (old or points[:1])[-1], last


def eta(left: int, pictures_per_second: float) -> float | None:
    """Seconds until `left` more pictures are done; None where the rate tells nothing."""
    if left <= 0:
        return 0.0
    return left / pictures_per_second if pictures_per_second > 0 else None
