"""The gate between a candidate and the champion, its verdict, and the way back."""

import dataclasses
import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import get_model_info
from mlflow.tracking import MlflowClient

from alexnet import former_network
from alexnet.errors import UserError
from pipelines import shards, storage
from training import tracking
from training.accuracy import Metrics, Scored
from training.evaluate import score
from training.metrics import metrics_of
from training.network import LoadedModel, check_fits
from training.registry import checks
from training.registry.checks import SHIPPED, Check, Paired, Policy, read_policy
from training.registry.versions import (
    MISSING,
    NAME,
    Refused,
    Registered,
    aliases,
    aligned,
    load,
    resolve,
    run_of,
    runs_of,
    verified,
    versions,
)

CHAMPION = "champion"
_IMAGES_USED = 8  # by the check in a fresh process
_LONGEST_HISTORY = 100  # champions
_LONGEST_REASON = 500  # characters of the tag

Tags = Mapping[str, str | None]  # None removes one


@dataclass(frozen=True)
class Asked:
    """model: the registered model's name; data: where the shards are, if not where the run had
    them; workers, shared_fs: as `score`; policy: a file; force: a reason to promote whatever the
    checks of the scored model say."""

    model: str = NAME
    data: str | None = None
    workers: int | None = None
    shared_fs: bool = False
    policy: str | None = None
    force: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Verdict:
    """at: UTC; manifest_sha256: of `data`; force_reason: why it shall pass all the same. metrics is
    None where the checks before the scoring failed, champion_metrics and paired where there is no
    champion, or it cannot be scored on this data. best_before: the best of the champions so far
    where that is not the present one, likewise."""

    version: str
    champion_before: str | None
    at: str
    data: str
    manifest_sha256: str | None
    checks: tuple[Check, ...]
    force_reason: str | None = None
    metrics: Metrics | None = None
    champion_metrics: Metrics | None = None
    paired: Paired | None = None
    best_before: str | None = None
    best_metrics: Metrics | None = None
    best_paired: Paired | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def forced(self) -> bool:
        """Never past the identity of files and data: of what was not scored nobody knows what it
        is."""
        return not self.passed and self.force_reason is not None and self.metrics is not None

    @property
    def outcome(self) -> str:
        if self.passed:
            return "passed"
        return "forced" if self.forced else "refused"

    @property
    def reason(self) -> str:
        """Why it is forced or refused, in one line; empty where all is well."""
        if self.forced:
            return str(self.force_reason)
        failed = [check for check in self.checks if not check.passed]
        return "; ".join(f"{c.name}: {c.value} (asked for: {c.limit})" for c in failed)

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        found = dataclasses.asdict(self)
        del found["force_reason"]
        words = ("passed", "forced", "outcome", "reason")
        return found | {word: getattr(self, word) for word in words}

    def table(self) -> str:
        """For a terminal."""
        before = self.champion_before
        against = f"against champion {before}" if before else "as the first champion"
        if self.best_before is not None:
            against += f" and {self.best_before}, the best so far"
        rows = [(c.name, c.value, c.limit, "ok" if c.passed else "REFUSED") for c in self.checks]
        head = f"version {self.version} {against}, on the val split of {self.data}"
        return f"{head}\n{aligned([('check', 'found', 'asked for', ''), *rows])}"

    def tags(self) -> Tags:
        """What the version remembers."""
        return {
            "gate": self.outcome,
            "gate_reason": self.reason[:_LONGEST_REASON] or None,
            "gate_val_top1": None if self.metrics is None else f"{self.metrics.top1:.6f}",
        }


def promote(client: MlflowClient, version: str | None, asked: Asked) -> Verdict | None:
    """Judges a version (number or alias, None: the candidate) and, where the verdict is not
    "refused", makes it the champion. None: it is the champion already.

    The verdict becomes artifacts of the run under gate/ and tags. A dry run changes nothing. Raises
    UserError for what cannot be judged, such as shards that are gone, and Refused where the
    champion changed meanwhile.
    """
    candidate = resolve(client, version, asked.model)
    number = str(candidate.version)
    champion = aliases(client, asked.model).get(CHAMPION)
    if champion == number:
        return None
    _refuse_former(candidate, "train it anew")
    if champion is not None and asked.force is None:
        remedy = 'promote without the comparison by --force --reason "…"'
        _refuse_former(client.get_model_version(asked.model, champion), remedy)
    run = run_of(client, candidate)
    if run is not None and run.info.lifecycle_stage != "active":
        raise UserError(
            f"the run {run.info.run_name} of version {number} "
            f"{tracking.deleted(client, run.info.run_id)}, for the verdict is kept with it"
        )
    found = _judge(candidate, run, champion, asked)
    if asked.dry_run:
        return found
    if run is not None:
        stamp = found.at.replace("-", "").replace(":", "").replace("+0000", "Z")
        name = f"gate/verdict-v{number}-{stamp}"
        client.log_dict(run.info.run_id, found.document(), f"{name}.json")
        client.log_text(run.info.run_id, found.table() + "\n", f"{name}.txt")
    if found.outcome == "refused":
        _write_tags(client, asked.model, number, found.tags())
    else:
        before = _champions_before(client, asked.model, champion)
        tags = {**found.tags(), **_history(before, found.best_before), "promoted_at": found.at}
        move_champion(client, champion, number, tags, asked.model)
    return found


