"""The gate between a candidate and the champion, and the way back."""

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import get_model_info
from mlflow.tracking import MlflowClient

from alexnet.errors import UserError
from pipelines import shards, storage
from training import tracking
from training.accuracy import Scored
from training.evaluate import score
from training.network import LoadedModel, check_fits
from training.registry import alias, checks, verdict
from training.registry.alias import Refused, Tags
from training.registry.policy import SHIPPED, read_policy
from training.registry.verdict import Check, Verdict
from training.registry.versions import NAME, Registered, aliases, load, resolve, run_of, verified

CHAMPION = "champion"
_PICTURES_USED = 8  # by the check in a fresh process
_LONGEST_HISTORY = 100  # champions
_RESTORED = "restored_at"  # a tag that rollbacks set, and they alone


@dataclass(frozen=True)
class Asked:
    """data: where the shards are, if not where the run had them; workers, shared_fs: as `score`;
    policy: a file; force: a reason to promote whatever the checks of the scored model say."""

    data: str | None = None
    workers: int | None = None
    shared_fs: bool = False
    policy: str | None = None
    force: str | None = None
    dry_run: bool = False


def promote(client: MlflowClient, version: str | None, asked: Asked) -> Verdict | None:
    """Judges a version (number or alias, None: the candidate) and, where the verdict is not
    "refused", makes it the champion. None: it is the champion already.

    The verdict becomes artifacts of the run under gate/ and tags. A dry run changes nothing. Raises
    UserError for what cannot be judged, such as shards that are gone, and Refused where the
    champion changed meanwhile.
    """
    if not asked.dry_run:
        alias.settle(client, CHAMPION)
    candidate = resolve(client, version)
    number = str(candidate.version)
    champion = aliases(client).get(CHAMPION)
    if champion == number:
        return None
    run = run_of(client, candidate)
    if run is not None and run.info.lifecycle_stage != "active":
        raise UserError(
            f"the run {run.info.run_name} of version {number} "
            f"{tracking.deleted(client, run.info.run_id)}, for the verdict is kept with it"
        )
    found = _judge(client, candidate, champion, asked)
    if asked.dry_run:
        return found
    _log(client, candidate, found)
    tags = verdict.tags(found)
    if found.outcome == "refused":
        alias.write_tags(client, number, tags)
    else:
        tags |= {**_history(_champions_before(client, champion)), "promoted_at": found.at}
        alias.move(client, CHAMPION, champion, number, tags)
    return found


def rollback(client: MlflowClient, *, dry_run: bool = False) -> tuple[str, str]:
    """Gives the alias back to the champion before: (the version that had it, that has it now).

    Each champion knows those before it, so that a second rollback goes one further back; one that
    was interrupted after the alias had moved is told as done, and goes no further. Raises
    Refused where there is none, and where its files are not what was registered.
    """
    if not dry_run:
        done = alias.settle(client, CHAMPION)
        if done is not None and done.before is not None and _RESTORED in done.was:
            return done.before, done.after
    champion = aliases(client).get(CHAMPION)
    if champion is None:
        raise Refused("there is no champion to roll back; promote one first")
    before = _champions_before(client, champion)[:-1]
    if not before:
        raise Refused(f"champion {champion} had none before it; promote another version instead")
    target = resolve(client, before[-1])
    try:
        with verified(f"models:/{NAME}/{target.version}"):
            pass
    except UserError as error:
        raise Refused(f"the champion before: {error}; or promote another version") from error
    if not dry_run:
        tags = {**_history(before[:-1]), _RESTORED: _now()}
        alias.move(client, CHAMPION, champion, str(target.version), tags)
    return champion, str(target.version)


def _champions_before(client: MlflowClient, champion: str | None) -> list[str]:
    """The champions so far, oldest first, `champion` last."""
    if champion is None:
        return []
    tags = client.get_model_version(NAME, champion).tags
    return [*str(tags.get("champions_before", "")).split(), champion]


