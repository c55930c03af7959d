"""Work of threads that runs ahead of its consumer, by a bounded number of bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

_JOIN_SECONDS = 2.0  # given to requests under way at the end; the threads are daemons

Job = TypeVar("Job")
Item = TypeVar("Item")
Room = Callable[[int], bool]  # waits until so many bytes may be held; False: stop, nobody listens


@dataclass
class _Task(Generic[Job, Item]):
    job: Job
    ready: deque[tuple[int, list[Item]]] = field(default_factory=deque)  # with the bytes held
    error: Exception | None = None
    finished: bool = False


class Ahead(Generic[Job, Item]):
    """Runs `work` for every job in threads; iterating gives its items, in the order of the jobs.

    `work(job, room)` asks `room(bytes)` before it fetches so many, and then yields the list of
    items that came with them. At most `limit` bytes are held, or those of one list where that
    is larger. What `work` raises is raised to the consumer, in its turn. The threads end with the
    iterator, or with `close`.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        work: Callable[[Job, Room], Iterator[list[Item]]],
        threads: int,
        limit: int,
    ) -> None:
        self.wait_seconds = 0.0  # that the consumer spent waiting for items
        self._tasks = deque(_Task[Job, Item](job) for job in jobs)
        self._unstarted = deque(self._tasks)
        self._work = work
        self._limit = limit
        self._held = 0
        self._closed = False
        self._change = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"ahead-{number}", daemon=True)
            for number in range(min(threads, len(self._tasks)))
        ]

    def __iter__(self) -> Iterator[Item]:
        try:
            for thread in self._threads:
                thread.start()
            while self._tasks:
                while (taken := self._next(self._tasks[0])) is not None:
                    held, items = taken
                    yield from items
                    self._release(held)
                with self._change:
                    self._tasks.popleft()
                    self._change.notify_all()  # another task is the first now
        finally:
            self.close()

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            if thread.ident is not None:  # was started
                thread.join(max(0.0, deadline - time.monotonic()))

    def _next(self, task: _Task[Job, Item]) -> tuple[int, list[Item]] | None:
        started = time.perf_counter()
        with self._change:
            self._change.wait_for(lambda: task.ready or task.finished or self._closed)
        self.wait_seconds += time.perf_counter() - started
        if task.ready:
            return task.ready.popleft()
        if task.error is not None:
            raise task.error
        return None

    def _run(self) -> None:
        while (task := self._start()) is not None:
            held: list[int] = []
            try:
                for items in self._work(task.job, partial(self._room, task, held)):
                    with self._change:
                        task.ready.append((held.pop(), items))
                        self._change.notify_all()
            except Exception as error:  # raised again where its items are taken
                task.error = error
            with self._change:
                task.finished = True
                self._change.notify_all()

    def _start(self) -> _Task[Job, Item] | None:
        with self._change:
            return None if self._closed or not self._unstarted else self._unstarted.popleft()

    def _room(self, task: _Task[Job, Item], held: list[int], num_bytes: int) -> bool:
        """The task that the consumer waits for always gets room, or nothing would ever move."""

        def free() -> bool:
            needed = bool(self._tasks) and task is self._tasks[0] and not task.ready
            return self._closed or needed or self._held + num_bytes <= self._limit

        with self._change:
            self._change.wait_for(free)
            if not self._closed:
                self._held += num_bytes
                held.append(num_bytes)
            return not self._closed

    def _release(self, num_bytes: int) -> None:
        with self._change:
            self._held -= num_bytes
            self._change.notify_all()
