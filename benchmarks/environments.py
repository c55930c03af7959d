"""The peers' own Python environments, with exact versions: python -m benchmarks.environments [NAME]

Each is a folder of .bench-peers ($ALEXNET_BENCH_PEERS names another place) made from
benchmarks/peers/NAME.txt. One that cannot be installed leaves its reason there, which the
benchmarks repeat.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from alexnet.errors import UserError
from benchmarks.processes import PEERS, ROOT
from pipelines import command

_REASON = "why-not.txt"
_MADE_FROM = "made-from.txt"  # the requirements, once they are installed


class Absent(Exception):
    """A peer that cannot run here; its text is the reason."""


def folder() -> Path:
    return Path(os.environ.get("ALEXNET_BENCH_PEERS") or ROOT / ".bench-peers")


def names() -> list[str]:
    return sorted(path.stem for path in PEERS.glob("*.txt"))


def python(name: str) -> Path:
    """Raises Absent."""
    found = folder() / name / "bin" / "python"
    reason = folder() / f"{name}-{_REASON}"
    if reason.exists():
        raise Absent(reason.read_text().strip())
    made_from = folder() / name / _MADE_FROM
    if not made_from.exists():
        raise Absent("not installed; `make bench-peers` does")
    if made_from.read_text() != _requirements(name).read_text():
        raise Absent("installed with other versions; `make bench-peers` makes it anew")
    return found


def version(name: str) -> str:
    """Of the peer itself, as its requirements pin it in their first line."""
    first = _requirements(name).read_text().splitlines()[0]
    return first.partition("#")[0].strip().replace("==", " ")


def install(name: str) -> str:
    """Makes the environment anew; what became of it, in one line."""
    place, reason = folder() / name, folder() / f"{name}-{_REASON}"
    shutil.rmtree(place, ignore_errors=True)
    reason.unlink(missing_ok=True)
    folder().mkdir(parents=True, exist_ok=True)
    pip = [str(place / "bin" / "pip"), "--quiet", "--disable-pip-version-check"]
    steps = (
        [sys.executable, "-m", "venv", str(place)],
        [*pip, "install", "--requirement", str(_requirements(name))],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(place, ignore_errors=True)
            reason.write_text(_last_words(done.stderr or done.stdout) + "\n")
            return f"{name}: not here: {reason.read_text().strip()}"
    shutil.copy(_requirements(name), place / _MADE_FROM)
    return f"{name}: {version(name)}"


def _requirements(name: str) -> Path:
    return PEERS / f"{name}.txt"


def _last_words(text: str) -> str:
    """The line of pip's complaint that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line and not line.startswith("note:")]
    return (told or lines or ["pip failed without a word"])[-1][:300]


def main(argv: list[str] | None = None) -> int:
    return command.answered(lambda: _installed((sys.argv[1:] if argv is None else argv) or names()))


def _installed(wanted: list[str]) -> int:
    if unknown := sorted(set(wanted) - set(names())):
        raise UserError(f"no peer {unknown[0]!r}; there are {', '.join(names())}")
    for name in wanted:
        print(install(name), flush=True)
    return 0


if __name__ == "__main__":
    command.begin()
    command.leave(main)
