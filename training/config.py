"""What one training run is: a frozen, typed record that is also the command line.

Recipes (recipes.py) say *what* is trained; the fields of `TrainConfig` itself say where and with
how many. The same record goes to MLflow and into every checkpoint.
"""

import dataclasses
import hashlib
import json
import math
import unicodedata
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from alexnet import Init, Rule, Variant
from alexnet.errors import UserError

# Samples are shuffled inside windows of so many shards by default, so a node reading from S3 holds
# a few shards at a time and still mixes tens of thousands of samples.
WINDOW_SHARDS = 8
# Bytes. A name is a folder, or a file that is written as .HOST~PID~NAME.jsonl.XXXXXXXX.tmp first
# (pipelines/storage.py): file systems take 255, a host's name of it up to 64; MLflow takes 250.
LONGEST_NAME = 150
_HIGHEST = 2**63  # what torch's generators take as a seed, and beyond all other uses


@dataclass(frozen=True)
class ModelConfig:
    variant: Variant = "ungrouped"
    """ungrouped: the slides' network, 62,378,344 parameters; paper: Krizhevsky 2012, 60,965,224."""
    width: float = 1.0
    """Factor on the channels of every hidden layer; below 1 for laptops, no longer AlexNet."""
    batch_norm: bool = False
    """Batch normalisation after every convolution (ungrouped only); in neither slides nor paper."""
    norm_group: int = 64
    """About so many images per batch-norm statistic, on any workers; 0: all of a worker's."""
    init: Init = "source"
    """text: the paper's section 5; source: its released code, 0.03 in conv3-5; he: He normal."""


@dataclass(frozen=True)
class OptimConfig:
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch-size"])] = 128
    """Images per step over all workers."""
    epochs: Annotated[int, tyro.conf.arg(aliases=["--epochs"])] = 90
    """Passes over the train split."""
    lr: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 0.01
    """Learning rate of the weights at its highest."""
    rule: Rule = "torch"
    """torch: rate outside of the velocity; paper: inside it; lars: a rate per layer (You 2017)."""
    momentum: float = 0.9
    """Share of the velocity that each step keeps."""
    weight_decay: float = 5e-4
    """L2 penalty on weights; biases and normalisation parameters have none."""
    bias_lr_factor: float = 1.0
    """Learning rate of biases as a multiple of the weights'; 2 in the 2012 source."""
    bias_lr_constant: bool = False
    """Biases keep their highest rate while that of the weights falls, as in the 2012 source."""
    conv1_slow_epoch: int | None = None
    """From this epoch on, counted from 0, conv1's weights learn at a tenth; 66 in `paper`."""
    conv1_freeze_epoch: int | None = None
    """From this epoch on, counted from 0, conv1 learns nothing more; 71 in `paper`."""
    lars_trust: float = 0.001
    """Trust coefficient of the lars rule: a step's length as a share of the weights', at rate 1."""
    schedule: Literal["step", "cosine", "plateau"] = "cosine"
    """step: a tenth at milestones; cosine: warm-up, then to zero; plateau: a tenth at each one."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the step schedule divides the rate by ten; the first epoch is 0."""
    plateau_epochs: int = 5
    """Epochs without a better val error that make a plateau."""
    plateau_drops: int = 3
    """Plateaus that divide the rate by ten; the next one ends the training."""
    warmup_epochs: float = 0.0
    """Length of the cosine schedule's warm-up."""
    label_smoothing: float = 0.0
    """Probability mass taken from the true class and spread over all."""
    dropout: float = 0.5
    """Share of the hidden layers' inputs that a step leaves out; 0.5 in slides and paper."""
    ema_decay: float = 0.0
    """Per-step decay of averaged weights, which are then evaluated and registered; 0 is off."""


@dataclass(frozen=True)
class AugmentConfig:
    crop: Literal["auto", "random", "resized", "centre"] = "auto"
    """random: 227 crops, as the paper; resized: random area; auto: random where there is room."""
    flip: bool = True
    """Mirror half of the images."""
    colour_sigma: float = 0.1
    """Standard deviation of the paper's PCA colour noise; 0 is off."""
    colour_epochs: int | None = None
    """Epochs with colour noise; 66 in `paper`, None for all."""


