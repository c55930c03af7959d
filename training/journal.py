"""What a log line says beside the meter's readings: where the run stands, how near to the peak."""

import logging
from collections.abc import Mapping

import torch

from training import guards, state
from training.config import TrainConfig
from training.meter import measured_peak
from training.steps import Place, learning_rate

logger = logging.getLogger("training")


class Journal:
    """State: how long the last evaluation took, what the loader had spent at the last line, and
    whether it has complained."""

    def __init__(
        self, config: TrainConfig, place: Place, flops: float, steps_per_epoch: int
    ) -> None:
        """flops: operations that training needs per picture."""
        self.evaluation_seconds = 0.0
        self._config, self._place, self._steps_per_epoch = config, place, steps_per_epoch
        self._share_of_peak: float | None = None  # of an image a second
        self._spent: Mapping[str, float] = {}
        self._warned = False
        if place.device.type != "cuda":  # a CPU's peak is of whoever else computes on it as well
            return
        bfloat16 = config.precision == "bf16"
        peak = measured_peak(place.device, torch.bfloat16 if bfloat16 else torch.float32)
        self._share_of_peak = flops / (peak * place.world_size)
        if place.rank == 0:
            logger.info(
                f"{flops / 1e9:.2f} GFLOP per image; a {config.precision} matrix product does "
                f"{peak / 1e12:.3g} TFLOP/s here, to which mfu is relative"
            )

    def line(
        self,
        metrics: dict[str, float],
        position: state.Position,
        epoch: int,
        loader: Mapping[str, float],
    ) -> dict[str, float]:
        """`metrics` of the steps since the last line with what belongs to it. loader: seconds that
        reading has cost so far."""
        self._warn(metrics, loader)
        in_epoch = position.step - epoch * self._steps_per_epoch
        total_steps = self._config.optim.epochs * self._steps_per_epoch
        left = (total_steps - position.step) * metrics["seconds"] / metrics["steps"]
        evaluations = self._config.optim.epochs - epoch
        if self._share_of_peak is not None:
            metrics = metrics | {"mfu": metrics["images_per_second"] * self._share_of_peak}
        return metrics | {
            "lr": learning_rate(
                self._config, position.step - 1, self._steps_per_epoch, position.val_errors
            ),
            "epoch": epoch + in_epoch / self._steps_per_epoch,
            "progress": position.step / total_steps,
            "sample_digest": state.as_number(position.samples),
            "eta_seconds": left + evaluations * self.evaluation_seconds,
        }

    def _warn(self, metrics: Mapping[str, float], loader: Mapping[str, float]) -> None:
        """Once in a run, where the accelerator starves."""
        spent = {name: loader[name] - self._spent.get(name, 0.0) for name in loader}
        self._spent = dict(loader)
        complaint = guards.starved(metrics, spent)
        if complaint and not self._warned and self._place.rank == 0:
            logger.warning(complaint)
            self._warned = True
