"""What Ray runs on each worker: a thin adapter from Ray Train's context to `loop.fit`."""

import logging
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from pipelines import storage
from training import checkpoint, loop
from training.config import TrainConfig
from training.meter import log_line
from training.tracking import Tracker

logger = logging.getLogger("training")


def train_worker(job: dict[str, Any]) -> dict[str, float]:
    """Trains this worker's share. `job` holds config (TrainConfig), data, tracking_uri, run_id,
    cpus: plain values, since Ray shows them in its dashboard."""
    config: TrainConfig = job["config"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    logging.basicConfig(format="%(message)s")  # warnings of the libraries
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it repeats every report at length
    torch.set_num_threads(job["cpus"])
    place = loop.Place(
        device=ray.train.torch.get_device(),
        rank=rank,
        world_size=context.get_world_size(),
        threads=job["cpus"],
    )
    tracker = Tracker(job["tracking_uri"], job["run_id"])

    def log(metrics: dict[str, float], step: int) -> None:
        logger.info(log_line(metrics, step))
        tracker.log(metrics, step)

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        saved = None if folder is None else ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(metrics, checkpoint=saved)

    with checkpoint.newest_good(storage.join(str(config.storage), str(config.name))) as resume:
        if resume is not None and rank == 0:
            step = checkpoint.load_state(resume)["step"]
            logger.info(f"continues at step {step} of run {config.name}")
        metrics = loop.fit(
            config,
            job["data"],
            place,
            log=log,
            report=report,
            resume=resume,
            run_id=job["run_id"],
        )
    if rank == 0:
        tracker.log({}, 0)  # sends what is still on disk, where MLflow answers again
    return metrics
