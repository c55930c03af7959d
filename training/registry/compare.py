"""Two versions on the same val pictures, without a verdict."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray

from training.accuracy import Metrics
from training.registry.gate import Asked, data_of, scored_version
from training.registry.mcnemar import Paired, compare
from training.registry.versions import resolve, run_of

_TOLD_PICTURES = 5


@dataclass(frozen=True)
class Comparison:
    """versions and metrics: of the first and the second; only_first, only_second: the keys of the
    pictures that one alone gets right."""

    versions: tuple[str, str]
    data: str
    manifest_sha256: str
    metrics: tuple[Metrics, Metrics]
    paired: Paired
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def compare_versions(client: MlflowClient, first: str, second: str, asked: Asked) -> Comparison:
    """Numbers or aliases, on the shards of the first one or those of `asked`. Raises UserError for
    versions and shards that are not there or do not fit each other."""
    pair = resolve(client, first), resolve(client, second)
    numbers = str(pair[0].version), str(pair[1].version)
    data, manifest = data_of(numbers[0], run_of(client, pair[0]), asked.data)
    one, other = (scored_version(number, data, manifest, asked) for number in numbers)
    return Comparison(
        versions=numbers,
        data=data,
        manifest_sha256=manifest.digest,
        metrics=(one.metrics, other.metrics),
        paired=compare(one.correct, other.correct),
        only_first=_named(one.keys, one.correct & ~other.correct),
        only_second=_named(one.keys, ~one.correct & other.correct),
    )


def _named(keys: tuple[str, ...], chosen: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(keys[i] for i in np.flatnonzero(chosen))


def document(found: Comparison) -> dict[str, Any]:
    return dataclasses.asdict(found)


def text(found: Comparison) -> str:
    paired = found.paired
    lines = [f"{paired.images:,} val pictures of {found.data}"]
    for version, metrics in zip(found.versions, found.metrics, strict=True):
        low, high = metrics.top1_interval
        lines.append(
            f"version {version:<5} top-1 {metrics.top1:.4f} ({low:.4f} to {high:.4f})  "
            f"top-5 {metrics.top5:.4f}  loss {metrics.loss:.4f}"
        )
    lines.append(
        f"difference    top-1 {paired.difference:+.4f} ({paired.low:+.4f} to {paired.high:+.4f}), "
        f"McNemar's exact p {paired.p:.3g}"
    )
    lines.append(f"both right {paired.both:,}, neither {paired.neither:,}")
    for version, keys in zip(found.versions, (found.only_first, found.only_second), strict=True):
        shown = ", ".join(keys[:_TOLD_PICTURES]) + (", …" if keys[_TOLD_PICTURES:] else "")
        lines.append(f"only version {version} right {len(keys):,}{': ' if keys else ''}{shown}")
    return "\n".join(lines)