def _history(before: Sequence[str]) -> Tags:
    """Tags of a version that is about to be champion. Without effect until it is: only the present
    champion's list counts, so that no other write has to happen together with the alias."""
    return {
        "champions_before": " ".join(before[-_LONGEST_HISTORY:]) or None,
        "previous_champion": before[-1] if before else None,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _judge(
    client: MlflowClient, candidate: ModelVersion, champion: str | None, asked: Asked
) -> Verdict:
    number, run = str(candidate.version), run_of(client, candidate)
    data, manifest = data_of(number, run, asked.data)
    model, first = _identity(candidate, run, data, manifest)
    found = Verdict(
        version=number,
        champion_before=champion,
        at=_now(),
        data=data,
        manifest_sha256=manifest.digest,
        checks=tuple(first),
        force_reason=asked.force,
    )
    if model is None or run is None or not found.passed:
        return found
    return _measured(found, model, run, manifest, asked)


def data_of(version: str, run: Run | None, data: str | None) -> tuple[str, shards.Manifest]:
    """Where the shards of a version are, and their manifest. Raises UserError."""
    known = run.data.tags.get("data") if run else None
    data = data or known
    if data is None:
        raise UserError(
            f"version {version} was not registered by training/run.py and no run says which shards "
            "it learned from; pass them with --data"
        )
    try:
        return data, shards.load_manifest(data)
    except UserError as error:
        raise UserError(f"{error}; if the shards were moved, pass --data") from error


def _identity(
    candidate: ModelVersion, run: Run | None, data: str, manifest: shards.Manifest
) -> tuple[Registered | None, list[Check]]:
    """Whether files, signature, data and classes are what they should be; without a model where
    there is none to trust."""
    uri = f"models:/{NAME}/{candidate.version}"
    try:
        model = load(uri)
    except UserError as error:
        return None, [Check("files", str(error), "as registered", False)]
    learned = run.data.tags.get("manifest_sha256") if run else None
    said = model.description.get("manifest_sha256")
    same = learned == manifest.digest == said
    found = [
        Check("files", "as registered", "as registered", True),
        _signature(uri),
        Check(
            "data set",
            f"learned from {str(learned if learned != manifest.digest else said)[:12]}",
            f"{manifest.digest[:12]}, {data}",
            same,
        ),
        _classes(uri, model, manifest, data),
    ]
    return model, found


def _signature(uri: str) -> Check:
    info = get_model_info(uri)
    signature, example = info.signature, info.saved_input_example_info
    named = signature.outputs.input_names() if signature and signature.outputs else []
    value = f"{', '.join(named) or 'none'}; {'an' if example else 'no'} input example"
    limit = "classes, probabilities; an input example"
    return Check("signature", value, limit, value == limit)


def _classes(uri: str, model: Registered, manifest: shards.Manifest, data: str) -> Check:
    limit = "as in the shards"
    try:
        _refuse_misfit(uri, model, manifest, data)
    except UserError as error:
        return Check("classes", str(error), limit, False)
    return Check("classes", f"{manifest.num_classes}, {limit}", limit, True)


def _refuse_misfit(uri: str, model: Registered, manifest: shards.Manifest, data: str) -> None:
    spec = model.input_spec
    named = LoadedModel(uri, "", model.network, spec, model.wnids, model.class_names)
    check_fits(named, manifest, data)


def _measured(
    found: Verdict, model: Registered, run: Run, manifest: shards.Manifest, asked: Asked
) -> Verdict:
    policy = read_policy(asked.policy or SHIPPED, str(model.description.get("recipe")))
    scored = measure(found.version, model, found.data, manifest, asked)
    metrics, classes = scored.metrics, manifest.num_classes
    uri = f"models:/{NAME}/{found.version}"
    pictures = _some_pictures(found.data)
    made = [
        *found.checks,
        checks.logged(metrics, run.data.metrics),
        *checks.accuracy(metrics, classes, policy),
        checks.worst_class(scored, manifest.class_names, policy),
        checks.latency(model.network, policy),
        checks.size(model.network, policy),
        checks.as_used(uri, tracking.tracking_uri(), model, pictures),
    ]
    paired, champion = None, None
    if found.champion_before is not None:
        try:
            champion = scored_version(found.champion_before, found.data, manifest, asked)
        except UserError as error:
            value = f"cannot be scored: {error}"
            made.append(Check("champion", value, 'no worse; or --force --reason "…"', False))
        else:
            check, paired = checks.no_worse(scored, champion, policy)
            made.append(check)
    return dataclasses.replace(
        found,
        checks=tuple(made),
        metrics=metrics,
        champion_metrics=None if champion is None else champion.metrics,
        paired=paired,
    )


def scored_version(version: str, data: str, manifest: shards.Manifest, asked: Asked) -> Scored:
    """A version on the val split. Raises UserError where it cannot be loaded or does not fit."""
    uri = f"models:/{NAME}/{version}"
    model = load(uri)
    _refuse_misfit(uri, model, manifest, data)
    return measure(version, model, data, manifest, asked)


def measure(
    version: str, model: Registered, data: str, manifest: shards.Manifest, asked: Asked
) -> Scored:
    return score(
        model.network,
        model.input_spec,
        data,
        manifest,
        workers=asked.workers,
        shared_fs=asked.shared_fs,
        label=f"version {version}",
    )


def _some_pictures(data: str) -> list[bytes]:
    """The JPEG files of a few pictures all over the val split."""
    index = shards.load_index(data, "val")
    chosen = np.unique(np.linspace(0, len(index) - 1, _PICTURES_USED).astype(int))
    return [
        storage.read(storage.join(data, f"{row['shard']}.tar"), row["offset"], row["size"])
        for row in index.take(chosen).to_pylist()
    ]


def _log(client: MlflowClient, candidate: ModelVersion, found: Verdict) -> None:
    if candidate.run_id:
        stamp = found.at.replace("-", "").replace(":", "").replace("+0000", "Z")
        name = f"gate/verdict-v{found.version}-{stamp}"
        client.log_dict(candidate.run_id, verdict.document(found), f"{name}.json")
        client.log_text(candidate.run_id, verdict.table(found) + "\n", f"{name}.txt")
