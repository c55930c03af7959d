"""python -m benchmarks [resize] [build] [loader] [train] [--out FILE]: all, to the terminal."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from alexnet.errors import UserError
from benchmarks import build, loader, pictures, resize, train
from benchmarks.table import Table, machine

SCRIPTS: dict[str, Callable[[pictures.Raw], Table]] = {
    "resize": resize.run,
    "build": build.run,
    "loader": loader.run,
    "train": train.run,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--out", type=Path, help="write the tables there, too")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in SCRIPTS:
            parser.error(f"no benchmark {name!r}; there are {', '.join(SCRIPTS)}")
    try:
        raw = pictures.load()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = []
    for name in arguments.names or SCRIPTS:
        parts.append(f"## {name}\n\n{machine()}\n\n{SCRIPTS[name](raw).markdown()}\n")
        print(parts[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
