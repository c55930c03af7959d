"""Who is champion: the alias, its moves with who made them, when and why, and the way back."""

import datetime
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from alexnet.errors import UserError
from training import tracking
from training.lease import job_id
from training.registry.versions import (
    MISSING,
    NAME,
    Refused,
    aliases,
    resolve,
    verified,
    versions,
)

CHAMPION = "champion"
MOVES = "champion_moves"  # tag of the champion: JSON of `moves`
_LONGEST_HISTORY = 100  # champions, and moves
_LONGEST_WHY = 200  # characters of a move

Tags = Mapping[str, str | None]  # None removes one


def rollback(
    client: MlflowClient, name: str = NAME, *, why: str | None = None, dry_run: bool = False
) -> tuple[str, str]:
    """Gives the alias back to the champion before: (the version that had it, that has it now).

    Each champion knows those before it, so that a second rollback goes one further back. Raises
    Refused where there is none, and where its files are not what was registered.
    """
    champion = aliases(client, name).get(CHAMPION)
    if champion is None:
        raise Refused("there is no champion to roll back; promote one first")
    before = champions_before(client, name, champion)[:-1]
    if not before:
        raise Refused(f"champion {champion} had none before it; promote another version instead")
    target = str(resolve(client, before[-1], name).version)
    try:
        with verified(f"models:/{name}/{target}"):  # its own code serves it, not this program's
            pass
    except UserError as error:
        raise Refused(f"the champion before: {error}; or promote another version") from error
    if not dry_run:
        move = {"at": now(), "version": target, "how": "restored", "by": actor(), "why": why}
        restored = {"restored_at": move["at"], "restored_by": move["by"]}
        tags = {**history(before[:-1]), **restored, **moved(client, name, move)}
        move_champion(client, champion, target, tags, name)
    return champion, target


def move_champion(
    client: MlflowClient, before: str | None, after: str, tags: Tags, name: str = NAME
) -> None:
    """Points the alias from version `before` (None: nowhere) to `after`, which gets `tags` first:
    they mean nothing until it is the champion, so that a kill anywhere leaves the champion before
    or the one after, whole.

    Raises Refused where somebody else has moved it. MLflow sets an alias unconditionally: of two
    who do so within the same moment, the later one wins.
    """
    refuse_moved(client, name, before)
    write_tags(client, name, after, tags)
    refuse_moved(client, name, before)
    client.set_registered_model_alias(name, CHAMPION, after)


def refuse_moved(client: MlflowClient, name: str, before: str | None) -> None:
    """Raises Refused where the champion is another than `before`."""
    held = aliases(client, name).get(CHAMPION)
    if held != before:
        was, now = ("none" if v is None else f"version {v}" for v in (before, held))
        raise Refused(f"{CHAMPION} changed from {was} to {now} meanwhile; promote again")


def write_tags(client: MlflowClient, name: str, version: str, tags: Tags) -> None:
    for key, value in tags.items():
        if value is not None:
            client.set_model_version_tag(name, version, key, value)
            continue
        try:
            client.delete_model_version_tag(name, version, key)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise


def champions_before(client: MlflowClient, name: str, champion: str | None) -> list[str]:
    """The champions so far, oldest first, `champion` last."""
    if champion is None:
        return []
    tags = client.get_model_version(name, champion).tags
    return [*str(tags.get("champions_before", "")).split(), champion]


# Tags of a version that is about to be champion. Without effect until it is: only those of the
# present champion count, so that no other write has to happen together with the alias.


def history(before: Sequence[str], best: str | None = None) -> Tags:
    """best: a champion that is never left out of the list."""
    kept = list(before[-_LONGEST_HISTORY:])
    if best is not None and best not in kept:
        kept[0] = best
    return {
        "champions_before": " ".join(kept) or None,
        "previous_champion": before[-1] if before else None,
    }


def moved(client: MlflowClient, name: str, move: Mapping[str, str | None]) -> Tags:
    """All moves so far and this one, as `moves` has them."""
    why = (move.get("why") or "")[:_LONGEST_WHY] or None
    listed = [*moves(client, name), {**move, "why": why}]
    return {MOVES: json.dumps(listed[-_LONGEST_HISTORY:], ensure_ascii=False)}


def moves(client: MlflowClient, name: str = NAME) -> list[dict[str, Any]]:
    """How the alias came to the present champion, oldest first: at (UTC), version, how (promoted,
    forced, approved or restored), by, why. None is what nobody knows, as of earlier releases.

    Raises UserError where the champion's tag is damaged.
    """
    champion = aliases(client, name).get(CHAMPION)
    if champion is None:
        return []
    text = client.get_model_version(name, champion).tags.get(MOVES)
    if text is None:
        there = {str(version.version): version.tags for version in versions(client, name)}
        return [
            {
                "at": there.get(number, {}).get("promoted_at"),
                "version": number,
                "how": "promoted",
                "by": None,
                "why": None,
            }
            for number in champions_before(client, name, champion)
        ]
    try:
        found: list[dict[str, Any]] = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"tag {MOVES} of version {champion} is not valid JSON ({error}); delete it, and the "
            "history begins anew"
        ) from error
    return found


def actor() -> str:
    """Who runs this, on which host, and in which Ray job, if in any."""
    job = job_id()
    return f"{tracking.user()}@{socket.gethostname()}" + (f", Ray job {job}" if job else "")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
