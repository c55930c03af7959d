"""Shard sets made without Ray, and what is in them."""

import os
import subprocess
import sys
from pathlib import Path

from drawn import ROOT

from pipelines import finish, plan, plan_files, shards, sources, storage
from pipelines.build import job_for
from pipelines.write_shard import write_shard


def made_shards(
    raw: str, out: str, recipe: plan.Recipe, partial: bool | None = None
) -> shards.Manifest:
    """Every shard of the plan, one after the other, as the tasks of a build make them.

    partial: whether RAW may be incomplete, if that is not what the recipe says.
    """
    source = sources.scan(raw, recipe.raw_splits, recipe.partial if partial is None else partial)
    made = plan.make(plan.chosen(source, recipe), recipe)
    plan_files.begin(out, raw, made)
    job = job_for(made, raw, out)
    for number, shard in enumerate(made.shards):
        write_shard(job, number, shard.name, shard.id)
    return finish.finish(out, made, finish.finished_shards(out, made)[0])


def part_of(raw: str, out: Path, recipe: plan.Recipe) -> str:
    """A finished set of `raw`, which may be incomplete, in `out`."""
    made_shards(raw, str(out), recipe, partial=True)
    return str(out)


def contents(out: str) -> dict[str, bytes]:
    """Everything that must not depend on who built when."""
    return {
        name: storage.read(f"{out}/{name}")
        for name, _ in storage.list_files(out)
        if name != "_meta/raw.json"
    }


def started(argv: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`python -m pipelines ARGV` as somebody in `folder` runs it, in a session of its own."""
    # As from a terminal: whoever starts the tests in the background has them ignore Ctrl-C.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pipelines.__main__"
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
