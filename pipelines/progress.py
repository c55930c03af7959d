"""How far a build is while it runs, for people, machines and Prometheus; and when too many images
are unusable to go on.

Each node's metrics port has the figures for Prometheus as ray_NAME_total. The driver counts them,
where the status row of each finished shard arrives, and not the tasks: Ray runs a task again whose
node was lost, and may run it though its first attempt had published the shard, while the row of a
shard arrives once. Shards that were there before are no work of this build and not counted. Ray
hands the last counts over when the driver leaves; its agent keeps them for as long as the node
lives, with or without anybody who asks for them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
import sys
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec
from urllib.parse import quote

from alexnet.errors import UserError
from pipelines import command

_EXAMPLES = 3
_SECONDS = 5.0  # between two lines
_RECENT_SECONDS = 60.0  # what a rate shown is of
_ERASE = "\r\x1b[K"
_LONGEST_LABEL = 200  # characters; each is kept for every series, by Ray and by Prometheus
_PLAIN = " !#$&'()*+,/:;<=>?@[]^`{|}"  # beside letters, digits and "_.-~", which stay by themselves
_P = ParamSpec("_P")
_log = logging.getLogger(__name__)
_warned = threading.Event()


COUNTERS = {
    "images": "Images stored or quarantined.",
    "rejected": "Images quarantined, by reason.",
    "shards": "Shards made and published.",
    "read_bytes": "Bytes read from RAW.",
    "stored_bytes": "Bytes of finished shards.",
    "wait_seconds": "Seconds that shard tasks, each on a CPU of its own, waited for bytes of RAW.",
    "work_seconds": "Seconds that shard tasks took in all, waiting included.",
}


class BuildFailed(Exception):
    """The build stopped, and can be continued. The text is one line; exit code 1."""


@dataclass(frozen=True)
class MaxRejected:
    """How many unusable images are still a success: a number, or a share of all."""

    number: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str | None, official: bool = False) -> MaxRejected:
        """From "25" or "1%". None is the default: 1 %, and not one of the official archives, which
        are known to hold no unusable image."""
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

    def exceeded(self, rejected: int, images: int) -> bool:
        if self.number is not None:
            return rejected > self.number
        return rejected > (self.share or 0) * images

    def __str__(self) -> str:
        return str(self.number) if self.number is not None else f"{100 * (self.share or 0):g}%"


class Pace:
    """How fast amounts grow; of the first of them the end is known."""

    def __init__(self, *amounts: float) -> None:
        self._start = (time.monotonic(), amounts)
        self._recent = deque([self._start])

    def note(self, *amounts: float) -> None:
        """Remember what the amounts are now, and forget what they were over a minute ago."""
        self._recent.append((time.monotonic(), amounts))
        while len(self._recent) > 2 and self._recent[1][0] <= self._recent[-1][0] - _RECENT_SECONDS:
            self._recent.popleft()

    @property
    def seconds(self) -> float:
        return self._recent[-1][0] - self._start[0]

    def rates(self) -> list[float]:
        """Of each amount, per second, in the last minute."""
        (began, before), (ended, after) = self._recent[0], self._recent[-1]
        seconds = max(ended - began, 1e-9)
        return [(new - old) / seconds for old, new in zip(before, after, strict=True)]

    def eta(self, total: float) -> float | None:
        """Seconds until the first amount is `total`, at the average since the start; None where
        that tells nothing."""
        now = self._recent[-1][1][0]
        if now >= total:
            return 0.0
        done = now - self._start[1][0]
        return (total - now) * self.seconds / done if done > 0 else None


@dataclass
class Progress:
    """Counts finished shards, and reports them while `running`.

    The rates shown are those of the last minute, so that a store that slows down is seen; a shard
    counts when it is finished, so with few workers they go up and down. The ETA is taken from the
    average since the start, which does not.
    """

    shards_total: int
    images_total: int
    max_rejected: MaxRejected
    as_json: bool = False
    reasons: Tally[str] = field(default_factory=Tally)
    _shards: int = 0
    _images: int = 0
    _read_bytes: int = 0
    _wait_seconds: float = 0.0
    _work_seconds: float = 0.0  # waiting included
    _examples: list[str] = field(default_factory=list)
    _said: tuple[int, float] = (-1, 0.0)  # shards in the last line, and when that was
    _state: Literal["building", "done", "stopped", "failed"] = "building"
    _pace: Pace = field(default_factory=lambda: Pace(0, 0))
    _lock: Any = field(default_factory=threading.RLock)  # `count` and the teller are two threads

    def count(self, row: dict[str, Any], before: bool = False) -> None:
        """One finished shard; `before`: it was there when this build began, and is no work of it.

        Raises BuildFailed as soon as too many images are rejected.
        """
        with self._lock:
            self._shards += 1
            self._images += row["samples"] + len(row["rejected"])
            self.reasons.update(entry["reason"] for entry in row["rejected"])
            examples = [f"{entry['key']} ({entry['reason']})" for entry in row["rejected"]]
            self._examples = sorted(self._examples + examples)[:_EXAMPLES]
            if not before:
                self._read_bytes += row["read_bytes"]
                self._wait_seconds += row["wait_seconds"]
                self._work_seconds += row["work_seconds"]
            rejected, total = self.reasons.total(), self.images_total
            if self.max_rejected.exceeded(rejected, total):
                raise BuildFailed(
                    f"{rejected:,} of {total:,} images ({100 * rejected / total:.2g}%) are "
                    f"unusable, more than --max-rejected {self.max_rejected}: "
                    f"{', '.join(self._examples)}; repair them or raise the limit"
                )

    def line(self) -> str:
        facts = self.json_line()
        waiting = facts["waiting_share"]
        return "  ".join(
            [
                f"shards {facts['shards']:,}/{self.shards_total:,}",
                f"images {facts['pictures']:,}/{self.images_total:,}",
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
            self._pace.note(self._images, self._read_bytes)
            images_per_second, bytes_per_second = self._pace.rates()
            return {
                "state": self._state,
                "seconds": round(self._pace.seconds, 3),
                "shards": self._shards,
                "shards_total": self.shards_total,
                "pictures": self._images,
                "pictures_total": self.images_total,
                "images_per_second": round(images_per_second, 3),
                "read_bytes_per_second": round(bytes_per_second),
                "eta_seconds": self._pace.eta(self.images_total),
                "rejected": self.reasons.total(),
                "reasons": dict(sorted(self.reasons.items())),
                "waiting_share": round(self._wait_seconds / self._work_seconds, 4)
                if self._work_seconds
                else None,
            }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Reports every few seconds, from a thread since shards may take longer than that, and at
        the end how the body ended."""
        self._pace = Pace(self._images, self._read_bytes)
        stop = threading.Event()

        def tell() -> None:
            while not stop.wait(_SECONDS):
                self._say()

        teller = threading.Thread(target=tell, name="progress", daemon=True)
        teller.start()
        try:
            yield
            self._state = "done"
        except BaseException as error:
            self._state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            raise
        finally:
            stop.set()
            teller.join()
            self._say(last=True)

    def _say(self, last: bool = False) -> None:
        now = time.monotonic()
        if self.as_json:
            command.say(json.dumps(self.json_line()))
        elif sys.stdout.isatty():
            line = self.line()[: shutil.get_terminal_size().columns - 1]
            command.say(f"{_ERASE}{line}", end="\n" if last else "")
        elif last or self._said[0] != self._shards or now >= self._said[1] + _RECENT_SECONDS:
            self._said = (self._shards, now)
            command.say(self.line())


