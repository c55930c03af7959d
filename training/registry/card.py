"""The model card: Markdown, with the head of YAML that the Hugging Face Hub reads.

card.md.j2 has its words. Whatever nobody measured says so, and no number stands in for it.
"""

import re
import statistics
from pathlib import Path, PurePath
from typing import Any

import jinja2
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from alexnet.model import AlexNet
from pipelines.shards import Manifest
from training import tracking
from training.accuracy import Metrics, short
from training.config import TrainConfig
from training.metrics import metric_history, metrics_of, points
from training.recipes import known_differences

_MAX_DESCRIPTION = 5000  # characters of a version's description in MLflow's own tables
_SHOWN_CLASSES = 10
_WNID = re.compile(r"n\d{8}")
_IMAGENET_TERMS = (
    "ImageNet gives access to its images for non-commercial research and education only, and "
    "owns none of them: their rights stay with the photographers (https://image-net.org/download)."
)


def write(
    client: MlflowClient, run_id: str, network: AlexNet, manifest: Manifest, config: TrainConfig
) -> str:
    """Logs card/card.md of a run, with the figures that the run has by now; returns what of it
    serves as the version's description: no head, no figures."""
    card = render(client, run_id, network, manifest, config)
    client.log_text(run_id, card, "card/card.md")
    text = card.split("\n---\n", 1)[1].rpartition("\n## Figures")[0]
    more = "\nThe whole card is card/card.md among the artifacts of the run.\n"
    return text[: _MAX_DESCRIPTION - len(more)] + more


def render(
    client: MlflowClient, run_id: str, network: AlexNet, manifest: Manifest, config: TrainConfig
) -> str:
    """What the run, its config and its manifest say; nothing is measured here."""
    run = client.get_run(run_id)
    tags = run.data.tags
    license, terms = licence(manifest)
    names = [short(name) for name in manifest.class_names[:_SHOWN_CLASSES]]
    more = manifest.num_classes - len(names)
    return _template().render(
        run=run.info.run_name,
        run_id=run_id,
        recipe=config.recipe,
        config=config,
        differences=known_differences(config.recipe),
        parameters=sum(weight.numel() for weight in network.parameters()),
        manifest=manifest,
        classes=", ".join(names) + (f" and {more:,} more" if more else ""),
        data=tags["data"],
        license=license,
        terms=terms,
        commit=tags.get("mlflow.source.git.commit"),
        code_sha256=tags.get("code_sha256"),
        registry=tracking.tracking_uri(),
        figures={PurePath(file.path).name for file in client.list_artifacts(run_id, "figures")},
        **_measured(client, run),
    )


def licence(manifest: Manifest) -> tuple[str, str]:
    """The Hub's word for the terms, and what is known of them: the official archives are recognised
    when shards are built; of any other set the manifest does not record where it comes from."""
    if manifest.document.get("official"):
        return "other", f"The official ILSVRC archives. {_IMAGENET_TERMS}"
    unknown = "The terms of this set's images are not recorded"
    if all(_WNID.fullmatch(wnid) for wnid in manifest.wnids):
        named = "The ids of its classes look like ImageNet's; if it is from there"
        return "unknown", f"{unknown}. {named}: {_IMAGENET_TERMS}"
    return "unknown", f"{unknown}; ask who made it."


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        finalize=_marked,
    )
    return environment.get_template("card.md.j2")


def _marked(value: Any) -> str:
    """Text that Markdown shows as it is, in one line and in a table's cell. Controls and reversed
    writing stand as their number."""
    if hasattr(value, "__html__"):  # of tojson, or safe
        return str(value)
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(value))
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", text)


def _measured(client: MlflowClient, run: Run) -> dict[str, Any]:
    """Hardware of the last worker group, of which rank 0 names its own for all; throughput: median
    images/s, all workers; hours: start to last metric; accuracy: of the last epoch, as logged."""
    found, run_id = metrics_of(run), run.info.run_id
    rates = [rate for _, rate in metric_history(client, run_id, "images_per_second")]
    steps = [metric.timestamp for metric in points(client, run_id, "loss")]
    device = run.data.tags.get("hardware", "hardware that was not recorded")
    workers = f"{found['workers']:.0f} worker(s)" if "workers" in found else "workers"
    accuracy = None
    if all(f"val_{name}" in found for name in ("images", "correct1", "correct5", "loss")):
        images, one, five = (int(found[f"val_{n}"]) for n in ("images", "correct1", "correct5"))
        accuracy = Metrics(images, one / images, five / images, found["val_loss"], one, five)
    return {
        "hardware": f"{workers} on {device}" if rates else None,
        "throughput": statistics.median(rates) if rates else None,
        # Clocks jump.
        "hours": max(0.0, (max(steps) - run.info.start_time) / 3.6e6) if steps else None,
        "accuracy": accuracy,
    }
