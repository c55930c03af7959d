"""An alias is moved as a whole or not at all, and only from where it was believed to be.

MLflow sets aliases unconditionally. What it does only once is to create a registered model of a
given name: the model `alexnet-champion-move` exists while somebody moves the champion. It is the
lock, and with its tags the journal that says how to undo the move if its holder died.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from alexnet.errors import UserError
from training.registry.versions import NAME, aliases
from training.tracking import FAILURES

# A holder changes nothing any more after _LEASE_SECONDS. What it sent just before may take twice
# MLflow's limit of ten seconds. Who has seen the same holder for STALE_SECONDS may settle what it
# left: by the seer's own steady clock, since those of machines differ, and jump.
_LEASE_SECONDS = 30.0
STALE_SECONDS = 60.0
_POLL_SECONDS = 0.25

logger = logging.getLogger("training")

Tags = Mapping[str, str | None]


class Refused(Exception):
    """The gate's no; the text is the reason, in one line."""


def move(client: MlflowClient, alias: str, before: str | None, after: str, tags: Tags) -> None:
    """Points `alias` from version `before` (None: nowhere) to `after`, which gets `tags` (None
    removes one): either both happen or neither.

    Waits while another move goes on. Raises Refused where the alias is no longer at `before`. When
    MLflow fails half-way, the move is settled at once or, if that fails too, by the next `settle`.
    """
    taken = _take(client, alias, before, after, tags)
    try:
        held = aliases(client).get(alias)
        if held == before:
            write_tags(client, after, tags)
            _check_lease(taken)
            client.set_registered_model_alias(NAME, alias, after)
    except BaseException:
        with contextlib.suppress(*FAILURES):  # the first failure is the one to tell
            _settle(client, taken)
        raise
    _release(client, taken)
    if held != before:
        raise Refused(
            f"{alias} changed from {_named(before)} to {_named(held)} meanwhile; promote again"
        )


def write_tags(client: MlflowClient, version: str, tags: Tags) -> None:
    """None removes a tag."""
    for key, value in tags.items():
        if value is not None:
            client.set_model_version_tag(NAME, version, key, value)
        else:
            with _unless_missing():
                client.delete_model_version_tag(NAME, version, key)


def settle(client: MlflowClient, alias: str) -> "Move | None":
    """Waits while somebody moves the alias, and finishes or undoes what was left half-moved. The
    move that it had to finish, if any."""
    first: Move | None = None
    while (held := _journal(client, alias)) is not None:
        if first is None or held.holder != first.holder:
            first = held
            logger.warning(
                f"waiting: {held} is being moved; left so, it is settled in {STALE_SECONDS:.0f} s"
            )
        if time.monotonic() - first.taken > STALE_SECONDS:
            return held if _settle(client, held) else None
        time.sleep(_POLL_SECONDS)
    return None


def unfinished(client: MlflowClient, alias: str) -> str | None:
    """A line about a move that goes on or was left, None where there is none."""
    found = _journal(client, alias)
    if found is None:
        return None
    age = max(0.0, time.time() - found.created)
    return f"a move of {found} is unfinished for {age:.0f} s"


@dataclass(frozen=True)
class Move:
    """What the lock of one says; was: the tags of `after` that the move replaces, as they were."""

    alias: str
    holder: str
    before: str | None
    after: str
    was: Tags
    created: float  # seconds since 1970, by the clock of the store
    taken: float = field(default_factory=time.monotonic)  # read or written by this process

    @property
    def lock(self) -> str:
        return _lock(self.alias)

    def __str__(self) -> str:
        return f"{self.alias} from {_named(self.before)} to version {self.after}"


def _lock(alias: str) -> str:
    return f"{NAME}-{alias}-move"


def _named(version: str | None) -> str:
    return "none" if version is None else f"version {version}"


def _take(client: MlflowClient, alias: str, before: str | None, after: str, tags: Tags) -> Move:
    """Waits for the lock. Creating it with its tags is one transaction of the store."""
    holder = uuid.uuid4().hex
    while True:
        mine = Move(alias, holder, before, after, _tags(client, after, tags), time.time())
        try:
            client.create_registered_model(_lock(alias), tags=_as_tags(mine), description=f"{mine}")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            held = _journal(client, alias)
            # With our name it was sent twice, since the first answer was lost.
            if held is None or held.holder != holder:
                settle(client, alias)
                continue
        if _tags(client, after, tags) == mine.was:
            return mine
        _release(client, mine)  # read in the middle of a move that was undone since


def _tags(client: MlflowClient, version: str, keys: Iterable[str]) -> Tags:
    now = client.get_model_version(NAME, version).tags
    return {key: now.get(key) for key in keys}


_WAS = "was."


def _as_tags(journal: Move) -> dict[str, str]:
    """Values that were not there are not among the tags; their keys are in `keys`."""
    return {
        "holder": journal.holder,
        "from": journal.before or "",
        "to": journal.after,
        "keys": " ".join(journal.was),
        **{_WAS + key: value for key, value in journal.was.items() if value is not None},
    }


def _journal(client: MlflowClient, alias: str) -> Move | None:
    try:
        lock = client.get_registered_model(_lock(alias))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    try:
        return Move(
            alias=alias,
            holder=lock.tags["holder"],
            before=lock.tags["from"] or None,
            after=lock.tags["to"],
            was={key: lock.tags.get(_WAS + key) for key in lock.tags["keys"].split()},
            created=lock.creation_timestamp / 1000,
        )
    except KeyError as error:
        raise UserError(
            f"registered model {lock.name} is no journal of a move (tag {error} is missing); "
            "delete it in MLflow"
        ) from error


def _check_lease(journal: Move) -> None:
    spent = time.monotonic() - journal.taken
    if spent > _LEASE_SECONDS:
        raise UserError(
            f"moving {journal} took {spent:.0f} s, more than {_LEASE_SECONDS:.0f}: others may "
            "have gone on; run the command again"
        )


def _settle(client: MlflowClient, journal: Move) -> bool:
    """The tags are written before the alias moves: where it has moved, all is done. True there."""
    done = aliases(client).get(journal.alias) == journal.after
    if done:
        logger.warning(f"finished an interrupted move of {journal}")
    else:
        with _unless_missing():  # a version that was deleted
            write_tags(client, journal.after, journal.was)
        logger.warning(f"undid an interrupted move of {journal}")
    _release(client, journal)
    return done


def _release(client: MlflowClient, journal: Move) -> None:
    """Somebody may have settled this move and begun another one: that lock is theirs."""
    found = _journal(client, journal.alias)
    if found is not None and found.holder == journal.holder:
        with _unless_missing():
            client.delete_registered_model(journal.lock)


@contextlib.contextmanager
def _unless_missing() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