def _refuse_former(version: ModelVersion, remedy: str) -> None:
    """Raises UserError for a version that only the code it carries can score."""
    if former := _former(version):
        raise UserError(
            f"version {version.version} is of {former}, which mlflow.pyfunc still serves and this "
            f"release cannot score; {remedy}"
        )


def _former(version: ModelVersion) -> str | None:
    return former_network(version.tags.get("variant"), version.tags.get("dropout"))


def rollback(client: MlflowClient, name: str = NAME, *, dry_run: bool = False) -> tuple[str, str]:
    """Gives the alias back to the champion before: (the version that had it, that has it now).

    Each champion knows those before it, so that a second rollback goes one further back. Raises
    Refused where there is none, and where its files are not what was registered.
    """
    champion = aliases(client, name).get(CHAMPION)
    if champion is None:
        raise Refused("there is no champion to roll back; promote one first")
    before = _champions_before(client, name, champion)[:-1]
    if not before:
        raise Refused(f"champion {champion} had none before it; promote another version instead")
    target = str(resolve(client, before[-1], name).version)
    try:
        with verified(f"models:/{name}/{target}"):  # its own code serves it, not this program's
            pass
    except UserError as error:
        raise Refused(f"the champion before: {error}; or promote another version") from error
    if not dry_run:
        tags = {**_history(before[:-1]), "restored_at": _now()}
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
    _refuse_moved(client, name, before)
    _write_tags(client, name, after, tags)
    _refuse_moved(client, name, before)
    client.set_registered_model_alias(name, CHAMPION, after)


def _refuse_moved(client: MlflowClient, name: str, before: str | None) -> None:
    held = aliases(client, name).get(CHAMPION)
    if held != before:
        was, now = ("none" if v is None else f"version {v}" for v in (before, held))
        raise Refused(f"{CHAMPION} changed from {was} to {now} meanwhile; promote again")


def _write_tags(client: MlflowClient, name: str, version: str, tags: Tags) -> None:
    for key, value in tags.items():
        if value is not None:
            client.set_model_version_tag(name, version, key, value)
            continue
        try:
            client.delete_model_version_tag(name, version, key)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise


def _champions_before(client: MlflowClient, name: str, champion: str | None) -> list[str]:
    """The champions so far, oldest first, `champion` last."""
    if champion is None:
        return []
    tags = client.get_model_version(name, champion).tags
    return [*str(tags.get("champions_before", "")).split(), champion]


def best_champion(
    client: MlflowClient, name: str, champion: str, manifest_sha256: str
) -> tuple[str, list[str]]:
    """The champion of the highest val top-1 among `champion` and those before it, of equals the
    later one; and the numbers of those before that nobody can compare with: they were deleted, or
    are of a network that this release has no more.

    Each counts with the top-1 that the gate measured of it (its tag, or what its run logged, which
    the gate found alike), if it learned from the set of this manifest: on another val split the
    same share means something else. One that a rollback took the alias from is no longer among
    those before.
    """
    before = _champions_before(client, name, champion)
    there = {str(version.version): version for version in versions(client, name)}
    known = [there[number] for number in before if number in there and not _former(there[number])]
    runs, measured = runs_of(client, known), [(-1.0, -1, champion)]
    for place, version in enumerate(known):
        run = runs.get(version.run_id)
        if run is not None and run.data.tags.get("manifest_sha256") == manifest_sha256:
            top1 = _share(version.tags.get("gate_val_top1"))
            top1 = metrics_of(run).get("val_top1", -1.0) if top1 is None else top1
            measured.append((top1, place, str(version.version)))
    numbers = {str(version.version) for version in known}
    return max(measured)[2], [number for number in before if number not in numbers]


