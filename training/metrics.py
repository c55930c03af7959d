"""What a training tells Prometheus, through Ray: the metrics port of rank 0's node has it as
ray_NAME, counters as ray_NAME_total.

Rank 0 sets the gauges at each log line, from the very figures of that line. They vanish about 20 s
after its process has ended, so that a finished run shows no rate.
"""

import functools
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from pipelines.metrics import label, never_fatal

_RUN = ("run",)


@never_fatal
def show(run: str, metrics: Mapping[str, float], step: int) -> None:
    """What a log line says at `step`; metrics that have no gauge are left out."""
    for name, gauge in _gauges().items():
        if name in metrics:
            gauge.set(float(metrics[name]), {"run": label(run)})
    _gauges()["step"].set(step, {"run": label(run)})


@never_fatal
def show_workers(run: str, workers: int) -> None:
    """The size of a worker group, at its start."""
    _gauges()["workers"].set(workers, {"run": label(run)})


@never_fatal
def count_restart(run: str) -> None:
    """A worker group that goes on with what another one began."""
    _restarts().inc(1, {"run": label(run)})


@functools.cache
def _gauges() -> dict[str, Gauge]:
    """By the names of the log line; made at the first use, since importing does nothing."""
    return {
        "images_per_second": Gauge(
            "alexnet_train_images_per_second", "Of all workers, since the line before.", _RUN
        ),
        "data_wait": Gauge(
            "alexnet_train_data_wait", "Share of the steps' time spent waiting for data.", _RUN
        ),
        "utilization": Gauge(
            "alexnet_train_utilization", "Share of the steps' time spent computing.", _RUN
        ),
        "loss": Gauge("alexnet_train_loss", "Of the train split, since the line before.", _RUN),
        "val_top1": Gauge(
            "alexnet_train_val_top1", "Accuracy on the val split, after the last epoch.", _RUN
        ),
        "epoch": Gauge("alexnet_train_epoch", "Epochs done, with their fraction.", _RUN),
        "step": Gauge("alexnet_train_step", "Steps done.", _RUN),
        "workers": Gauge("alexnet_train_workers", "Workers of the present group.", _RUN),
        "eta_seconds": Gauge(
            "alexnet_train_eta_seconds", "Seconds to the end, evaluations included.", _RUN
        ),
    }


@functools.cache
def _restarts() -> Counter:
    return Counter(
        "alexnet_train_restarts",
        "Worker groups that continued the run: after a loss, a new size, or as another job.",
        _RUN,
    )
