"""Real shard sets for tests, from class folders of drawn images, made without Ray."""

from pathlib import Path

from drawn import jpeg
from made import made_shards

from pipelines import plan


def write_folders(raw: Path, images: dict[str, int | bytes]) -> str:
    """Files under `raw`, by relative name: a drawn JPEG of that seed, or these bytes."""
    for name, what in images.items():
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(what if isinstance(what, bytes) else jpeg(seed=what))
    return str(raw)


def build_set(raw: str, out: Path, recipe: plan.Recipe) -> str:
    """A finished set of `raw`, which may be incomplete, in `out`."""
    made_shards(raw, str(out), recipe, partial=True)
    return str(out)
