"""Commands of the registry.

    python -m training.registry list
    python -m training.registry promote [--version V] [--data OUT]
    python -m training.registry rollback

Exit codes: 0 done, 1 the gate refused, 2 wrong usage or input.
"""

import argparse
import sys

from mlflow.tracking import MlflowClient

from alexnet.errors import UserError
from training import tracking
from training.registry.gate import Refused, promote, rollback
from training.registry.versions import aliases, run_of, versions


def list_versions(client: MlflowClient) -> str:
    """A table of all versions, newest first."""
    lines = [f"{'version':<8}{'alias':<20}{'recipe':<8}{'val top-1':<11}{'run':<30}champion before"]
    held_by = aliases(client)
    for version in sorted(versions(client), key=lambda v: -int(v.version)):
        run = run_of(client, version)
        number = str(version.version)
        held = ", ".join(sorted(alias for alias, v in held_by.items() if v == number))
        name = run.info.run_name if run else ""
        top1 = run.data.metrics.get("val_top1") if run else None
        lines.append(
            f"{number:<8}{held:<20}{version.tags.get('recipe', ''):<8}"
            f"{'' if top1 is None else format(top1, '.4f'):<11}{name:<30}"
            f"{version.tags.get('previous_champion', '')}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m training.registry", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all versions with their aliases and accuracy")
    gate = commands.add_parser("promote", help="check the candidate and make it the champion")
    gate.add_argument("--version", help="a version's number; alias `candidate` by default")
    gate.add_argument("--data", help="where the run's shards are now, if they were moved")
    commands.add_parser("rollback", help="give the alias back to the champion before")
    args = parser.parse_args(argv)
    try:
        client = tracking.connect(tracking.tracking_uri())
        if args.command == "list":
            print(list_versions(client))
        else:
            promoting = args.command == "promote"
            lines = promote(client, args.version, args.data) if promoting else rollback(client)
            print("\n".join(lines))
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
