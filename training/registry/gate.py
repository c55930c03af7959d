"""The gate between a candidate and the champion, its verdict, and who approves what it passed."""

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
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
from training.registry import champions, checks
from training.registry.checks import SHIPPED, Check, Paired, Policy, read_policy
from training.registry.versions import (
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

PENDING = "pending_approval"  # of the tag validation_status
_IMAGES_USED = 8  # by the check in a fresh process
_LONGEST_REASON = 500  # characters of the tag


@dataclass(frozen=True)
class Asked:
    """model: the registered model's name; data: where the shards are, if not where the run had
    them; workers, shared_fs: as `score`; policy: a file; force: a reason to promote whatever the
    checks of the scored model say; why: a reason to record where it passes."""

    model: str = NAME
    data: str | None = None
    workers: int | None = None
    shared_fs: bool = False
    policy: str | None = None
    force: str | None = None
    why: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Verdict:
    """at: UTC; manifest_sha256: of `data`; force_reason: why it shall pass all the same; why: of
    one that passes; approval: whether it then waits for `approve`. metrics is
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
    why: str | None = None
    approval: bool = False
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
        """Why it is forced or refused, or the reason that somebody gave, in one line, if any."""
        if self.forced or self.passed:
            return str((self.force_reason if self.forced else self.why) or "")
        failed = [check for check in self.checks if not check.passed]
        return "; ".join(f"{c.name}: {c.value} (asked for: {c.limit})" for c in failed)

    def document(self) -> dict[str, Any]:
        """JSON-ready."""
        found = dataclasses.asdict(self)
        del found["force_reason"], found["why"]
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

    def tags(self) -> champions.Tags:
        """What the version remembers."""
        return {
            "gate": self.outcome,
            "gate_reason": self.reason[:_LONGEST_REASON] or None,
            "gate_val_top1": None if self.metrics is None else f"{self.metrics.top1:.6f}",
        }


def promote(client: MlflowClient, version: str | None, asked: Asked) -> Verdict | None:
    """Judges a version (number or alias, None: the candidate) and, where the verdict is not
    "refused", makes it the champion; or lets it wait for `approve`, where the policy says so. None:
    it is the champion already.

    The verdict becomes artifacts of the run under gate/ and tags. A dry run changes nothing. Raises
    UserError for what cannot be judged, such as shards that are gone, and Refused where the
    champion changed meanwhile.
    """
    candidate = resolve(client, version, asked.model)
    number = str(candidate.version)
    champion = aliases(client, asked.model).get(champions.CHAMPION)
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
        tags = {**found.tags(), "validation_status": "rejected"}
        champions.write_tags(client, asked.model, number, tags)
        return found
    before = champions.champions_before(client, asked.model, champion)
    by = champions.actor()
    tags = {**found.tags(), **champions.history(before, found.best_before)}
    tags |= {"promoted_by": by, "approved_by": None}
    if found.approval:
        tags |= {"validation_status": PENDING}
        champions.write_tags(client, asked.model, number, tags)
        return found
    how = "promoted" if found.passed else "forced"
    move = {"at": found.at, "version": number, "how": how, "by": by, "why": found.reason}
    tags |= {"validation_status": "approved", "promoted_at": found.at}
    tags |= champions.moved(client, asked.model, move)
    champions.move_champion(client, champion, number, tags, asked.model)
    return found


def approve(client: MlflowClient, version: str, by: str, asked: Asked = Asked()) -> str:
    """Makes champion what the gate passed and the policy wants approved; returns its number. by:
    who approves it. Of `asked` model, policy and why count.

    Raises UserError for a version that does not wait for it, and for an approver whom the policy
    forbids; Refused where champion or files changed since the gate.
    """
    chosen = resolve(client, version, asked.model)
    number, tags = str(chosen.version), chosen.tags
    # A kill may have come between the two tags of a later no.
    if (status := tags.get("validation_status")) != PENDING or tags.get("gate") == "refused":
        raise UserError(
            f"version {number} does not wait for approval (validation_status "
            f"{status or 'not set'}, gate {tags.get('gate', 'not asked')}); promote it first, "
            "under a policy with approval = true"
        )
    if not read_policy(asked.policy or SHIPPED, str(tags.get("recipe"))).approver_may_be_trainer:
        _refuse_trainer(number, run_of(client, chosen), by)
    before = tags.get("previous_champion")
    champions.refuse_moved(client, asked.model, before)
    try:
        with verified(f"models:/{asked.model}/{number}"):
            pass
    except UserError as error:
        raise Refused(str(error)) from error
    chain = champions.champions_before(client, asked.model, before)
    oldest, _, _ = tags.get("champions_before", "").partition(" ")  # or the best
    at = champions.now()
    who = f"{by} ({champions.actor()})"
    move = {"at": at, "version": number, "how": "approved", "by": who, "why": asked.why}
    found = {
        **champions.history(chain, oldest or None),
        **champions.moved(client, asked.model, move),
        "approved_by": who,
        "promoted_at": at,
        "validation_status": "approved",  # last: after a kill before it the same goes on
    }
    champions.move_champion(client, before, number, found, asked.model)
    return number


def _refuse_trainer(version: str, run: Run | None, by: str) -> None:
    trainer = run.data.tags.get("mlflow.user") if run else None
    if trainer is None or by.casefold() == trainer.casefold():
        who = "nobody knows who trained it" if trainer is None else f"{by} trained it"
        raise UserError(
            f"version {version} cannot be approved by {by}: {who}; let another approve it, or set "
            "approver_may_be_trainer = true in the policy"
        )


def _refuse_former(version: ModelVersion, remedy: str) -> None:
    """Raises UserError for a version that only the code it carries can score."""
    if former := _former(version):
        raise UserError(
            f"version {version.version} is of {former}, which mlflow.pyfunc still serves and this "
            f"release cannot score; {remedy}"
        )


def _former(version: ModelVersion) -> str | None:
    return former_network(version.tags.get("variant"), version.tags.get("dropout"))


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
    before = champions.champions_before(client, name, champion)
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


def _judge(candidate: ModelVersion, run: Run | None, champion: str | None, asked: Asked) -> Verdict:
    number = str(candidate.version)
    data, manifest = _data_of(number, run, asked.data)
    model, first = _identity(f"models:/{asked.model}/{number}", run, data, manifest)
    found = Verdict(
        version=number,
        champion_before=champion,
        at=champions.now(),
        data=data,
        manifest_sha256=manifest.digest,
        checks=tuple(first),
        force_reason=asked.force,
        why=asked.why,
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
    found = dataclasses.replace(found, metrics=metrics, approval=policy.approval)
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
