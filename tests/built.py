"""Real shard sets for tests, from class folders of drawn pictures, made without Ray."""

from pathlib import Path

from drawn import jpeg

from pipelines import claim, finish, plan, sources
from pipelines.build import job_for
from pipelines.produce import produce
from pipelines.sources import subset


def write_folders(raw: Path, pictures: dict[str, int | bytes]) -> str:
    """Files under `raw`, by relative name: a drawn JPEG of that seed, or these bytes."""
    for name, what in pictures.items():
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(what if isinstance(what, bytes) else jpeg(seed=what))
    return str(raw)


def build_set(raw: str, out: Path, recipe: plan.Recipe) -> str:
    """A finished set of `raw` in `out`."""
    source = sources.scan(raw, recipe.splits, partial=True)
    if recipe.subset or recipe.per_class:
        source = subset.select(source, recipe.subset, recipe.per_class)
    made = plan.make(source, recipe)
    claim.begin(str(out), raw, made)
    job = job_for(made, raw, str(out))
    for number, shard in enumerate(made.shards):
        produce(job, number, shard.name, shard.id)
    finish.finish(str(out), made, finish.finished_shards(str(out), made)[0])
    return str(out)
