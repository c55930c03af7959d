"""The training itself: epochs, checkpoints, evaluation. Free of Ray and MLflow.

Rank, world size and device come in as arguments and everything that happens goes out through
functions, so benchmarks, tests and machines without Ray run the very same code as the cluster.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet import DROPOUT, NETWORK_SIDE
from alexnet.preprocess import Augment, draw_views, train_view
from pipelines.shards import Manifest
from training import checkpoint, guards
from training.config import TrainConfig, science_digest, to_dict
from training.decoded import open_decoded
from training.evaluate import Stopped, evaluate
from training.guards import TrainingStopped as TrainingStopped
from training.loader import Loader, Synthetic
from training.meter import Meter, measured_peak, traced, training_flops
from training.network import build_model, input_spec
from training.order import Ids, epoch_order, global_batch, padded, rank_part, steps_per_epoch
from training.steps import IGNORED, Stepper, algorithms, ended_early, input_of, learning_rates
from training.steps import Place as Place
from training.transfer import Sent, sent

logger = logging.getLogger("training")

Log = Callable[[dict[str, float], int], None]
Report = Callable[[dict[str, float], Callable[[], Path] | None], None]


def fit(
    config: TrainConfig,
    data: str,
    manifest: Manifest,
    place: Place,
    *,
    log: Log,
    report: Report,
    resume: Path | None = None,
    initial: Mapping[str, Tensor] | None = None,
    run_id: str = "",
    preempted: Callable[[], bool] | None = None,
    stopping: Callable[[], bool] | None = None,
    profile_to: Path | None = None,
) -> dict[str, float]:
    """Trains to the last epoch and returns the last metrics of the val split.

    data: URI of a finished shard set, whose manifest is `manifest`. resume: a checkpoint folder to
    go on from, at its next step. initial: weights to begin with; see training/initial.py.
    `log(metrics, step)` is called on rank 0; `report(metrics, write)` on every rank, at the same
    steps. On rank 0 `write` makes a checkpoint folder of that step, in any thread and at any time,
    which the receiver deletes; on the others it is None.
    On every rank, `preempted()` is asked about every ten seconds, of which one yes makes all save
    at once and go on, and `stopping()` about once a second, also during an evaluation, of which one
    yes makes all save and return, wherever the run stands.
    profile_to: folder for the trace of a few steps. Raises TrainingStopped for a loss, gradient or
    weights that are not finite and for a loss that stays flat.
    """
    with (
        algorithms(config, place.device),
        _loader(config, data, manifest, "train", place) as train,
        _loader(config, data, manifest, "val", place) as val,
        traced(profile_to) as step_done,
    ):
        run = _Run(config, manifest, place, train, val, log, report, preempted, stopping, run_id)
        if resume is not None:
            run.restore(resume)
        elif initial is not None:
            run.stepper.begin_with(initial)
        while not run.finished and not run.stopped:
            run.epoch(step_done)
        return run.position.metrics


def _loader(config: TrainConfig, data: str, manifest: Manifest, split: str, place: Place) -> Loader:
    if config.synthetic:
        return Synthetic(manifest, split, place.device)
    decoded = None
    if config.cache == "decoded":
        decoded = open_decoded(manifest, split, config.decoded_gb)
    return Loader(
        data,
        manifest,
        split,
        threads=place.threads,
        cache_gb=config.cache_gb,
        decoded=decoded,
        window=config.shuffle_window,
    )


@dataclass
class _Run:
    """A run in progress: its position, what is learned, where the batches come from."""

    config: TrainConfig
    manifest: Manifest
    place: Place
    train: Loader
    val: Loader
    log: Log
    report: Report
    preempted: Callable[[], bool] | None
    stopping: Callable[[], bool] | None
    run_id: str

    def __post_init__(self) -> None:
        config, manifest, place = self.config, self.manifest, self.place
        self.spec = input_spec(manifest, config)
        self.stepper = Stepper(config, build_model(config, manifest.num_classes), place)
        self.input_of = input_of(config, place.device)
        self.steps_per_epoch = steps_per_epoch(self.train.num_samples, config.optim.batch_size)
        self.total_steps = config.optim.epochs * self.steps_per_epoch
        self.part_size = _part_size(config, self.train.num_samples, place)
        self.position = checkpoint.Position()
        self.meter = Meter(place.device)
        self.seconds_at_peak = _seconds_at_peak(config, manifest.num_classes, place)
        self.evaluation_seconds = 0.0  # of the last one
        self.loader_seconds: Mapping[str, float] = {}  # spent until the last log line
        self.has_warned = False
        self.requests = guards.Requests(
            config.checkpoint_minutes, place, stopping=self.stopping, preempted=self.preempted
        )
        self.stopped, self.is_due = False, False  # is_due: a checkpoint

    @property
    def finished(self) -> bool:
        return self.position.step >= self.total_steps or (
            self.position.step % self.steps_per_epoch == 0
            and ended_early(self.config, self.position.val_errors)
        )

    def restore(self, folder: Path) -> None:
        """Goes on from a checkpoint. Raises UserError for one of other data or settings."""
        state = checkpoint.load_state(folder)
        checkpoint.refuse_other(state, folder.name, self.config, self.manifest.digest)
        self.position = checkpoint.Position.from_json(state)
        self.stepper.restore(folder, self.position.step)
        epoch, inside = divmod(self.position.step, self.steps_per_epoch)
        if not inside and self.position.evaluated_step != self.position.step:
            self.finish_epoch(epoch - 1)  # which was stopped before it was evaluated

    def epoch(self, step_done: Callable[[], None]) -> None:
        """From the current step to the end of its epoch, then evaluation and a checkpoint."""
        epoch, first = divmod(self.position.step, self.steps_per_epoch)
        remaining = self._batches(epoch, first)
        ids = self._parts(remaining)
        draw = functools.partial(self.draw, epoch)
        self.meter.start()
        with contextlib.closing(sent(self.train, ids, self.place.device, draw)) as batches:
            for whole, part, arriving in zip(remaining, ids, batches, strict=True):
                self.meter.data_arrived()
                # The digest below is of what was learned from, not of what was meant to be.
                found = arriving.batch.sample_ids.numpy()
                assert np.array_equal(found, part), "a batch of other samples"
                self.train_step(arriving, epoch, whole)
                step_done()
                self.report_progress(epoch)
                if self.stopped:
                    return
        self.finish_epoch(epoch)

    def draw(self, epoch: int, sample_ids: Tensor) -> Tensor:
        augment = _augment(self.config, self.manifest.crop, epoch)
        seed = self.config.seed
        return draw_views(self.spec, augment, seed=seed, epoch=epoch, sample_ids=sample_ids)

    def train_step(self, arriving: Sent, epoch: int, global_ids: Ids) -> None:
        config, step = self.config, self.position.step
        images, labels, drawn = arriving.received()
        self.meter.data_copied()
        own = len(self._part(global_ids))
        if own < len(labels):
            labels[own:].fill_(IGNORED)
        augment = _augment(config, self.manifest.crop, epoch)
        x = train_view(images, drawn, self.spec, augment, self.input_of)
        rates = learning_rates(config, step, self.steps_per_epoch, self.position.val_errors)
        size = len(global_ids)
        self.meter.add(self.stepper.step(x, labels, number=step, rates=rates, global_size=size))
        self.position.learned_from(global_ids)

    def report_progress(self, epoch: int) -> None:
        """After a step: the log line and the checkpoint that are due, if any."""
        step = self.position.step
        every = self.config.checkpoint_steps or self.total_steps
        end = step % self.steps_per_epoch == 0  # evaluated before it is saved
        self.stopped, asked = self.requests.made(step)
        self.is_due |= asked or step % every == 0
        now = self.stopped or (self.is_due and not end)
        if now or end or step % self.config.log_steps == 0:
            self.log_progress(epoch)
        if now:
            self.save()
            self.meter.start()

    def log_progress(self, epoch: int) -> None:
        """Logs the steps since the last call and stops a run that cannot become a model."""
        position = self.position
        reading = self.meter.read(self.place.world_size)
        position.lowest_loss = guards.check_losses(
            reading,
            position.lowest_loss,
            step=position.step,
            config=self.config,
            num_classes=self.manifest.num_classes,
            ids_of=self._ids_of,
        )
        self._warn_if_starved(reading.metrics)
        if self.place.rank == 0:
            self.log(self._line(reading.metrics, epoch), position.step)
        self.meter.start()

    def finish_epoch(self, epoch: int) -> None:
        """Evaluates, and saves what is the end, among the best so far, or due."""
        position, began = self.position, time.monotonic()
        if not self.finished:
            self.train.prefetch(self._parts(self._batches(epoch + 1)))  # while val is read
        try:
            with self.stepper.evaluating() as model:
                result = evaluate(
                    model,
                    self.val,
                    self.spec,
                    device=self.place.device,
                    rank=self.place.rank,
                    world_size=self.place.world_size,
                    stopping=self.stopping,
                )
        except Stopped:  # on all ranks alike; whoever goes on from here evaluates first
            self.stopped = True
            self.save()
            return
        self.evaluation_seconds = time.monotonic() - began
        position.metrics = {f"val_{name}": float(value) for name, value in asdict(result).items()}
        position.metrics["epoch"] = float(epoch + 1)
        position.evaluated_step = position.step
        position.val_errors = [*position.val_errors, 1 - result.top1]
        if self.place.rank == 0:
            self.log(position.metrics, position.step)
        best = sorted(position.val_errors)[: self.config.keep_best]
        if self.is_due or self.finished or position.val_errors[-1] in best or self.requests.late():
            self.save()

    def save(self) -> None:
        """Reports the current state to the outside, with what writes a checkpoint on rank 0."""
        guards.check_weights(self.stepper.model, self.position.step, self.config)
        write = None
        if self.place.rank == 0:
            write = checkpoint.held(self.stepper.tensors(), self._state())
        self.report(self.position.metrics, write)
        self.requests.saved()
        self.is_due = False

    def _line(self, metrics: dict[str, float], epoch: int) -> dict[str, float]:
        """`metrics` of the steps since the last line, with where the run stands."""
        position, epochs = self.position, self.config.optim.epochs
        in_epoch = position.step - epoch * self.steps_per_epoch
        rates = learning_rates(
            self.config, position.step - 1, self.steps_per_epoch, position.val_errors
        )
        left = (self.total_steps - position.step) * metrics["seconds"] / metrics["steps"]
        line = metrics | {
            "lr": rates.weights,
            "epoch": epoch + in_epoch / self.steps_per_epoch,
            "progress": position.step / self.total_steps,
            "sample_digest": position.sample_digest,
            "eta_seconds": left + (epochs - epoch) * self.evaluation_seconds,
        }
        if self.seconds_at_peak is not None:
            line["mfu"] = metrics["step_images_per_second"] * self.seconds_at_peak
        return line

    def _warn_if_starved(self, metrics: Mapping[str, float]) -> None:
        """Once in a run."""
        before, self.loader_seconds = self.loader_seconds, self.train.timings()
        spent = {name: value - before.get(name, 0.0) for name, value in self.loader_seconds.items()}
        complaint = guards.starved(metrics, spent)
        if complaint and not self.has_warned and self.place.rank == 0:
            logger.warning(complaint)
            self.has_warned = True

    def _batches(self, epoch: int, first: int = 0) -> list[Ids]:
        """The global batches of an epoch, from number `first` on."""
        seed, window = self.config.seed, self.config.shuffle_window
        order = epoch_order(self.train.shard_sizes, seed=seed, epoch=epoch, window=window)
        count = self.steps_per_epoch
        return [global_batch(order, number, count) for number in range(first, count)]

    def _ids_of(self, step: int) -> Ids:
        """What step number `step`, from 1, has learned from."""
        epoch, number = divmod(step - 1, self.steps_per_epoch)
        return self._batches(epoch, number)[0]

    def _part(self, batch: Ids) -> Ids:
        return rank_part(batch, self.place.rank, self.place.world_size)

    def _parts(self, batches: list[Ids]) -> list[Ids]:
        parts = [self._part(batch) for batch in batches]
        size = self.part_size
        return parts if size is None else [padded(part, size) for part in parts]

    def _state(self) -> dict[str, Any]:
        return vars(self.position) | {
            "total_steps": self.total_steps,
            "config": to_dict(self.config),
            "science": science_digest(self.config),
            "manifest": self.manifest.digest,
            "num_classes": self.manifest.num_classes,
            "dropout": DROPOUT.get(self.config.model.variant),
            "wnids": list(self.manifest.wnids),
            "class_names": list(self.manifest.class_names),
            "input_spec": self.spec.to_json(),
            "run_id": self.run_id,
        }


def _part_size(config: TrainConfig, num_samples: int, place: Place) -> int | None:
    """What every rank's part of every batch is filled up to, so that a GPU's kernels are chosen and
    compiled for one size. None on CPUs, which gain nothing, and where what fills a batch up would
    count: in the statistics of batch norm."""
    if place.device.type != "cuda" or config.model.batch_norm:
        return None
    largest = -(-num_samples // steps_per_epoch(num_samples, config.optim.batch_size))
    return -(-largest // place.world_size)


def _augment(config: TrainConfig, stored_side: int, epoch: int) -> Augment:
    crop, noisy = config.augment.crop, config.augment.colour_epochs
    if crop == "auto":
        crop = "random" if stored_side > NETWORK_SIDE else "resized"
    sigma = config.augment.colour_sigma if noisy is None or epoch < noisy else 0.0
    return Augment(crop=crop, flip=config.augment.flip, colour_sigma=sigma)


def _seconds_at_peak(config: TrainConfig, num_classes: int, place: Place) -> float | None:
    """Seconds in which all devices at their measured peak would learn from one image; None on CPUs,
    whose peak is of whatever else computes on them."""
    with torch.device("meta"):
        flops = training_flops(build_model(config, num_classes))
    line, peak = f"{flops / 1e9:.2f} GFLOP per image", None
    if place.device.type == "cuda":
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        peak = measured_peak(place.device, dtype)
        line += (
            f"; a {config.precision} matrix product does {peak / 1e12:.3g} TFLOP/s here, to which "
            "mfu is relative"
        )
    if place.rank == 0:
        logger.info(line)
    return None if peak is None else flops / (peak * place.world_size)
