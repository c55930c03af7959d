"""What one training run is: a frozen, typed record that is also the command line.

Recipes (recipes.py) say *what* is trained; the fields of `TrainConfig` itself say where and with
how many. The same record goes to MLflow and into every checkpoint.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro

from alexnet.errors import UserError
from alexnet.model import Init, Variant

_HIGHEST = 2**63  # what torch's generators take as a seed, and beyond all other uses


@dataclass(frozen=True)
class ModelConfig:
    variant: Variant = "deck"
    """deck: the slides' network, 62,378,344 parameters at 1000 classes. paper: Krizhevsky 2012,
    grouped and with LRN, 60,965,224."""
    width: float = 1.0
    """Factor on the channels of every hidden layer; below 1 for laptops, no longer AlexNet."""
    batch_norm: bool = False
    """Batch normalisation after every convolution (deck only); not in the slides or the paper."""
    init: Init = "source"
    """text: the paper's section 5; source: its released code, 0.03 in conv3-5; he: He normal."""


@dataclass(frozen=True)
class OptimConfig:
    batch_size: int = 128
    """Images per step over all workers."""
    epochs: int = 90
    """Passes over the train split."""
    lr: float = 0.01
    """Learning rate of the weights at its highest."""
    momentum: float = 0.9
    """Momentum of SGD, in PyTorch's form (the rate stays outside of the velocity)."""
    weight_decay: float = 5e-4
    """L2 penalty on weights; biases and normalisation parameters have none."""
    bias_lr_factor: float = 1.0
    """Learning rate of biases as a multiple of the weights'; 2 in the 2012 source."""
    schedule: Literal["step", "cosine"] = "cosine"
    """step: a tenth at each milestone; cosine: linear warm-up, then half a cosine to zero."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the step schedule divides the rate by ten."""
    warmup_epochs: float = 0.0
    """Length of the cosine schedule's warm-up."""
    label_smoothing: float = 0.0
    """Probability mass taken from the true class and spread over all."""


@dataclass(frozen=True)
class AugmentConfig:
    crop: Literal["auto", "random", "resized", "centre"] = "auto"
    """random: the paper's 227 crops of a larger stored picture; resized: random area and aspect;
    auto: random where the shards leave room, resized otherwise."""
    flip: bool = True
    """Mirror half of the pictures."""
    colour_sigma: float = 0.1
    """Standard deviation of the paper's PCA colour noise; 0 is off."""


@dataclass(frozen=True)
class TrainConfig:
    # The name of the recipe that the fields started from; chosen by the first argument, not a flag.
    recipe: tyro.conf.Suppress[str] = "deck"
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    normalise: Literal["mean", "mean_std"] = "mean_std"
    """mean: subtract the train split's mean RGB, as the paper; mean_std: also divide by its
    standard deviation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs forward and backward under autocast; weights stay float32."""
    seed: int = 0
    """Fixes initialisation, order, augmentation and dropout."""
    flat_loss_steps: int = 20_000
    """Stop if the loss is still that of guessing after so many steps; 0 never stops."""

    data: str | None = None
    """Folder or s3:// prefix of the shards; the newest ones under $ALEXNET_HOME by default."""
    name: str | None = None
    """Name of the run; the same name continues it. By default recipe, date and time."""
    storage: str | None = None
    """Folder or s3:// prefix for checkpoints; $ALEXNET_HOME/runs by default."""
    workers: int = 1
    """Data-parallel workers; one GPU each where GPUs are used."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses GPUs where the cluster has one for every worker."""
    cpus_per_worker: int | None = None
    """CPUs of each worker for decoding and, without GPU, for the training; an even share of the
    smallest node by default."""
    checkpoint_steps: int | None = None
    """Checkpoint every so many steps too, not only at the end of each epoch."""
    log_steps: int = 50
    """Steps between two log lines."""
    cache_gb: float = 20.0
    """Local disk for shards that are read from S3, per node, in GB."""
    shared_fs: bool = False
    """Say that local paths are on a file system that every node shares."""
    register: bool = True
    """Register the trained model as a version of `alexnet` with alias `candidate`."""

    def __post_init__(self) -> None:
        for name, value, lowest in [
            ("workers", self.workers, 1),
            ("optim.batch-size", self.optim.batch_size, 1),
            ("optim.epochs", self.optim.epochs, 1),
            ("optim.weight-decay", self.optim.weight_decay, 0),
            ("optim.bias-lr-factor", self.optim.bias_lr_factor, 0),
            ("optim.warmup-epochs", self.optim.warmup_epochs, 0),
            ("augment.colour-sigma", self.augment.colour_sigma, 0),
            ("seed", self.seed, 0),
            ("flat-loss-steps", self.flat_loss_steps, 0),
            ("log-steps", self.log_steps, 1),
            ("cpus-per-worker", self.cpus_per_worker, 1),
            ("checkpoint-steps", self.checkpoint_steps, 1),
            ("cache-gb", self.cache_gb, 0),
        ]:
            if value is not None and not lowest <= value < _HIGHEST:
                raise UserError(f"--{name} {value} is out of range; pass {lowest} or more")
        for name, share in [
            ("optim.momentum", self.optim.momentum),
            ("optim.label-smoothing", self.optim.label_smoothing),
        ]:
            if not 0 <= share < 1:
                raise UserError(f"--{name} {share} is out of range; pass 0 or more, below 1")
        if not 0 < self.optim.lr < math.inf:
            raise UserError(f"--optim.lr {self.optim.lr} is not positive; the paper starts at 0.01")
        if self.optim.batch_size < self.workers:
            raise UserError(
                f"a batch of {self.optim.batch_size} cannot feed {self.workers} workers; "
                f"pass --optim.batch-size {self.workers} or more, or fewer --workers"
            )


# What a run may change when it continues: where it runs and how much it says, never what it learns.
_WHERE_AND_HOW_MANY = frozenset(
    {"data", "name", "storage", "workers", "device", "cpus_per_worker", "checkpoint_steps"}
    | {"log_steps", "cache_gb", "shared_fs", "register"}
)


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
            flat[f"{name}.{key}" if key else name] = json.dumps(leaf).strip('"')
    return flat


def science(config: TrainConfig) -> dict[str, str]:
    """The fields that decide what is learned; a run continues only while these stay the same."""
    flat = flatten(config)
    return {key: value for key, value in flat.items() if key not in _WHERE_AND_HOW_MANY}


def science_digest(config: TrainConfig) -> str:
    """sha256 of `science`: two runs with the same digest and data learn the same."""
    return hashlib.sha256(json.dumps(science(config), sort_keys=True).encode()).hexdigest()
