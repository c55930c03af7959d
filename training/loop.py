"""The training itself: epochs, steps, checkpoints, guards. Free of Ray and MLflow.

Rank, world size and device come in as arguments and everything that happens goes out through two
functions, so benchmarks, tests and machines without Ray run the very same code as the cluster.
"""

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alexnet import optim
from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.preprocess import NETWORK_SIDE, Augment, InputSpec, train_view
from pipelines.shards import Manifest, load_manifest
from training import checkpoint
from training.config import TrainConfig, science_digest, to_dict
from training.evaluate import evaluate
from training.loader import Batch, Loader
from training.meter import Meter
from training.order import epoch_order, global_batch, rank_part, steps_per_epoch

# Share of ln(num_classes), the loss of guessing, that counts as having learned nothing.
_FLAT_SHARE = 0.99


class TrainingStopped(Exception):
    """The run cannot become a model; the text says at which step, why and what to try."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among its peers and what it may use."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    threads: int = 1


Log = Callable[[dict[str, float], int], None]
Report = Callable[[dict[str, float], Path | None], None]


def fit(
    config: TrainConfig,
    data: str,
    place: Place,
    *,
    log: Log,
    report: Report,
    resume: Path | None = None,
    run_id: str = "",
) -> dict[str, float]:
    """Trains to the last epoch and returns the last metrics of the val split.

    data: URI of a finished shard set. resume: a checkpoint folder to go on from, at its next step.
    `log(metrics, step)` is called on rank 0; `report(metrics, checkpoint folder)` on every rank, at
    the same steps, with a folder on rank 0 only, which the receiver deletes once it is kept.
    Raises TrainingStopped for a loss that is not finite or stays flat.
    """
    manifest = load_manifest(data)
    threads, cache_gb = place.threads, config.cache_gb
    with (
        Loader(data, manifest, "train", threads=threads, cache_gb=cache_gb) as train,
        Loader(data, manifest, "val", threads=threads, cache_gb=cache_gb) as val,
    ):
        run = _Run(config, manifest, place, train, val, log, report, run_id)
        if resume is not None:
            run.restore(resume)
        while run.step < run.total_steps:
            run.epoch()
        return run.metrics


def input_spec(manifest: Manifest, config: TrainConfig) -> InputSpec:
    """Geometry and statistics of the shards, as the trained model will carry them."""
    covariance = manifest.pixels.covariance
    deviations = [math.sqrt(covariance[i][i]) for i in range(3)]
    red, green, blue = deviations if config.normalise == "mean_std" else (1.0, 1.0, 1.0)
    return InputSpec(
        resize=manifest.resize,
        crop=manifest.crop,
        mean=manifest.pixels.mean,
        std=(red, green, blue),
        covariance=covariance,
    )


def build_model(config: TrainConfig, num_classes: int) -> AlexNet:
    """The network of a config, initialised from its seed, on the CPU."""
    torch.manual_seed(config.seed)
    return AlexNet(
        config.model.variant,
        num_classes=num_classes,
        width=config.model.width,
        batch_norm=config.model.batch_norm,
        init=config.model.init,
    )


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Rate of the weights at a step (0-based) with `num_steps` in an epoch."""
    recipe = config.optim
    if recipe.schedule == "step":
        return recipe.lr * optim.step_decay(step, num_steps, recipe.milestones)
    warmup = round(recipe.warmup_epochs * num_steps)
    return recipe.lr * optim.warmup_cosine(step, recipe.epochs * num_steps, warmup)


