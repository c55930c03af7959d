"""The door of every program: exit codes, Ctrl-C, one line for a mistake, and output that no reader,
disk or terminal can turn into a traceback.

A program calls `begin` before its heavy imports (this module takes milliseconds), lets `answered`
turn what its work raises into an exit code, and leaves by `leave`. What it imports only for some of
its work, it imports in `importing`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import itertools
import os
import pwd
import re
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from alexnet.errors import UserError

FAILED, WRONG, INTERRUPTED = 1, 2, 130
UNREAD = 141  # as a shell says of a program that died of a closed pipe
# What Ctrl-C and SIGTERM raise: since it was joined, Ray answers SIGTERM in its own way.
KINDS = (KeyboardInterrupt, SystemExit)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_at_once: Any = None  # the handler of `begin`
_noted: set[str] = set()
_noting = threading.Lock()


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, like every other; argparse would print its usage first. A flag
    that it does not know comes before what is missing, such as the flag that was meant. A
    description keeps its lines."""

    def __init__(self, prog: str | None = None, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        here = [*itertools.takewhile(lambda word: word != "--", words)]
        if self._subparsers is not None:  # whose own flags follow the command's name
            here = [*itertools.takewhile(lambda word: word.startswith("-"), here)]
        known = list(self._option_string_actions)
        told, meant = [], []
        for word, following in itertools.zip_longest(here, here[1:], fillvalue="-"):
            flag = word.partition("=")[0]
            short = self.allow_abbrev and any(name.startswith(flag) for name in known)
            if not re.fullmatch(r"--?[A-Za-z][\w.-]*", flag) or flag in known or short:
                continue
            told += [word] if "=" in word or following.startswith("-") else [word, following]
            meant += difflib.get_close_matches(flag, known, 1)
        if told:
            hint = f" for {' and '.join(dict.fromkeys(meant))}" if meant else ""
            line = f"unrecognized arguments: {' '.join(told)}"
            raise UserError(f"{line}; see `{self.prog} --help`{hint}")
        return super().parse_known_args(words, namespace)


class Unread(OSError):
    """stdout takes nothing more: its reader has left, or its disk is full."""


def begin(stopped: str = "interrupted") -> None:
    """What holds for the whole process. Until `answered`, Ctrl-C and SIGTERM (of `ray job stop` and
    every supervisor) end it at once with the line `stopped`: nothing has begun, and libraries that
    are half imported would say much."""

    def end(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):  # stderr; by its number, since it may be in use just now
            os.write(2, f"{stopped}\n".encode())
        os._exit(INTERRUPTED)

    global _at_once
    _at_once = end
    for number in _SIGNALS:
        signal.signal(number, end)
    _open_missing()
    sys.stdout = _text(sys.stdout, _Output(1, "w", closefd=False))
    sys.stderr = _text(sys.stderr, _Output(2, "w", closefd=False))
    _find_home()
    # A class name in letters that matplotlib's font has not is drawn as boxes, and that is all.
    warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
    try:
        Path.cwd()
    except OSError as error:
        _report(f"error: the current folder: {error.strerror}; change into one that exists")
        os._exit(WRONG)


def answered(
    work: Callable[[], int],
    *,
    stopped: str = "interrupted",
    failed: Mapping[type[Exception], str] | None = None,
) -> int:
    """The exit code of `work`, or that of what it raised, which is told in one line on stderr.

    failed: exceptions that mean exit code 1, with the first word of their line. Limits of the
    machine are told as well; whatever else is raised is a defect and keeps its traceback. --help's
    SystemExit and Unread pass, for `leave`.
    """
    try:
        with raised():
            return work()
    except UserError as error:
        _report(f"error: {error}")
        return WRONG
    except KINDS as left:
        if isinstance(left, SystemExit) and left.code in (None, 0):
            raise
        _report(stopped)
        return INTERRUPTED
    except Exception as error:  # raised again, but for what `failed` names and the machine's limits
        for kind, word in (failed or {}).items():
            if isinstance(error, kind):
                _report(f"{word}: {UserError(error)}")
                return FAILED
        if (limit := _limit(error)) is None:
            raise
        _report(f"error: {UserError(limit)}")
        return WRONG


def leave(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of `main`. A main that only answers has failed when its
    answer found no reader (141) or no room (1), in silence; who works tells by `say`."""
    code = 0
    try:
        with contextlib.suppress(SystemExit):  # of --help
            code = answered(main)
        sys.stdout.flush()
    except Unread as error:
        _mute()
        code = code or (UNREAD if error.errno == errno.EPIPE else FAILED)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # too late: what is left is the libraries' own end
    if code == INTERRUPTED:
        # Threads of Ray may still be in C++ when Ctrl-C comes, and crash an orderly exit.
        os._exit(code)
    sys.exit(code)


def say(text: str, end: str = "\n") -> None:
    """A line of a program whose work matters more than its words: when nobody can read it, that and
    all later ones are left out, and the work goes on."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        _mute()


def note(text: str, about: str) -> None:
    """A line on stderr of what goes on without something that a file system or a store does not
    offer: the first time that this process has one about `about`."""
    with _noting:
        if about in _noted:
            return
        _noted.add(about)
    with contextlib.suppress(OSError):  # a stderr that is closed or full ends no work
        print(f"note: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt inside. Only in the main thread."""
    with _handled(signal.default_int_handler):
        yield


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Heavy imports within `answered`: inside, Ctrl-C and SIGTERM end the process at once, as they
    do before it."""
    with _handled(_at_once or signal.default_int_handler):
        yield


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class _Output(io.FileIO):
    """File descriptor 1 or 2. That it takes nothing more is an error for stdout and its main thread
    alone: what libraries print in threads of their own is no reason to end anything, and if it is
    stderr, there is nobody left to tell."""

    muted = False

    def write(self, data: Any) -> int:
        try:
            return len(data) if self.muted else super().write(data)
        except OSError as error:
            if self.fileno() == 2 or threading.current_thread() is not threading.main_thread():
                return len(data)
            raise Unread(error.errno, error.strerror) from error


def _text(before: Any, raw: io.FileIO) -> io.TextIOWrapper:
    """As the stream that Python made, but what the terminal cannot show is escaped, as are the
    bytes of file names that are no text."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",
        line_buffering=before is not None and (before.line_buffering or before.write_through),
    )


def _open_missing() -> None:
    """Descriptors that were closed (`>&-`) would go to the first file or socket that is opened, and
    what C libraries print would go there. stdin and stdout refuse, as if still closed."""
    for number, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free


def _find_home() -> None:
    """A home folder and a user's name, which libraries ask for as they are imported, also where the
    system knows none: a uid without a passwd entry, as in containers."""
    try:
        known = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        known = os.environ.get("ALEXNET_HOME") or os.devnull  # holds nothing, ever
        if not any(map(os.environ.get, ("LOGNAME", "USER"))):
            os.environ["LOGNAME"] = f"uid{os.getuid()}"
    os.environ["HOME"] = str(Path(os.environ.get("HOME") or known).absolute())
    if (given := os.environ.get("ALEXNET_HOME")) and not os.access(os.environ["HOME"], os.W_OK):
        # Without a folder for its list of fonts, matplotlib complains.
        os.environ.setdefault("MPLCONFIGDIR", str(Path(given).absolute() / "matplotlib"))


def _limit(error: BaseException) -> str | None:
    """What this machine has too little of, with the remedy; None where it is something else."""
    if isinstance(error, MemoryError):
        return f"out of memory ({error or 'no more is to be had'}); give this more of it"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"more than {files} open files are not allowed; raise that with `ulimit -n 4096`"
    forked = isinstance(error, BlockingIOError) and error.errno == errno.EAGAIN
    if forked or "can't start new thread" in str(error):
        processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        allowed = "" if processes == resource.RLIM_INFINITY else f" (allowed are {processes})"
        return f"no more processes or threads can be started{allowed}; raise that with `ulimit -u`"
    return None


def _report(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def _mute() -> None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Output):
        raw.muted = True