@dataclass(frozen=True)
class TrainConfig:
    recipe: tyro.conf.Suppress[str] = "baseline"
    """The recipe that the fields started from: the first argument, not a flag."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How its weights are found."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What happens to images on their way into it."""
    normalise: Literal["mean", "mean_std"] = "mean_std"
    """mean: subtract the train split's mean RGB, as the paper; mean_std: divide by std too."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """fp32: IEEE; tf32: the same in TF32 on GPUs; bf16: under autocast. Weights stay float32."""
    compress_gradients: bool = False
    """Send gradients between workers as bfloat16: half the bytes."""
    synthetic: bool = False
    """Train on random images that stay on the device: the ceiling. Never registered."""
    seed: int = 0
    """Fixes initialisation, order, augmentation and dropout."""
    shuffle_window: int = WINDOW_SHARDS
    """Shards whose images are mixed with each other: more for sorted ones. S3: cache for two."""
    init_from: str | None = None
    """Weights to begin with: models:/alexnet@champion, run:NAME, or a safetensors file of them."""
    freeze: Literal["none", "features"] = "none"
    """features: the convolutions stay as --init-from gives them, and the rest is trained."""
    flat_loss_steps: int = 20_000
    """Stop if the loss is still that of guessing after so many steps; 0 never stops."""

    data: str | None = None
    """Folder or s3:// prefix of the shards; the newest ones under $ALEXNET_HOME by default."""
    allow_sorted: bool = False
    """Train although the shards are so sorted that batches hold few of the classes."""
    name: str | None = None
    """Name of the run; the same name continues it. By default recipe, date and time."""
    experiment: str | None = None
    """MLflow's experiment for the run; $MLFLOW_EXPERIMENT_NAME by default, or else alexnet."""
    storage: str | None = None
    """Folder or s3:// prefix for checkpoints; $ALEXNET_HOME/runs by default."""
    workers: int = 1
    """Data-parallel workers, a GPU each where GPUs are used; 2:8 goes on with any of 2 to 8."""
    min_workers: int | None = None
    """The fewest workers to go on with, as in --workers 2:8; all of them by default."""
    max_failures: int = 3
    """Times that the training goes on after a worker or node was lost."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses GPUs where the cluster has one for every worker."""
    cpus_per_worker: int | None = None
    """CPUs of each worker, to decode and, without GPU, to train; by default a fair share."""
    compile: bool = False
    """Run the network through torch.compile: slow to start, faster afterwards."""
    deterministic: bool = False
    """Only algorithms that give the same bits again on the same machine; slower on GPUs."""
    checkpoint_steps: int | None = None
    """Checkpoint every so many steps too."""
    checkpoint_minutes: float | None = 10.0
    """Checkpoint when the last one is so old, besides the best epochs and the end; None: never."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints of the highest val top-1 to keep besides."""
    log_steps: int = 50
    """Steps between two log lines."""
    cache_gb: float = 20.0
    """Local disk for shards that are read from S3, per node, in GB."""
    cache: Literal["none", "decoded"] = "none"
    """decoded: keep decoded images on each node's disk; after the first epoch none is decoded."""
    decoded_gb: float | None = None
    """Local disk for decoded images, per node, in GB; by default all, 207 GB of ImageNet."""
    shared_fs: bool = False
    """Say that local paths are on a file system that every node shares."""
    register: bool = True
    """Register the trained model as a new version, with alias `candidate`."""
    model_name: str = "alexnet"
    """The registered model that it becomes a version of."""
    ray_logs: bool = False
    """Show what Ray's own processes say too, as Ray shows it."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPUs of every node to MLflow, every ten seconds."""
    profile: bool = False
    """Record a few steps as a trace for Perfetto, kept with the run."""

    def __post_init__(self) -> None:
        """Raises UserError for a value out of its range and for two that exclude each other."""
        _check_ranges(self)
        _check_pairs(self)


def _check_ranges(config: TrainConfig) -> None:
    model, optim, augment = config.model, config.optim, config.augment
    for name, value, lowest in [
        ("model.norm-group", model.norm_group, 0),
        ("optim.batch-size", optim.batch_size, 1),
        ("optim.epochs", optim.epochs, 1),
        ("optim.weight-decay", optim.weight_decay, 0),
        ("optim.bias-lr-factor", optim.bias_lr_factor, 0),
        ("optim.plateau-epochs", optim.plateau_epochs, 1),
        ("optim.plateau-drops", optim.plateau_drops, 0),
        ("optim.conv1-slow-epoch", optim.conv1_slow_epoch, 0),
        ("optim.conv1-freeze-epoch", optim.conv1_freeze_epoch, 0),
        ("optim.warmup-epochs", optim.warmup_epochs, 0),
        ("augment.colour-sigma", augment.colour_sigma, 0),
        ("augment.colour-epochs", augment.colour_epochs, 0),
        ("seed", config.seed, 0),
        ("shuffle-window", config.shuffle_window, 1),
        ("flat-loss-steps", config.flat_loss_steps, 0),
        ("workers", config.workers, 1),
        ("min-workers", config.min_workers, 1),
        ("max-failures", config.max_failures, 0),
        ("cpus-per-worker", config.cpus_per_worker, 1),
        ("checkpoint-steps", config.checkpoint_steps, 1),
        ("keep-last", config.keep_last, 1),
        ("keep-best", config.keep_best, 0),
        ("log-steps", config.log_steps, 1),
        ("cache-gb", config.cache_gb, 0),
        ("decoded-gb", config.decoded_gb, 0),
    ]:
        if value is not None and not lowest <= value < _HIGHEST:
            raise UserError(f"--{name} {value} is out of range; pass {lowest} or more")
    for name, share in [
        ("optim.momentum", optim.momentum),
        ("optim.label-smoothing", optim.label_smoothing),
        ("optim.dropout", optim.dropout),
        ("optim.ema-decay", optim.ema_decay),
    ]:
        if not 0 <= share < 1:
            raise UserError(f"--{name} {share} is out of range; pass 0 or more, below 1")
    for name, rate, usual in [
        ("optim.lr", optim.lr, "the paper starts at 0.01"),
        ("optim.lars-trust", optim.lars_trust, "its paper takes 0.001"),
        (
            "checkpoint-minutes",
            config.checkpoint_minutes,
            "pass None to save the best epochs and the end alone",
        ),
    ]:
        if rate is not None and not 0 < rate < math.inf:
            raise UserError(f"--{name} {rate} is not positive; {usual}")


