"""How far a build is, and when too many pictures are unusable to go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from alexnet.errors import UserError
from pipelines.plan import Plan

_PROGRESS_SECONDS = 5
_EXAMPLES = 3


class BuildFailed(Exception):
    """The build stopped, and can be continued. The text is one line; exit code 1."""


@dataclass(frozen=True)
class MaxRejected:
    """How many unusable pictures are still a success: a number, or a share of all."""

    number: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> MaxRejected:
        """From "25" or "1%"."""
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
    plan: Plan
    max_rejected: MaxRejected
    shards: int = 0
    pictures: int = 0
    rejected: list[str] = field(default_factory=list)
    _started: float = 0
    _pictures_before: int = 0

    def count(self, status: dict[str, Any]) -> None:
        """Raises BuildFailed as soon as too many are rejected."""
        self.shards += 1
        self.pictures += status["samples"] + len(status["rejected"])
        self.rejected += [f"{entry['key']} ({entry['reason']})" for entry in status["rejected"]]
        total = self.plan.table.num_rows
        if self.max_rejected.exceeded(len(self.rejected), total):
            examples = ", ".join(sorted(self.rejected)[:_EXAMPLES])
            raise BuildFailed(
                f"{len(self.rejected)} of {total:,} pictures "
                f"({100 * len(self.rejected) / total:.2g}%) are unusable, more than --max-rejected "
                f"{self.max_rejected}: {examples}; repair them or raise the limit"
            )

    def begin(self) -> None:
        self._started, self._pictures_before = time.monotonic(), self.pictures

    def line(self) -> str:
        total = self.plan.table.num_rows
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self.pictures - self._pictures_before) / seconds
        eta = f"{(total - self.pictures) / rate:.0f} s" if rate else "?"
        return (
            f"shards {self.shards}/{len(self.plan.shards)}  images {self.pictures:,}/{total:,}  "
            f"{rate:.0f} img/s  ETA {eta}  rejected {len(self.rejected)}"
        )

    @contextmanager
    def printed(self) -> Iterator[None]:
        """A line every few seconds, from a thread: shards may take longer than that."""
        stop = threading.Event()

        def speak() -> None:
            while not stop.wait(_PROGRESS_SECONDS):
                print(self.line(), flush=True)

        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        try:
            yield
        finally:
            stop.set()
            speaker.join()
        print(self.line(), flush=True)
