"""Checkpoints on their way to storage, and which of them stay there.

They are written and uploaded behind the training's back, one at a time, so that a slow store costs
no steps and the local disk never holds more than one. The files of one go first, its hashes.json
last: whatever is killed in between leaves a folder that nobody takes for a checkpoint.
"""

import contextlib
import functools
import json
import logging
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from alexnet.errors import UserError
from pipelines import storage
from training import checkpoint

logger = logging.getLogger("training")

_PREFIX = "checkpoint-"
_LAST = "hashes.json"
_LONGEST_PAUSE = 20.0  # seconds between two tries


class Uploader:
    """Takes checkpoints of one run to `run`, a folder or s3:// prefix, and deletes those that are
    not kept.

    patience: seconds for which a store that fails is tried again. check: raises what ends the
    training where another writer has taken the run; called before anything is written or deleted.
    stored: called in the background with the step of each checkpoint that arrived.
    As a context manager it waits at the end for what is under way.
    """

    def __init__(
        self,
        run: str,
        *,
        keep_last: int,
        keep_best: int,
        patience: float = 300.0,
        check: Callable[[], None] = lambda: None,
        stored: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._run, self._keep_last, self._keep_best = run, keep_last, keep_best
        self._patience, self._check, self._tell_stored = patience, check, stored
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._under_way: Future[Any] | None = None
        self._stored: int | None = None  # the last step that arrived
        self._has_complained = False  # that old ones stay

    def send(self, write: Callable[[], Path]) -> Future[str]:
        """In the background: uploads the checkpoint folder that `write` makes, and deletes it; its
        name below `run` is known once it is stored. Waits for the one before. Raises UserError when
        that one could not be stored."""
        self.wait()
        sent = self._pool.submit(self._upload, write)
        self._under_way = sent
        return sent

    def tidy(self, newest: str) -> None:
        """Deletes in the background what a killed run left beside `newest`, the checkpoint that
        this one goes on from."""
        self.wait()
        self._under_way = self._pool.submit(self._prune, newest)

    def wait(self) -> None:
        """Returns when nothing is under way. Raises UserError when it could not be stored."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except UserError as failed:
            if kind is None:
                raise
            logger.error(str(failed))  # must not hide what ended the run
        finally:
            self._pool.shutdown()

    def _upload(self, write: Callable[[], Path]) -> str:
        folder = write()
        try:
            step = int(checkpoint.load_state(folder)["step"])
            name = f"{_PREFIX}{step:08d}-{secrets.token_hex(3)}"  # a repeated step: another folder
            for path in sorted(folder.iterdir(), key=lambda path: path.name == _LAST):
                self._patiently(self._check)
                target = storage.join(self._run, name, path.name)
                self._patiently(functools.partial(storage.write, target, path.read_bytes()))
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} vanished; keep this host's temporary folder from being cleaned, "
                "or set TMPDIR to another one, and run the same command again"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._stored = step
        self._tell_stored(step)
        self._prune(name)
        return name

    def _prune(self, newest: str) -> None:
        try:
            self._check()
            prune(self._run, newest, keep_last=self._keep_last, keep_best=self._keep_best)
        except (UserError, OSError) as error:  # the next upload tries again
            if not self._has_complained:
                logger.warning(f"old checkpoints stay for now: {error}")
            self._has_complained = True

    def _patiently(self, write: Callable[[], None]) -> None:
        """Calls `write` until it succeeds. Raises UserError when patience ends."""

        def goes_on(error: Exception, tries: int, seconds: float) -> bool:
            if not isinstance(error, UserError | OSError):
                return False
            if seconds > self._patience:
                step = self._stored
                safe = "none is stored" if step is None else f"step {step} is stored"
                raise UserError(
                    f"a checkpoint could not be stored for {self._patience:.0f} s ({error}); "
                    f"{safe} by this worker group; mend the store and run the same command again"
                ) from error
            logger.warning(f"a checkpoint cannot be stored ({error}); trying again")
            return True

        storage.patiently(write, goes_on, _LONGEST_PAUSE)


def prune(run: str, newest: str, *, keep_last: int, keep_best: int) -> None:
    """Deletes checkpoints below `run` but `newest` (the folder that was just stored), the
    `keep_last` of the highest steps and the `keep_best` of the highest val_top1.

    What is no whole checkpoint goes too, as uploads that were killed leave it, and so do others of
    newest's step or later ones: the run went back behind them because they were damaged.
    """
    files: dict[str, set[str]] = {}
    for name, _ in storage.list_files(run):
        folder, slash, file = name.partition("/")
        if slash and folder.startswith(_PREFIX):
            files.setdefault(folder, set()).add(file)
    if not storage.is_s3(run):  # one that was killed in its first file has none that is listed
        for path in Path(run).glob(f"{_PREFIX}*/"):
            files.setdefault(path.name, set())
    complete = [folder for folder in files if {_LAST, "state.json"} <= files[folder]]
    whole = {folder: state for folder in complete if (state := _state(run, folder)) is not None}
    if newest not in whole:
        return  # the store does not show it yet: nothing is known to be safe to delete
    kept = _kept(whole, newest, keep_last, keep_best)
    for folder in files.keys() - kept:
        for file in sorted(files[folder], key=lambda name: name != _LAST):  # no checkpoint any more
            storage.delete(storage.join(run, folder, file))
        if not storage.is_s3(run):
            with contextlib.suppress(OSError):  # a temporary file of a killed writer may lie in it
                shutil.rmtree(Path(run) / folder)


def _kept(
    states: dict[str, dict[str, Any]], newest: str, keep_last: int, keep_best: int
) -> set[str]:
    here = states[newest]["step"]
    past = [folder for folder, state in states.items() if state["step"] < here]
    last = [*sorted(past, key=lambda folder: (states[folder]["step"], folder)), newest]
    best = sorted(
        # Checkpoints inside an epoch carry the figures of the evaluation before them: not theirs.
        (
            folder
            for folder in last
            if "val_top1" in states[folder]["metrics"]
            and states[folder]["evaluated_step"] == states[folder]["step"]
        ),
        key=lambda name: (states[name]["metrics"]["val_top1"], states[name]["step"], name),
    )
    return {*last[-keep_last:], *best[max(0, len(best) - keep_best) :]}


def _state(run: str, folder: str) -> dict[str, Any] | None:
    """What matters here of state.json; None where it is damaged. Raises UserError where the store
    does not answer: that says nothing about the checkpoint."""
    text = storage.read(storage.join(run, folder, "state.json"))
    try:
        state = json.loads(text)
        return {name: state[name] for name in ("step", "metrics", "evaluated_step")}
    except (KeyError, TypeError, ValueError):
        return None
