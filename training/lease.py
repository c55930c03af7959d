"""A run has one writer: a lease in its storage, RUN/writer/000001.json, 000002.json, …

The highest number holds. Each is published once, so of two that want the same number one gets it,
and counted up by its holder while that lives. The next number is free when the holder has ended,
is dead (a process of this machine that is gone) or silent: the same count for _SILENT_SECONDS of
the observer's own steady clock, since those of machines differ, and jump. The last number stays, so
that a holder who was suspended meanwhile meets a higher one.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from alexnet.errors import UserError
from pipelines import storage

_RENEW_SECONDS = 10.0
_SILENT_SECONDS = 3 * _RENEW_SECONDS
_POLL_SECONDS = 1.0
_END_SECONDS = 5.0  # for the last word to a store that may be away

logger = logging.getLogger("training")


class Superseded(Exception):
    """Another writer has taken the run over; the text says who, in one line."""


# Printable: it is shown in one line of a log.
_Line = Annotated[str, Field(max_length=300, pattern=r"^[^\p{C}\p{Zl}\p{Zp}]*$")]


@dataclass(frozen=True)
class Writer:
    """What the file of a lease holds. system: which machine, since when it is up, and which of its
    pid namespaces; started: of the process, by the machine's own count; since: by the holder's
    clock, to be shown only."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    host: _Line
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    user: _Line
    job: _Line | None
    since: _Line
    system: _Line
    started: _Line
    token: _Line
    renewed: int = 0
    ended: bool = False

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.host}, pid {self.pid} ({self.user}{job}) since {self.since}"


class Lease:
    """Of one writer on `run`, a folder or s3:// prefix. State: whether somebody took it."""

    def __init__(self, run: str, number: int, writer: Writer) -> None:
        self.run, self.number, self.token = run, number, writer.token
        self._writer, self._lost = writer, ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def check(self) -> None:
        """Raises Superseded once it is known that somebody else took the run."""
        if self._lost:
            raise Superseded(self._lost)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(_END_SECONDS)  # not told in time, it is found dead or silent

    def _keep(self) -> None:
        away = False
        while not self._done.wait(_RENEW_SECONDS):
            try:
                self._renew(ended=False)
                away = False
            except Superseded as lost:
                self._lost = str(lost)
                return
            except UserError as error:  # the run is lost to another writer only, not to an outage
                if not away:
                    logger.warning(f"the lease of this run cannot be renewed for now: {error}")
                away = True
        with contextlib.suppress(UserError, Superseded):
            self._renew(ended=True)

    def _renew(self, *, ended: bool) -> None:
        refuse_superseded(self.run, self.number, self.token)
        renewed = self._writer.renewed + 1
        self._writer = dataclasses.replace(self._writer, renewed=renewed, ended=ended)
        storage.write(_place(self.run, self.number), _packed(self._writer))


def held(run: str) -> Lease:
    """The lease on `run`, to be entered and left. Waits where its holder may be dead; raises
    UserError where it lives."""
    me, seen, since = _this_process(), None, time.monotonic()
    while True:
        number, holder = newest = _newest(run)
        if holder is not None and (alive := _is_alive(holder)) is not False:
            if alive or (seen is not None and newest != seen):
                raise _refused(run, holder)
            if seen is None:
                seen = newest
                logger.warning(
                    f"run {_name(run)} is held by {holder}; waiting up to {_SILENT_SECONDS:.0f} s "
                    "to see whether it is alive"
                )
            if time.monotonic() - since < _SILENT_SECONDS:
                time.sleep(_POLL_SECONDS)
                continue
        if _published(run, number + 1, me):
            storage.sweep(storage.join(run, "writer"))
            for older in _numbers(run):
                if older <= number:
                    storage.delete(_place(run, older))
            return Lease(run, number + 1, me)


def holder(run: str) -> str | None:
    """Who may be writing `run` now; None where nobody is. Raises UserError as `held` where it would
    be refused."""
    _, writer = _newest(run)
    if writer is None or (alive := _is_alive(writer)) is False:
        return None
    if alive:
        raise _refused(run, writer)
    return str(writer)


def refuse_superseded(run: str, number: int, token: str) -> None:
    """Raises Superseded where another writer than the one of `number` holds `run`."""
    highest, writer = _newest(run)
    if writer is not None and highest >= number and writer.token != token:
        raise Superseded(
            f"run {_name(run)} was taken over by {writer}, since this one had fallen silent; it "
            "goes on there"
        )


def job_id() -> str | None:
    """Of the Ray job that this process is the command of."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    found = (job.get("metadata") or {}).get("job_submission_id")
    return None if found is None else str(found)


def _refused(run: str, holder: Writer) -> UserError:
    end = f"`ray job stop {holder.job}`" if holder.job else f"`kill {holder.pid}` there"
    return UserError(
        f"run {_name(run)} is being written by {holder}; wait for its end, stop it with {end}, or "
        "choose another --name"
    )


def _name(run: str) -> str:
    return run.rpartition("/")[2]


def _place(run: str, number: int) -> str:
    return storage.join(run, "writer", f"{number:06d}.json")


def _numbers(run: str) -> list[int]:
    files = [name for name, _ in storage.list_files(storage.join(run, "writer"))]
    found = [re.fullmatch(r"([0-9]{6,18})\.json", name) for name in files]
    return sorted(int(match[1]) for match in found if match)


def _newest(run: str) -> tuple[int, Writer | None]:
    """The highest number and who holds it. Raises UserError where its file is none of ours."""
    while numbers := _numbers(run):
        place = _place(run, numbers[-1])
        try:
            return numbers[-1], _unpacked(place, storage.read(place))
        except UserError:
            if storage.exists(place):
                raise  # else a higher one has just taken its place
    return 0, None


def _packed(writer: Writer) -> bytes:
    return json.dumps(dataclasses.asdict(writer), indent=1).encode()


def _unpacked(place: str, data: bytes) -> Writer:
    try:
        return TypeAdapter(Writer).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        why = " ".join(f"{'.'.join(map(str, first['loc']))} {first['msg']}".split())[:80]
        raise UserError(
            f"{place} is damaged ({why}); delete it once no other command trains this run"
        ) from error


def _published(run: str, number: int, me: Writer) -> bool:
    """False where somebody else was faster."""
    place = _place(run, number)
    try:
        storage.write_new(place, _packed(me))
    except UserError:
        if storage.exists(place):
            return False
        raise
    # Read back: a store without conditional writes may have let two of them in.
    return (_newest(run)[1] or me).token == me.token


def _this_process() -> Writer:
    return Writer(
        host=socket.gethostname(),
        pid=os.getpid(),
        user=os.environ.get("USER") or f"uid {os.getuid()}",
        job=job_id(),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        system=_system(),
        started=(_process(os.getpid()) or ("", ""))[1],
        token=secrets.token_hex(16),
    )


def _system() -> str:
    """Two processes with the same one can judge by pid whether the other lives; "" where nothing
    tells, as on other systems than Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_alive(writer: Writer) -> bool | None:
    """None where that cannot be told from here, or where it is suspended."""
    if writer.ended:
        return False
    if not writer.system or writer.system != _system():
        return None
    if not storage.is_alive(writer.pid):
        return False
    found = _process(writer.pid)
    if found is None:  # hidden from us
        return None
    state, started = found
    if started != writer.started or state in "ZX":  # its number was given anew, or it is a zombie
        return False
    return None if state in "Tt" else True


def _process(pid: int) -> tuple[str, str] | None:
    """(state, start in clock ticks since the machine started) of a process; psutil's time of start
    moves with the wall clock."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]
