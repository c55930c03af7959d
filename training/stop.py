"""How the driver waits for its workers, and how Ctrl-C ends them: the first one saves a checkpoint.

So does SIGTERM, which `ray job stop` and every supervisor send.
"""

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from alexnet.errors import UserError
from pipelines import command
from training import checkpoint, lease
from training.worker import ask_to_stop, has_begun, said

_SECONDS = 60.0  # for a checkpoint
_JOB_SECONDS = 3.0  # Ray's own: SIGKILL so long after the SIGTERM of `ray job stop`
_END_SECONDS = 2.0  # to leave Ray and tell MLflow
_ASK_SECONDS = 2.0
_START_SECONDS = 60.0  # of the workers, before they are missed

logger = logging.getLogger("training")

_Outcome = queue.Queue[BaseException | None]
_Answer = TypeVar("_Answer")


class Stopped(KeyboardInterrupt):
    """The workers were asked to save and end; the text says what came of it."""


def fit(train: Callable[[], object], writer: lease.Lease) -> None:
    """`train()` in a thread of its own: in the main thread, Ray would answer Ctrl-C itself and end
    the process with exit code 0. Main thread only.

    Raises what it raises, Superseded when the lease is lost, Stopped after a Ctrl-C that workers
    could hear, KeyboardInterrupt after any other.
    """
    outcome: _Outcome = queue.Queue()

    def run() -> None:
        try:
            train()
        except BaseException as error:  # handed to the main thread, which raises it
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    try:
        if not _wait(outcome, writer, _START_SECONDS):
            if not _soon(lambda: has_begun(writer.token)):
                logger.info(
                    "no worker has started yet; `ray status` shows what the cluster is short of, "
                    "--ray-logs True what Ray says"
                )
            _wait(outcome, writer)
    except command.KINDS:
        if not _soon(lambda: ask_to_stop(writer.token)):
            raise
        _stop(outcome, writer)


def _wait(outcome: _Outcome, writer: lease.Lease, seconds: float = math.inf) -> bool:
    """Whether it ended well in that time. Raises what it ended with, and Superseded."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        writer.check()
        with contextlib.suppress(queue.Empty):
            error = outcome.get(timeout=min(1.0, seconds))
            if error is None:
                return True
            told = said(error)
            raise told if isinstance(told, lease.Superseded) else error
    return False


def _stop(outcome: _Outcome, writer: lease.Lease) -> None:
    seconds = seconds_to_stop()
    logger.info(
        f"stopping: saving a checkpoint first (at most {seconds:g} s; Ctrl-C again ends at once)"
    )
    saved = _wait(outcome, writer, seconds)
    step = _soon(lambda: checkpoint.last_step(writer.run))
    if saved:
        raise Stopped(f"stopped at step {step}, saved")
    stored = "none is stored" if step is None else f"step {step} is stored"
    raise Stopped(f"no checkpoint could be saved in {seconds:g} s, {stored}")


def seconds_to_stop() -> float:
    """For a checkpoint after the first Ctrl-C; in a Ray job what it leaves of its own patience."""
    if lease.job_id() is None:
        return _SECONDS
    allowed = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "")
    until_killed = float(allowed) if allowed.isdecimal() else _JOB_SECONDS
    return max(1.0, min(_SECONDS, until_killed - _END_SECONDS))


def _soon(ask: Callable[[], _Answer]) -> _Answer | None:
    """What `ask` answers; None where the head or the store that it asks is not there: Ctrl-C must
    not wait for them."""
    answers: queue.Queue[_Answer | None] = queue.Queue()

    def answer() -> None:
        try:
            answers.put(ask())
        except UserError:
            answers.put(None)

    threading.Thread(target=answer, name="soon", daemon=True).start()
    try:
        return answers.get(timeout=_ASK_SECONDS)
    except queue.Empty:
        return None
