"""How far a build is, told while it runs, and when too many pictures are unusable to go on."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from alexnet.errors import UserError
from pipelines import command, journal
from pipelines.journal import Journal, Point

_EXAMPLES = 3
_ERASE = "\r\x1b[K"
_log = logging.getLogger(__name__)


class BuildFailed(Exception):
    """The build stopped, and can be continued. The text is one line; exit code 1."""


@dataclass(frozen=True)
class MaxRejected:
    """How many unusable pictures are still a success: a number, or a share of all."""

    number: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str | None, official: bool = False) -> MaxRejected:
        """From "25" or "1%". None is the default: 1 %, and not one of the official archives, which
        are known to hold no unusable picture."""
        text = text if text is not None else "0" if official else "1%"
        try:
            if not text.endswith("%"):
                limit = cls(number=int(text))
            else:
                limit = cls(share=float(text[:-1]) / 100)
        except ValueError:
            limit = cls(number=-1)
        if (limit.number or 0) < 0 or not 0 <= (limit.share or 0) <= 1:
            raise UserError(
                f"--max-rejected {text}: give a number such as 25 or a share such as 1%"
            )
        return limit

    def exceeded(self, rejected: int, pictures: int) -> bool:
        if self.number is not None:
            return rejected > self.number
        return rejected > (self.share or 0) * pictures

    def __str__(self) -> str:
        return str(self.number) if self.number is not None else f"{100 * (self.share or 0):g}%"


@dataclass
class Progress:
    """Counts finished shards, and tells of them while `running`.

    The rates shown are those of the last minute, so that a store that slows down is seen; a shard
    counts when it is finished, so with few workers they go up and down. The ETA is taken from the
    average since the start, which does not.
    """

    shards_total: int
    pictures_total: int
    out: str
    max_rejected: MaxRejected
    as_json: bool = False
    reasons: Counter[str] = field(default_factory=Counter)
    _shards: int = 0
    _pictures: int = 0
    _read_bytes: int = 0
    _stored_bytes: int = 0
    _wait_seconds: float = 0.0
    _work_seconds: float = 0.0  # waiting included
    _examples: list[str] = field(default_factory=list)
    _state: journal.State = "building"
    _begun: float | None = None
    _points: list[Point] = field(default_factory=list)  # of the last minute
    _first: Point | None = None
    _warned: bool = False
    _lock: Any = field(default_factory=threading.RLock)  # `count` and the teller are two threads

    def count(self, row: dict[str, Any], before: bool = False) -> None:
        """One finished shard; `before`: it was there when this build began, and is no work of it.

        Raises BuildFailed as soon as too many pictures are rejected.
        """
        with self._lock:
            self._shards += 1
            self._pictures += row["samples"] + len(row["rejected"])
            self.reasons.update(entry["reason"] for entry in row["rejected"])
            examples = [f"{entry['key']} ({entry['reason']})" for entry in row["rejected"]]
            self._examples = sorted(self._examples + examples)[:_EXAMPLES]
            if not before:
                self._read_bytes += row["read_bytes"]
                self._stored_bytes += row["stored_bytes"]
                self._wait_seconds += row["wait_seconds"]
                self._work_seconds += row["work_seconds"]
            self._check()

    def line(self) -> str:
        facts = self.json_line()
        waiting = facts["waiting_share"]
        return "  ".join(
            [
                f"shards {facts['shards']:,}/{self.shards_total:,}",
                f"images {facts['pictures']:,}/{self.pictures_total:,}",
                f"{facts['images_per_second']:,.0f} img/s",
                f"{facts['read_bytes_per_second'] / 1e6:,.1f} MB/s",
                f"ETA {clock(facts['eta_seconds'])}",
                f"rejected {facts['rejected']:,}",
                *([] if waiting is None else [f"waiting for reads {100 * waiting:.0f}%"]),
            ]
        )

    def json_line(self) -> dict[str, Any]:
        """The same for machines: rates per second, the ETA in seconds, None where unknown."""
        with self._lock:
            now = self._now()
            first, last = journal.window([*self._points, now], journal.RECENT_SECONDS)
            seconds = max(last.seconds - first.seconds, 1e-9)
            average = journal.rate([self._first or now, now])
            return {
                "state": self._state,
                "seconds": round(now.seconds, 3),
                "shards": now.shards,
                "shards_total": self.shards_total,
                "pictures": now.pictures,
                "pictures_total": self.pictures_total,
                "images_per_second": round((last.pictures - first.pictures) / seconds, 3),
                "read_bytes_per_second": round((last.read_bytes - first.read_bytes) / seconds),
                "eta_seconds": journal.eta(self.pictures_total - now.pictures, average),
                "rejected": now.rejected,
                "reasons": dict(sorted(self.reasons.items())),
                "waiting_share": round(self._wait_seconds / self._work_seconds, 4)
                if self._work_seconds
                else None,
            }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Tells every few seconds, from a thread since shards may take longer than that, and keeps
        the journal in OUT; at the end both say how the body ended."""
        self._begun = time.monotonic()
        record = Journal(self.shards_total, self.pictures_total)
        self._note(record)
        stop = threading.Event()

        def tell() -> None:
            while not stop.wait(journal.SECONDS):
                self._note(record)
                self._say()

        teller = threading.Thread(target=tell, name="progress", daemon=True)
        teller.start()
        ended: journal.State = "failed"
        try:
            yield
            ended = "done"
        except KeyboardInterrupt:
            ended = "stopped"
            raise
        except BaseException as error:
            record.message = next(iter(str(error).splitlines()), "") or repr(error)
            raise
        finally:
            stop.set()
            teller.join()
            self._state = record.state = ended
            self._note(record)
            self._say(last=True)

    def _check(self) -> None:
        rejected, total = self.reasons.total(), self.pictures_total
        if self.max_rejected.exceeded(rejected, total):
            raise BuildFailed(
                f"{rejected:,} of {total:,} pictures ({100 * rejected / total:.2g}%) are unusable, "
                f"more than --max-rejected {self.max_rejected}: {', '.join(self._examples)}; "
                "repair them or raise the limit"
            )

    def _now(self) -> Point:
        return Point(
            seconds=0.0 if self._begun is None else time.monotonic() - self._begun,
            shards=self._shards,
            pictures=self._pictures,
            read_bytes=self._read_bytes,
            stored_bytes=self._stored_bytes,
            rejected=self.reasons.total(),
        )

    def _note(self, record: Journal) -> None:
        """A point for the rates and for the journal. A journal that cannot be written is told once
        and ends no build: it is about the shards, not of them."""
        with self._lock:
            now = self._now()
            self._first = self._first or now
            self._points.append(now)
            first, _ = journal.window(self._points, journal.RECENT_SECONDS)
            del self._points[: self._points.index(first)]
        journal.add(record, now)
        try:
            journal.save(self.out, record)
        except Exception as error:  # of whatever kind: none of them is worth a build
            if not self._warned:
                _log.warning("no journal for `status` and `report`: %s", error)
            self._warned = True

    def _say(self, last: bool = False) -> None:
        if self.as_json:
            command.say(json.dumps(self.json_line()))
        elif sys.stdout.isatty():
            line = self.line()[: shutil.get_terminal_size().columns - 1]
            command.say(f"{_ERASE}{line}", end="\n" if last else "")
        else:
            command.say(self.line())


def clock(seconds: float | None) -> str:
    """h:mm:ss, or "?" for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