class _Run:
    """The state of a training in progress: weights, momentum, position."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        place: Place,
        train: Loader,
        val: Loader,
        log: Log,
        report: Report,
        run_id: str,
    ) -> None:
        self.config, self.manifest, self.place = config, manifest, place
        self.train, self.val, self.log, self.report, self.run_id = train, val, log, report, run_id
        self.spec = input_spec(manifest, config)
        self.augment = _augment(config, manifest.crop)
        model = build_model(config, manifest.num_classes)
        self.model = model.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.replica: nn.Module = self.model
        if place.world_size > 1:
            self.replica = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = optim.sgd(
            self.model,
            lr=config.optim.lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
            bias_lr_factor=config.optim.bias_lr_factor,
        )
        self.steps_per_epoch = steps_per_epoch(train.num_samples, config.optim.batch_size)
        self.total_steps = config.optim.epochs * self.steps_per_epoch
        self.step = 0
        self.lowest_loss = math.inf
        self.metrics: dict[str, float] = {}
        self.meter = Meter(place.device)

    def restore(self, folder: Path) -> None:
        """Goes on from a checkpoint. Raises UserError for one of other data or settings: the MLflow
        run of this name may lie in another store, so its own check is not enough."""
        state = checkpoint.load_state(folder)
        now = {"manifest": self.manifest.digest, "science": science_digest(self.config)}
        if differs := [key for key, digest in now.items() if state[key] != digest]:
            what = {"manifest": "other shards", "science": "other settings"}
            raise UserError(
                f"checkpoint {folder} was trained with {' and '.join(what[k] for k in differs)}; "
                "choose another --name, or give the ones it began with"
            )
        checkpoint.load_model(folder, self.model)
        checkpoint.load_optimizer(folder, self.model, self.optimizer)
        self.step, self.lowest_loss = state["step"], state["lowest_loss"]
        self.metrics = state["metrics"]

    def epoch(self) -> None:
        """From the current step to the end of its epoch, then evaluation and a checkpoint."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        order = epoch_order(self.train.shard_sizes, seed=self.config.seed, epoch=epoch)
        remaining = [
            global_batch(order, step, self.steps_per_epoch)
            for step in range(first, self.steps_per_epoch)
        ]
        ids = [rank_part(batch, self.place.rank, self.place.world_size) for batch in remaining]
        pin = self.place.device.type == "cuda"
        self.meter.start()
        with contextlib.closing(self.train.batches(ids, pin=pin)) as batches:
            for global_ids, batch in zip(remaining, batches, strict=True):
                self.meter.data_arrived()
                self.train_step(batch, epoch, len(global_ids))
                self.step += 1
                self.report_progress(epoch)
        self.finish_epoch(epoch)

    def report_progress(self, epoch: int) -> None:
        """After a step: the log line and the checkpoint that are due, if any."""
        every = self.config.checkpoint_steps or self.total_steps
        end = self.step % self.steps_per_epoch == 0  # finish_epoch saves there
        due = not end and self.step % every == 0
        if due or end or self.step % self.config.log_steps == 0:
            self.log_progress(epoch)
        if due:
            self.save()

    def train_step(self, batch: Batch, epoch: int, global_batch_size: int) -> None:
        """One SGD step on the mean loss of the global batch, of which `batch` is this rank's part.

        DDP averages gradients over ranks, so each rank's sum is scaled by W / global size: exact
        also where W does not divide the batch.
        """
        config, device, world_size = self.config, self.place.device, self.place.world_size
        # Dropout is seeded by position: a resumed run draws the masks the uninterrupted one drew.
        torch.manual_seed(_seed(config.seed, self.step, self.place.rank))
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        x = train_view(
            images,
            self.spec,
            self.augment,
            seed=config.seed,
            epoch=epoch,
            sample_ids=batch.sample_ids,  # on the CPU: the draws are the same for every device
        ).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = self.replica(x)
        loss_sum = nn.functional.cross_entropy(
            logits.float(), labels, reduction="sum", label_smoothing=config.optim.label_smoothing
        )
        optim.set_lr(self.optimizer, learning_rate(config, self.step, self.steps_per_epoch))
        self.optimizer.zero_grad(set_to_none=True)
        (loss_sum * (world_size / global_batch_size)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.meter.add(loss_sum.detach(), logits.detach(), labels)

    def log_progress(self, epoch: int) -> None:
        """Logs the steps since the last call and stops a run that cannot become a model."""
        last_step = self.step - 1
        metrics = self.meter.read(self.place.world_size)
        metrics["lr"] = learning_rate(self.config, last_step, self.steps_per_epoch)
        metrics["epoch"] = epoch + (last_step % self.steps_per_epoch + 1) / self.steps_per_epoch
        seconds_per_step = metrics["seconds"] / metrics["steps"]
        metrics["eta_seconds"] = (self.total_steps - self.step) * seconds_per_step
        self._guard(metrics["loss"])
        if self.place.rank == 0:
            self.log(metrics, self.step)

    def finish_epoch(self, epoch: int) -> None:
        if self.place.world_size > 1:
            # Batch norm's running statistics differ by rank: measure those that are saved.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.model.eval()
        result = evaluate(
            self.model,
            self.val,
            self.spec,
            device=self.place.device,
            rank=self.place.rank,
            world_size=self.place.world_size,
        )
        self.model.train()
        self.metrics = {f"val_{name}": float(value) for name, value in asdict(result).items()}
        self.metrics["epoch"] = float(epoch + 1)
        if self.place.rank == 0:
            self.log(self.metrics, self.step)
        self.save()

    def save(self) -> None:
        """Reports the current state to the outside, with a checkpoint folder on rank 0."""
        if self.place.rank != 0:
            self.report(self.metrics, None)
            return
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": checkpoint.momentum(self.model, self.optimizer),
        }
        checkpoint.save(folder, tensors, self._state())
        self.report(self.metrics, folder)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "lowest_loss": self.lowest_loss,
            "metrics": self.metrics,
            "config": to_dict(self.config),
            "science": science_digest(self.config),
            "manifest": self.manifest.digest,
            "num_classes": self.manifest.num_classes,
            "input_spec": self.spec.to_json(),
            "run_id": self.run_id,
        }

    def _guard(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingStopped(
                f"loss is {loss} at step {self.step}; train again under another --name with a "
                f"lower --optim.lr (now {self.config.optim.lr}) or --precision fp32"
            )
        self.lowest_loss = min(self.lowest_loss, loss)
        guessing = math.log(self.manifest.num_classes)
        patience = self.config.flat_loss_steps
        if patience and self.step >= patience and self.lowest_loss > _FLAT_SHARE * guessing:
            raise TrainingStopped(
                f"loss never fell below {self.lowest_loss:.3f} in {self.step} steps, guessing "
                f"gives {guessing:.3f}; try --model.init he, another --optim.lr, or wait longer "
                f"with --flat-loss-steps {2 * patience}"
            )


def _seed(*position: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(position).encode()).digest()[:7])


def _augment(config: TrainConfig, stored_side: int) -> Augment:
    crop = config.augment.crop
    if crop == "auto":
        crop = "random" if stored_side > NETWORK_SIDE else "resized"
    return Augment(crop=crop, flip=config.augment.flip, colour_sigma=config.augment.colour_sigma)