def clock(seconds: float | None) -> str:
    """h:mm:ss, or "?" for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def label(name: str) -> str:
    """`name` as the value of a label, for which Ray takes ASCII alone: as it is where it needs no
    escape, else percent-encoded as in URLs (ö is %C3%B6). What is longer than _LONGEST_LABEL keeps
    its start and its end, around "~" and the first 16 digits of the SHA-256 of the whole."""
    value = quote(name, safe=_PLAIN, errors="surrogatepass")
    if len(value) > _LONGEST_LABEL:
        digest = hashlib.sha256(value.encode()).hexdigest()[:16]
        half = (_LONGEST_LABEL - len(digest) - 2) // 2
        value = f"{value[:half]}~{digest}~{value[-half:]}"
    return value


def never_fatal(tell: Callable[_P, None]) -> Callable[_P, None]:
    """`tell`, which hands figures to Ray, without its failures: the first is a warning. Whatever
    Ray's metrics raise, in whichever version, they are about the work and not of it."""

    @functools.wraps(tell)
    def told(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            tell(*args, **kwargs)
        except Exception as error:  # told once: figures are no reason to end the work
            if not _warned.is_set():
                _warned.set()
                _log.warning("no figures for Prometheus: %r", error)

    return told


@never_fatal
def export(out: str, row: dict[str, Any]) -> None:
    """One finished shard of the set at `out`, a URI, with its status row."""
    tags = {"out": label(out)}
    amounts = row | {"images": row["samples"] + len(row["rejected"]), "shards": 1}
    for name in COUNTERS.keys() - {"rejected"}:
        if amounts[name] > 0:  # Ray refuses to add nothing
            _counter(name).inc(amounts[name], tags)
    for reason, number in Tally(entry["reason"] for entry in row["rejected"]).items():
        _counter("rejected").inc(number, tags | {"reason": label(reason)})


@functools.cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter  # loads Ray: only where it is used anyway

    labels = ("out", "reason") if name == "rejected" else ("out",)
    return Counter(f"alexnet_build_{name}", COUNTERS[name], labels)
