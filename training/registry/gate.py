"""The gate between a candidate and the champion."""

import os

import torch
from mlflow.tracking import MlflowClient

from pipelines import shards
from training.evaluate import Metrics, evaluate
from training.loader import Loader
from training.registry.versions import NAME, aliases, load, resolve, run_of

# The exported float32 program on another machine may round differently: a picture or two at the
# border may flip, no more.
_TOP1_TOLERANCE = 0.005
_LOSS_TOLERANCE = 0.01  # relative


def promote(client: MlflowClient, version: str | None, data: str | None) -> list[str]:
    """Makes a version the champion if it is as good as it says and no worse than the present one.

    Returns the lines that tell it. Raises Refused with the reason, and moves nothing then.
    """
    candidate = resolve(client, version)
    number = str(candidate.version)
    champion = aliases(client).get("champion")
    if champion == number:
        return [f"version {champion} is the champion already"]
    run = run_of(client, candidate)
    if run is None or "manifest_sha256" not in run.data.tags:
        raise Refused(f"version {number} was not registered by training/run.py: no run to check")
    data = data or run.data.tags["data"]
    manifest = shards.load_manifest(data)
    if manifest.digest != run.data.tags["manifest_sha256"]:
        raise Refused(
            f"{data} is not the data set of version {number} (manifest "
            f"{manifest.digest[:12]}, trained on {run.data.tags['manifest_sha256'][:12]}); "
            "pass the right one with --data"
        )
    found = _measure(number, data, manifest)
    _compare_with_logged(number, found, run.data.metrics)
    lines = [_told(number, found, "recomputed, equals the logged metrics")]
    if champion is not None:
        before = _measure(champion, data, manifest)
        lines.append(_told(champion, before, "champion so far"))
        if found.top1 < before.top1:
            raise Refused(
                f"version {number} has val top-1 {found.top1:.4f}, champion {champion} "
                f"has {before.top1:.4f} on the same {found.images} pictures"
            )
        client.set_model_version_tag(NAME, number, "previous_champion", champion)
    client.set_model_version_tag(NAME, number, "promoted_val_top1", str(found.top1))
    client.set_registered_model_alias(NAME, "champion", number)
    return [*lines, f"version {number} is the champion: models:/{NAME}@champion"]


def rollback(client: MlflowClient) -> list[str]:
    """Gives the alias back to the champion before; returns the lines that tell it."""
    champion = aliases(client).get("champion")
    if champion is None:
        raise Refused("there is no champion to roll back; promote one first")
    previous = client.get_model_version(NAME, champion).tags.get("previous_champion")
    if previous is None:
        raise Refused(f"champion {champion} had none before it; promote another version instead")
    client.set_registered_model_alias(NAME, "champion", previous)
    return [f"version {previous} is the champion again, {champion} is not"]


class Refused(Exception):
    """The gate's no; the text is the reason."""


def _measure(version: str, data: str, manifest: shards.Manifest) -> Metrics:
    model = load(f"models:/{NAME}/{version}")
    if model.wnids != manifest.wnids:
        raise Refused(f"version {version} knows other classes than {data}")
    threads = os.cpu_count() or 1
    with Loader(data, manifest, "val", threads=threads, cache_gb=20) as loader:
        return evaluate(model.network, loader, model.input_spec, device=torch.device("cpu"))


def _compare_with_logged(version: str, found: Metrics, logged: dict[str, float]) -> None:
    top1, loss = logged.get("val_top1"), logged.get("val_loss")
    if top1 is None or loss is None:
        raise Refused(f"the run of version {version} has no val_top1 and val_loss to compare with")
    off = abs(found.top1 - top1) > max(_TOP1_TOLERANCE, 2 / found.images)
    if off or abs(found.loss - loss) > _LOSS_TOLERANCE * max(1.0, loss):
        raise Refused(
            f"version {version} as loaded has val top-1 {found.top1:.4f} and loss "
            f"{found.loss:.4f}, its run logged {top1:.4f} and {loss:.4f}: not the model it claims"
        )


def _told(version: str, metrics: Metrics, note: str) -> str:
    return (
        f"version {version}: val top-1 {metrics.top1:.4f}, top-5 {metrics.top5:.4f}, loss "
        f"{metrics.loss:.4f} on {metrics.images} pictures ({note})"
    )
