"""Commands of the registry.

    python -m training.registry list
    python -m training.registry show V
    python -m training.registry promote [V] [--dry-run] [--reason "…"] [--force]
    python -m training.registry approve V --by NAME
    python -m training.registry rollback [--dry-run] [--reason "…"]
    python -m training.registry history

V is the number of a version or an alias such as candidate, of the registered model alexnet or that
of --model NAME. `promote --dry-run` compares a version
with the champion and changes nothing. With --json each prints JSON.

Exit codes: 0 done, 1 the gate refused, 2 wrong usage or input, or MLflow failed, 130 interrupted.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":
    from pipelines import command

    command.begin()

from mlflow.tracking import MlflowClient

from alexnet.errors import UserError
from pipelines import command
from training import store, tracking
from training.config import checked_name
from training.registry.versions import (
    NAME,
    Refused,
    aliases,
    aligned,
    resolve,
    rows,
    run_of,
    table,
)

# Exit code, the document for --json, the text otherwise.
Answer = tuple[int, Any, str]


def main(argv: Sequence[str] | None = None) -> int:
    return command.answered(
        lambda: _answer(_parse(argv)),
        stopped="interrupted; `python -m training.registry list` shows who is champion",
        failed={Refused: "refused"},
    )


def _answer(args: argparse.Namespace) -> int:
    try:
        args.model = checked_name(args.model, "--model")
        client = tracking.connect(tracking.tracking_uri())
        answer: Answer = args.run(client, args)
        code, document, text = answer
    except tracking.FAILURES as error:
        raise UserError(_told(error)) from error
    # Whoever has moved the champion has done it, read or not.
    moving = args.run in (_promote, _approve, _rollback) and not getattr(args, "dry_run", False)
    tell = command.say if moving else print
    tell(json.dumps(document, indent=1) if args.json else text)
    if code == 1:
        print(f"refused: {document['reason']}", file=sys.stderr)
    return code


def _told(error: BaseException) -> str:
    uri = tracking.tracking_uri()
    return f"MLflow at {uri} failed ({store.remedy(uri, error)}; then run the command again"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser("python -m training.registry", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="all versions with their aliases and accuracy")
    listed.set_defaults(run=_list)
    show = commands.add_parser("show", help="a version, back to the data that it learned from")
    show.add_argument("version", metavar="V")
    show.set_defaults(run=_show)
    gate = commands.add_parser("promote", help="judge a version and make it the champion")
    _add_promote_flags(gate)
    back = commands.add_parser("rollback", help="give the alias back to the champion before")
    back.set_defaults(run=_rollback)
    approval = commands.add_parser("approve", help="make champion what waits for approval")
    approval.add_argument("version", metavar="V")
    approval.add_argument("--by", metavar="NAME", required=True, help="who approves; recorded")
    approval.set_defaults(run=_approve)
    moves = commands.add_parser("history", help="how the champion came to be it: when, who, why")
    moves.set_defaults(run=_history)
    for each in (gate, approval):
        policy = "instead of training/registry/policy.toml"
        each.add_argument("--policy", metavar="FILE", help=policy)
    for each in (gate, approval, back):
        each.add_argument("--reason", help="why; recorded, and needed with --force")
    for each in (show, gate):
        each.add_argument("--data", metavar="OUT", help="the shards, if they were moved")
    for each in (gate, back):
        each.add_argument("--dry-run", action="store_true", help="change nothing in MLflow")
    for each in (listed, show, gate, approval, back, moves):
        each.add_argument("--model", metavar="NAME", default=NAME, help="instead of alexnet")
        each.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def _add_promote_flags(gate: argparse.ArgumentParser) -> None:
    version = gate.add_mutually_exclusive_group()
    version.add_argument("version", metavar="V", nargs="?", help="candidate by default")
    version.add_argument("--version", dest="flag", metavar="V", help="the same as a flag")
    gate.add_argument("--workers", type=int, metavar="N", help="score on Ray, N at a time")
    gate.add_argument(
        "--shared-fs", action="store_true", help="every node of the cluster sees local shards"
    )
    gate.add_argument("--force", action="store_true", help="promote whatever the checks say")
    gate.set_defaults(run=_promote)


def _list(client: MlflowClient, args: argparse.Namespace) -> Answer:
    found = rows(client, args.model)
    return 0, found, table(found)


# What follows imports in its functions, so that a list does not wait for torch and matplotlib.


def _show(client: MlflowClient, args: argparse.Namespace) -> Answer:
    """From a version back to its run, config, code and shards. What is not known is None."""
    version = resolve(client, args.version, args.model)
    run, number = run_of(client, version), str(version.version)
    tags = run.data.tags if run else {}
    uri, digest = args.data or tags.get("data"), tags.get("manifest_sha256")
    manifest, gone = _manifest(uri, digest)
    infos = manifest.shards if manifest else ()
    document: dict[str, Any] = {
        "version": number,
        "aliases": sorted(name for name, at in aliases(client, args.model).items() if at == number),
        "tags": dict(sorted(version.tags.items())),
        "run": run
        and {"id": run.info.run_id, "name": run.info.run_name, "status": run.info.status},
        "config": run and dict(sorted(run.data.params.items())),
        "commit": tags.get("mlflow.source.git.commit"),
        "code_sha256": tags.get("code_sha256"),
        "data": {
            "uri": uri,
            "manifest_sha256": digest,
            "plan_id": tags.get("plan_id"),
            "gone": gone,
        },
        "shards": manifest
        and [
            {key: getattr(i, key) for key in ("name", "split", "samples", "sha256")} for i in infos
        ],
    }
    rows = {
        "version": number,
        "aliases": ", ".join(document["aliases"]) or "none",
        "run": run and f"{run.info.run_name} ({run.info.status}), {run.info.run_id}",
        **{key: document[key] for key in ("commit", "code_sha256")},
        "data": uri,
        "manifest_sha256": digest,
        "plan_id": tags.get("plan_id"),
        "shards": gone or f"{len(infos)} with {sum(i.samples for i in infos):,} images",
        "an image": uri and f"python -m pipelines inspect KEY --out {shlex.quote(uri)}",
        **{key: value for key, value in document["tags"].items() if key != "champion_moves"},
    }
    text = "\n".join(f"{name:<18}{value or 'not recorded'}" for name, value in rows.items())
    return 0, document, text


def _manifest(uri: str | None, digest: str | None) -> tuple[Any, str | None]:
    """The manifest that a run learned from; or None, and why there is none to read."""
    from pipelines import shards

    if uri is None:
        return None, "no run says which shards there were"
    try:
        manifest = shards.load_manifest(uri)
    except UserError as error:
        return None, f"{error}; if they were moved, pass --data"
    if manifest.digest != digest:
        was = str(digest)[:12]
        return None, f"{uri} is another set now (manifest {manifest.digest[:12]}, trained on {was})"
    return manifest, None


def _promote(client: MlflowClient, args: argparse.Namespace) -> Answer:
    from training.registry.champions import CHAMPION
    from training.registry.gate import Asked, promote

    reason = (args.reason or "").strip() or None
    if args.force and reason is None:
        raise UserError('--force needs a reason to record; pass --force --reason "why"')
    asked = Asked(
        model=args.model,
        data=args.data,
        workers=args.workers,
        shared_fs=args.shared_fs,
        policy=args.policy,
        force=reason if args.force else None,
        why=reason,
        dry_run=args.dry_run,
    )
    version = args.flag or args.version
    found = promote(client, version, asked)
    if found is None:
        number = str(resolve(client, version, args.model).version)
        told = f"version {number} is the champion already"
        return 0, {"version": number, "outcome": "champion already"}, told
    document = found.document() | {"dry_run": args.dry_run}
    lines = [found.table()]
    if args.dry_run:
        lines.append(f"verdict: {found.outcome}; a dry run, nothing was changed")
    elif found.outcome == "forced":
        lines.append(f"forced: {found.reason}")
    if found.outcome != "refused" and found.approval and not args.dry_run:
        again = ["--model", args.model] if args.model != NAME else []
        again += ["--policy", args.policy] if args.policy else []
        words = shlex.join(["approve", found.version, "--by", "NAME", *again])
        lines.append(f"version {found.version} waits for approval:")
        lines.append(f"  python -m training.registry {words}")
    elif found.outcome != "refused" and not args.dry_run:
        if (uri := tracking.tracking_uri()).startswith("sqlite:"):
            lines.append(f"for mlflow itself: export MLFLOW_TRACKING_URI={shlex.quote(uri)}")
        lines.append(f"version {found.version} is the champion: models:/{args.model}@{CHAMPION}")
    return int(found.outcome == "refused"), document, "\n".join(lines)


def _approve(client: MlflowClient, args: argparse.Namespace) -> Answer:
    from training.registry.champions import CHAMPION
    from training.registry.gate import Asked, approve

    by = args.by.strip()
    if not by:
        raise UserError("--by is empty; pass the name of who approves")
    asked = Asked(model=args.model, policy=args.policy, why=args.reason)
    number = approve(client, args.version, by, asked)
    told = f"version {number} is the champion: models:/{args.model}@{CHAMPION}"
    return 0, {"version": number, "approved_by": by}, told


def _history(client: MlflowClient, args: argparse.Namespace) -> Answer:
    from pipelines.shards import one_line
    from training.registry.champions import moves

    found = moves(client, args.model)
    columns = ("at", "version", "how", "by", "why")
    rows = [[one_line(str(move.get(key) or "")) for key in columns] for move in found]
    return 0, found, aligned([columns, *rows])


def _rollback(client: MlflowClient, args: argparse.Namespace) -> Answer:
    from training.registry.champions import rollback

    before, now = rollback(client, args.model, why=args.reason, dry_run=args.dry_run)
    document = {"from": before, "to": now, "dry_run": args.dry_run}
    if args.dry_run:
        return 0, document, f"version {now} would be the champion again, {before} would not"
    return 0, document, f"version {now} is the champion again, {before} is not"


if __name__ == "__main__":
    command.leave(main)