def _check_pairs(config: TrainConfig) -> None:
    if config.optim.batch_size < config.workers:
        raise UserError(
            f"a batch of {config.optim.batch_size} cannot feed {config.workers} workers; "
            f"pass --optim.batch-size {config.workers} or more, or fewer --workers"
        )
    if config.min_workers is not None and config.min_workers > config.workers:
        raise UserError(
            f"--min-workers {config.min_workers} is more than --workers {config.workers}; "
            f"pass --workers {config.workers}:{config.min_workers}"
        )
    if config.freeze != "none" and config.init_from is None:
        raise UserError("--freeze needs --init-from; drawn convolutions are worth nothing")


# What a run may change when it continues: where and how it runs and how much it says, never what it
# learns. Workers and compilation change the last bits of numbers, as a GPU does too.
WHERE_AND_HOW_MANY = frozenset(
    {"data", "name", "storage", "workers", "min_workers", "max_failures", "device", "compile"}
    | {"cpus_per_worker", "deterministic", "checkpoint_steps", "checkpoint_minutes", "keep_last"}
    | {"keep_best", "log_steps", "cache_gb", "cache", "decoded_gb", "shared_fs", "register"}
    | {"model_name", "profile", "allow_sorted", "experiment", "ray_logs", "system_metrics"}
)

# Fields that configs of earlier releases lack, with what those did.
ADDED: dict[str, Any] = {"cache": "none", "decoded_gb": None, "shuffle_window": 8}
ADDED |= {"allow_sorted": False, "model_name": TrainConfig.model_name}
ADDED |= {"init_from": None, "freeze": "none", "experiment": None, "optim.dropout": 0.5}
ADDED |= {"ray_logs": False, "system_metrics": False}

# A field that configs of earlier releases have. It said what decoded images, never what was
# learned, so a saved config is read without it.
RETIRED = frozenset({"decode"})


def checked_name(name: str, flag: str) -> str:
    """The name as all will know it: in Unicode's form NFC, so that the same letters are one name
    whoever typed them. flag: how the user gave it.

    Letters and digits of any script, '-', '_' and '.', not at the ends: such a name needs no quotes
    in a shell or in MLflow's filters, and is one part of a path, of a key in S3 and of a log line.
    Raises UserError for any other.
    """
    name = unicodedata.normalize("NFC", name)
    # Marks are parts of letters, as in Hindi and Thai.
    usual = all(c in "-_." or c.isalnum() or unicodedata.category(c)[0] == "M" for c in name)
    ends = name != name.lstrip("-.").rstrip(".") or not name
    if not usual or ends or len(name.encode()) > LONGEST_NAME:
        shown = repr(name if len(name) <= 40 else f"{name[:40]}…")
        raise UserError(
            f"{flag} {shown} is not a name; use letters, digits, '-', '_' and '.', without '-' or "
            f"'.' at the start or '.' at the end, {LONGEST_NAME} bytes of UTF-8 at most"
        )
    return name


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """A config of an earlier release, as JSON, with the fields that it lacks."""
    whole = {name: value for name, value in ADDED.items() if "." not in name} | document
    for name, value in ADDED.items():
        group, _, inner = name.partition(".")
        if inner and isinstance(whole.get(group), dict):
            whole[group] = {inner: value} | whole[group]
    return whole


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The whole record as JSON-ready nested dicts."""
    document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return document


def flatten(config: TrainConfig) -> dict[str, str]:
    """One line per field with a dotted name: what MLflow shows as parameters."""
    flat: dict[str, str] = {}
    for name, value in to_dict(config).items():
        inner = value if isinstance(value, dict) else {"": value}
        for key, leaf in inner.items():
            flat[f"{name}.{key}" if key else name] = in_words(leaf)
    return flat


def in_words(leaf: Any) -> str:
    """The value of a field as MLflow shows it."""
    return json.dumps(leaf).strip('"')


def science(config: TrainConfig) -> dict[str, str]:
    """The fields that decide what is learned; a run continues only while these stay the same."""
    flat = flatten(config)
    return {key: value for key, value in flat.items() if key not in WHERE_AND_HOW_MANY}


def science_digest(config: TrainConfig) -> str:
    """sha256 of `science`: two runs with the same digest and data learn the same."""
    return hashlib.sha256(json.dumps(science(config), sort_keys=True).encode()).hexdigest()
