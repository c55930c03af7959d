"""What must not move when code is moved: `python tests/unmoved.py CHECKOUT FOLDER [--like BEFORE]`.

Runs CHECKOUT's programs in FOLDER and keeps what they made: sha256 of the archives and shards, the
order of the samples for one and two workers, every metric of a run to the last digit. With
the FOLDER of an earlier commit as BEFORE all of it must be the same, and the version registered
there must predict and be promoted. Metrics may differ between models of CPUs: compare on one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

LAYOUTS = {"ilsvrc": ["--partial"], "imagefolder": [], "kaggle": [], "hf_parquet": []}
TIMED = ("seconds", "per_second", "utilization", "mfu", "memory", "flops", "data_", "exposed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", type=Path, metavar="BEFORE")
    arguments = parser.parse_args()
    checkout, folder = arguments.checkout.resolve(), arguments.folder.resolve()
    folder.mkdir(parents=True)
    facts = json.dumps(made(checkout, folder), indent=1)
    (folder / "facts.json").write_text(facts)
    print(facts)
    if arguments.like is None:
        return 0
    before, now = json.loads((arguments.like / "facts.json").read_text()), json.loads(facts)
    moved = [name for name in before if before[name] != now.get(name)]
    print(*(f"moved: {name}: {before[name]} → {now.get(name)}" for name in moved), sep="\n")
    promoted(checkout, folder, arguments.like.resolve())
    return 1 if moved else 0


def run(checkout: Path, home: Path, *words: str) -> str:
    known = {name: value for name, value in os.environ.items() if name in ("PATH", "TMPDIR")}
    known |= {"HOME": str(home), "ALEXNET_HOME": str(home / ".alexnet")}
    known |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment = known | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, *words], cwd=checkout, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def made(checkout: Path, folder: Path) -> dict[str, object]:
    raw, out, home = folder / "raw", folder / "shards", folder / "home"
    home.mkdir()

    def build(raw: Path, out: Path, *flags: str) -> dict[str, str]:
        words = ["build", "--raw", str(raw), "--out", str(out), *flags]
        run(checkout, home, "-m", "pipelines", *words)
        return sums(out)

    run(checkout, home, "-m", "pipelines", "demo-raw", str(raw))
    facts: dict[str, object] = {"demo archives": sums(raw)}
    facts["demo shards"] = build(raw, out, "--samples-per-shard", "100")
    if real := os.environ.get("ALEXNET_TEST_DATA"):
        for layout, flags in LAYOUTS.items():
            tiny, flags = Path(real) / "tiny20" / layout, [*flags, "--samples-per-shard", "50"]
            facts[f"tiny20 {layout}"] = build(tiny, folder / layout, *flags)
    for workers in (1, 2):  # of more, tests/unit/test_order.py tells
        name = f"w{workers}"
        flags = ["--workers", str(workers), "--cpus-per-worker", "1", "--name", name]
        flags += ["--optim.epochs", "1"] if workers > 1 else []
        flags += ["--checkpoint-minutes", "1000"]
        log = run(checkout, home, "training/run.py", "smoke", "--data", str(out), *flags)
        facts[f"order, {workers} workers"] = re.findall(r"ids=(\w+)", log)[:1]
        facts[f"metrics, {workers} workers"] = metrics(home / ".alexnet" / "mlflow.db", name)
    return facts


def sums(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.tar*"))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
    if (manifest := folder / "manifest.json").exists():
        digests["plan_id"] = json.loads(manifest.read_text())["plan_id"][:16]
    return digests


def metrics(database: Path, name: str) -> dict[str, list[float]]:
    """Each metric of a run by step, but those of clocks and memory."""
    query = "select key, value from metrics join runs using (run_uuid) where name = ?"
    with sqlite3.connect(database) as connection:
        rows = connection.execute(f"{query} order by key, step", [name]).fetchall()
    found: dict[str, list[float]] = {}
    for key, value in rows:
        group, _, name = key.rpartition("/")  # as earlier commits named it: val/loss is val_loss
        name = f"{group}_{name}" if group in ("val", "data") else name
        if not group.startswith("system") and not any(word in name for word in TIMED):
            found.setdefault(name, []).append(value)
    return found


def promoted(checkout: Path, folder: Path, before: Path) -> None:
    """The version that the earlier code registered, used by this one where it lies."""
    kept = before / "home-kept"
    shutil.copytree(before / "home", kept)
    subprocess.run(
        ["tar", "-xf", next((folder / "raw").glob("*img_val.tar")), "-C", folder], check=True
    )
    image = str(min(folder.glob("*.JPEG")))
    promote = ("-m", "training.registry", "promote", "--version", "1")
    try:
        print(run(checkout, before / "home", *promote))
        print(run(checkout, before / "home", "-m", "training.predict", image, "--top", "3"))
    finally:
        shutil.rmtree(before / "home")
        kept.rename(before / "home")


if __name__ == "__main__":
    sys.exit(main())
