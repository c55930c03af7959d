"""The model card: written when a model is registered, completed by the gate.

It lies in the run, where MLflow shows it: card/card.md, card/card.html and card/facts.json, of
which the two are made; its text is also the version's description.
"""

import dataclasses
import logging
import statistics
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec
from pipelines.shards import Manifest
from training import figures, tracking
from training.accuracy import Scored, confused_pairs
from training.config import TrainConfig
from training.registry import card_page
from training.registry.differences import differences
from training.registry.facts import Accuracy, Example, Facts, licence
from training.registry.lineage import read_artifact
from training.registry.verdict import Check
from training.registry.versions import NAME

logger = logging.getLogger("training")

_FACTS = "card/facts.json"
_MAX_DESCRIPTION = 5000  # characters of a version's description in MLflow's own tables
_PAIRS = 10


def write(
    client: MlflowClient,
    run_id: str,
    network: AlexNet,
    spec: InputSpec,
    manifest: Manifest,
    config: TrainConfig,
) -> str:
    """Logs the card of a run with the pictures that lie under figures/ of it by now, and adds
    figures/top5.png; returns the text for the version's description.

    network: on the CPU, in evaluation mode. Shards that cannot be read leave the examples out.
    """
    facts = gather(client, run_id, network, manifest, config)
    try:
        panels = figures.panels(network, spec, manifest, facts.data)
    except UserError:
        panels = None
    if panels is not None:
        client.log_figure(run_id, figures.top5_panels(panels, ""), "figures/top5.png")
        examples = tuple(Example(p.key, p.true, p.likeliest) for p in panels)
        facts = dataclasses.replace(facts, examples=examples)
    return _log(client, facts)


def update(
    client: MlflowClient, version: ModelVersion, scored: Scored, verdict: Mapping[str, Any]
) -> None:
    """Completes the card and the description of a version with the accuracy and the mistakes that
    the gate found on the val split, and with `verdict` as verdict.document makes it.

    A version without a card is left as it is, and so is one whose card a kill or a full disk tore.
    """
    found = read_artifact(client, version.run_id, _FACTS) if version.run_id else None
    if found is None:
        return
    try:
        facts = Facts.from_json(found.decode())
    except (LookupError, TypeError, ValueError) as error:
        logger.warning(f"{_FACTS} of run {version.run_id} is damaged ({error}); the card stays")
        return
    names = facts.class_names
    pairs = confused_pairs(scored.confusion)[:_PAIRS]
    facts = dataclasses.replace(
        facts,
        accuracy=Accuracy.of(scored.metrics),
        recomputed=True,
        registry=tracking.tracking_uri(),
        pairs=tuple((names[a], names[b], count) for a, b, count in pairs),
        **_judged(verdict),
    )
    client.update_model_version(NAME, str(version.version), _log(client, facts))


def gather(
    client: MlflowClient, run_id: str, network: AlexNet, manifest: Manifest, config: TrainConfig
) -> Facts:
    """What the run, its config and its manifest say; nothing is measured here."""
    run = client.get_run(run_id)
    tags = run.data.tags
    return Facts(
        run=str(run.info.run_name),
        run_id=run_id,
        recipe=config.recipe,
        variant=config.model.variant,
        parameters=sum(weight.numel() for weight in network.parameters()),
        width=config.model.width,
        batch_norm=config.model.batch_norm,
        class_names=manifest.class_names,
        geometry=_geometry(manifest),
        manifest_sha256=manifest.digest,
        plan_id=manifest.plan_id,
        data=tags["data"],
        train=manifest.num_samples("train"),
        val=manifest.num_samples("val"),
        licence=licence(manifest),
        training=_training(config),
        differences=differences(config, manifest),
        commit=tags.get("mlflow.source.git.commit"),
        code_sha256=tags.get("code_sha256"),
        hardware=_hardware(run),
        throughput=_throughput(client, run_id),
        hours=_hours(client, run),
        accuracy=_accuracy(run.data.metrics),
        registry=tracking.tracking_uri(),
    )


def _geometry(manifest: Manifest) -> str:
    return (
        f"shorter side to {manifest.resize} px (Lanczos), the middle {manifest.crop}×"
        f"{manifest.crop} stored as JPEG of quality {manifest.quality}, views of 227×227 from there"
    )


def _training(config: TrainConfig) -> tuple[tuple[str, str], ...]:
    optim, augment = config.optim, config.augment
    noise = f"colour noise {augment.colour_sigma:g}" if augment.colour_sigma else "no colour noise"
    return (
        ("Epochs", f"{optim.epochs} in batches of {optim.batch_size}"),
        ("Learning rate", f"{optim.lr:g}, schedule {optim.schedule}, rule {optim.rule}"),
        ("Momentum, decay", f"{optim.momentum:g}, {optim.weight_decay:g}"),
        (
            "Augmentation",
            f"crop {augment.crop}, {'mirrored' if augment.flip else 'not mirrored'}, {noise}",
        ),
        ("Precision", config.precision),
        ("Seed", str(config.seed)),
    )


def _hardware(run: Run) -> str | None:
    """Of the last worker group; rank 0 names its device for all."""
    metrics = run.data.metrics
    if "images_per_second" not in metrics:
        return None
    workers = f"{metrics['workers']:.0f} worker(s)" if "workers" in metrics else "workers"
    on = f"{workers} on {run.data.tags.get('hardware', 'hardware that was not recorded')}"
    if "gpu_memory_gb" not in metrics:
        return on
    return f"{on}, {metrics['gpu_memory_gb']:.1f} GB of its memory in use"


def _throughput(client: MlflowClient, run_id: str) -> float | None:
    rates = [rate for _, rate in tracking.metric_history(client, run_id, "images_per_second")]
    return statistics.median(rates) if rates else None


def _hours(client: MlflowClient, run: Run) -> float | None:
    last = [metric.timestamp for metric in client.get_metric_history(run.info.run_id, "loss")]
    return max(0.0, (max(last) - run.info.start_time) / 3.6e6) if last else None  # clocks jump


def _accuracy(metrics: Mapping[str, float]) -> Accuracy | None:
    """Of the last epoch, as the training logged it."""
    names = ("val_images", "val_correct1", "val_correct5", "val_loss")
    if not all(name in metrics for name in names):
        return None
    images, correct1, correct5 = (int(metrics[name]) for name in names[:3])
    return Accuracy(images, correct1, correct5, metrics["val_loss"])


def _judged(verdict: Mapping[str, Any]) -> dict[str, Any]:
    outcome = "passed" if verdict["passed"] else "refused"
    if verdict["forced"]:
        outcome = f"forced past the gate, because: {verdict['reason']}"
    checks = tuple(Check(**check) for check in verdict["checks"])
    return {"verdict": f"{outcome} ({verdict['at']})", "checks": checks}


def _log(client: MlflowClient, facts: Facts) -> str:
    """Logs the three files; returns the text for the description, cut where MLflow's limit is."""
    page = card_page.html(facts, _pictures(client, facts.run_id))
    client.log_text(facts.run_id, card_page.markdown(facts), "card/card.md")
    client.log_text(facts.run_id, page, "card/card.html")
    client.log_text(facts.run_id, facts.to_json(), _FACTS)
    return card_page.description(facts, _MAX_DESCRIPTION)


def _pictures(client: MlflowClient, run_id: str) -> dict[str, bytes]:
    """PNG files by name, such as "curves", of those that the run has under figures/."""
    paths = [file.path for file in client.list_artifacts(run_id, "figures")]
    found = {PurePath(path).stem: read_artifact(client, run_id, path) for path in paths}
    return {name: content for name, content in found.items() if content is not None}