def _share(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"[01](\.\d+)?", text) else None


def _history(before: Sequence[str], best: str | None = None) -> Tags:
    """Tags of a version that is about to be champion. Without effect until it is: only the present
    champion's list counts, so that no other write has to happen together with the alias. best: one
    that is never left out of it."""
    kept = list(before[-_LONGEST_HISTORY:])
    if best is not None and best not in kept:
        kept[0] = best
    return {
        "champions_before": " ".join(kept) or None,
        "previous_champion": before[-1] if before else None,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _judge(candidate: ModelVersion, run: Run | None, champion: str | None, asked: Asked) -> Verdict:
    number = str(candidate.version)
    data, manifest = _data_of(number, run, asked.data)
    model, first = _identity(f"models:/{asked.model}/{number}", run, data, manifest)
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


def _data_of(version: str, run: Run | None, data: str | None) -> tuple[str, shards.Manifest]:
    """Where the shards of a version are, and their manifest. Raises UserError."""
    data = data or (run.data.tags.get("data") if run else None)
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
    uri: str, run: Run | None, data: str, manifest: shards.Manifest
) -> tuple[Registered | None, list[Check]]:
    """Whether files, signature, data and classes are what they should be; without a model where
    there is none to trust."""
    try:
        model = load(uri)
    except UserError as error:
        return None, [Check("files", str(error), "as registered", False)]
    learned = run.data.tags.get("manifest_sha256") if run else None
    said = model.description.get("manifest_sha256")
    other = learned if learned != manifest.digest else said
    return model, [
        Check("files", "as registered", "as registered", True),
        _signature(uri),
        Check(
            "data set",
            f"learned from {str(other)[:12]}",
            f"{manifest.digest[:12]}, {data}",
            learned == manifest.digest == said,
        ),
        _classes(uri, model, manifest, data),
    ]


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
    scored = _scored(found.version, model, found.data, manifest, asked)
    metrics, uri = scored.metrics, f"models:/{asked.model}/{found.version}"
    made = [
        *found.checks,
        checks.logged(metrics, metrics_of(run)),
        *checks.accuracy(metrics, manifest.num_classes, policy),
        checks.worst_class(scored, manifest.class_names, policy),
        checks.latency(model.network, policy),
        checks.size(model.network, policy),
        checks.as_used(uri, tracking.tracking_uri(), model, _some_images(found.data)),
    ]
    found = dataclasses.replace(found, metrics=metrics)
    if (champion := found.champion_before) is not None:
        against = functools.partial(_compared, scored, found.data, manifest, policy, asked)
        check, theirs, paired = against(champion, "champion")
        made.append(check)
        found = dataclasses.replace(found, champion_metrics=theirs, paired=paired)
        if policy.best_champion:
            best, gone = best_champion(MlflowClient(), asked.model, champion, manifest.digest)
            if gone:
                value = f"{', '.join(gone[-3:])} deleted, or of a former network"
                made.append(Check("champions before", value, "those that are left", True))
            if best not in (champion, found.version):
                check, theirs, paired = against(best, f"best champion, {best}")
                made.append(check)
                found = dataclasses.replace(
                    found, best_before=best, best_metrics=theirs, best_paired=paired
                )
    return dataclasses.replace(found, checks=tuple(made))


def _compared(
    scored: Scored,
    data: str,
    manifest: shards.Manifest,
    policy: Policy,
    asked: Asked,
    version: str,
    name: str,
) -> tuple[Check, Metrics | None, Paired | None]:
    """The candidate beside another version on the same images."""
    uri = f"models:/{asked.model}/{version}"
    try:
        model = load(uri)
        _refuse_misfit(uri, model, manifest, data)
        other = _scored(version, model, data, manifest, asked)
    except UserError as error:
        value = f"cannot be scored: {error}"
        return Check(name, value, 'no worse; or --force --reason "…"', False), None, None
    check, paired = checks.no_worse(scored, other, policy, name)
    return check, other.metrics, paired


def _scored(
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


def _some_images(data: str) -> list[bytes]:
    """The JPEG files of a few images all over the val split."""
    index = shards.load_index(data, "val")
    chosen = np.unique(np.linspace(0, len(index) - 1, _IMAGES_USED).astype(int))
    return [
        storage.read(storage.join(data, f"{row['shard']}.tar"), row["offset"], row["size"])
        for row in index.take(chosen).to_pylist()
    ]
