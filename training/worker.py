"""What Ray runs of ours: on each worker a thin adapter from Ray Train's context to `loop.fit`, and
in its controller the judgement which failures are final.

Rank 0 gives the figures of each log line to Prometheus too, through Ray: the metrics port of its
node has them as ray_alexnet_train_NAME, restarts as a counter. They vanish about 20 s after its
process has ended, so that a finished run shows no rate.
"""

import contextlib
import functools
import hashlib
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.experimental import internal_kv
from ray.util.metrics import Counter, Gauge

from alexnet.errors import UserError, reason
from pipelines import storage
from pipelines.progress import label, never_fatal
from training import checkpoint, initial, lease, loop, meter
from training.meter import log_line
from training.metrics import Tracker, system_metrics
from training.preflight import Job, check_node
from training.tracking import STORED
from training.uploads import Uploader

logger = logging.getLogger("training")


def train_worker(settings: dict[str, Job]) -> dict[str, float]:
    """Trains this worker's share of settings["job"].

    Goes on from the newest whole checkpoint of the run, whoever wrote it: a worker group before
    this one that lost a node, another number of workers, or an earlier job.
    """
    job = settings["job"]
    config, context, device = job.config, ray.train.get_context(), ray.train.torch.get_device()
    rank = context.get_world_rank()
    _say(rank)
    # On GPUs torch computes next to nothing here, and its threads would wait for the decoders'; two
    # CPUs are left to this thread, the draws and the libraries.
    on_gpu = device.type == "cuda"
    torch.set_num_threads(1 if on_gpu else job.cpus)
    decoders = max(1, job.cpus - 2) if on_gpu else job.cpus
    refuse_changed(job)
    check_node(job)
    tracker = Tracker(job.tracking_uri, str(job.run_id))
    with contextlib.ExitStack() as stack:
        resume = stack.enter_context(checkpoint.newest_good(job.folder))
        step = _agreed(0 if resume is None else checkpoint.load_state(resume)["step"])
        if config.system_metrics and context.get_local_rank() == 0:
            stack.enter_context(system_metrics(job.tracking_uri, str(job.run_id)))
        uploads, profile, begins_with = None, None, None
        if resume is None and config.init_from is not None:
            begins_with = initial.read_kept(job.folder)
        if rank == 0:
            stack.callback(tracker.wait)  # however this ends
            _tell_start(str(config.name), tracker, step)
            tracker.tag("hardware", meter.device_name(device))
            uploads = stack.enter_context(_uploader(job, tracker))
            if resume is not None:
                uploads.tidy(resume.name)
            if config.profile:
                profile = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="profile-")))
        stopping = stack.enter_context(_stopping(job.lease[1]))
        last = loop.fit(
            config,
            job.data,
            job.manifest,
            loop.Place(device, rank, context.get_world_size(), decoders),
            log=_logging(str(config.name), tracker),
            report=_reporting(uploads),
            resume=resume,
            initial=begins_with,
            run_id=str(job.run_id),
            preempted=_preemption(),
            stopping=stopping,
            profile_to=profile,
        )
        if profile is not None:
            tracker.attach(profile, "profile")
    if rank == 0:
        tracker.finish(patience=0 if stopping() else 60)
    return last


def refuse_changed(job: Job) -> None:
    """A worker of a later attempt must not train on other shards than those before it."""
    found = hashlib.sha256(storage.read(storage.join(job.data, "manifest.json"))).hexdigest()
    if found != job.manifest.digest:
        raise UserError(
            f"{job.data} changed under the run: its manifest is {found[:16]}, was "
            f"{job.manifest.digest[:16]}; put the old shards back, or train the new ones under "
            "another --name"
        )


class FinalErrors(ray.train.UserCallback):  # type: ignore[misc]
    """In Ray's controller: ends the training at once for what every retry would meet again. Ray
    itself would take a loss that is not finite for a lost worker, and start the group anew."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises ray.train.ControllerError, which Ray does not retry; of another failure, one line
        says which workers are lost."""
        for error in worker_exceptions.values():
            if (cause := said(error)) is not None:
                raise ray.train.ControllerError(cause)
        _say(0)
        lost = {
            rank: reason(getattr(error, "_base_exc", error))
            for rank, error in sorted(worker_exceptions.items())
        }
        logger.warning(f"lost worker {', '.join(map(str, lost))}: {next(iter(lost.values()), '?')}")


def said(error: BaseException) -> UserError | loop.TrainingStopped | lease.Superseded | None:
    """What our own code said in an error of Ray's, at whatever depth; None where it was not ours.

    Ray keeps the cause in controller_failure, in worker_failures (by rank) or in _base_exc.
    """
    if isinstance(error, UserError | loop.TrainingStopped | lease.Superseded):
        return error
    inner = [getattr(error, name, None) for name in ("controller_failure", "_base_exc")]
    inner += [error.__cause__, *getattr(error, "worker_failures", {}).values()]
    found = (said(cause) for cause in inner if cause is not None)
    return next((cause for cause in found if cause is not None), None)


def _say(rank: int) -> None:
    """Only rank 0 talks; the others warn. By the name before a line, the driver knows it as ours
    (pipelines/cluster.py)."""
    logging.basicConfig(format="%(name)s: %(message)s", force=True)  # Ray has set another
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)


def _agreed(step: int) -> int:
    """`step`, when all ranks found the same checkpoint. Raises RuntimeError otherwise, so that Ray
    starts the group anew: an upload of the group before may have ended between two looks."""
    first = int(ray.train.collective.broadcast_from_rank_zero(step))
    if step != first:
        raise RuntimeError(f"this worker found a checkpoint of step {step}, rank 0 of {first}")
    return step


def _tell_start(run: str, tracker: Tracker, step: int) -> None:
    """One line when this is not the beginning of the run: what was lost and how long it took."""
    workers = ray.train.get_context().get_world_size()
    last = tracker.last_logged()
    tracker.log({"workers": workers}, step)
    show(run, {"workers": workers})
    if step == 0 and last is None:
        return
    count_restart(run)
    lost = ""
    if last is not None:
        last_step, seconds = last
        lost = f", lost {max(0, last_step - step)} steps and {seconds:.0f} s"
    group = f"{workers} worker{'s' if workers > 1 else ''}"
    logger.info(f"worker group restarted with {group}; continues at step {step}{lost}")


def _logging(run: str, tracker: Tracker) -> loop.Log:
    def log(line: dict[str, float], step: int) -> None:
        logger.info(log_line(line, step))
        show(run, {**line, "step": step})
        tracker.log(line, step)

    return log


def _uploader(job: Job, tracker: Tracker) -> Uploader:
    """MLflow is told of each checkpoint that is stored: should they all vanish, the run must not
    begin again under what it has logged."""
    return Uploader(
        job.folder,
        keep_last=job.config.keep_last,
        keep_best=job.config.keep_best,
        check=functools.partial(lease.refuse_superseded, job.folder, *job.lease),
        stored=lambda step: tracker.tag(STORED, str(step)),
    )


def _reporting(uploads: Uploader | None) -> loop.Report:
    """Checkpoints go through our own uploads. Ray is told of each once it is stored, so that its
    Result has it, without a copy; it deletes none, since it has no number to keep."""
    runs = ray.train.get_context().get_storage()

    def report(metrics: dict[str, float], write: Callable[[], Path] | None) -> None:
        run, stored = None, None
        if write is not None:
            assert uploads is not None, "only rank 0 is handed checkpoints"
            run = ray.train.Checkpoint(runs.experiment_fs_path, runs.storage_filesystem)
            stored = uploads.send(write)

        def place(run: ray.train.Checkpoint, _: str) -> ray.train.Checkpoint:
            assert stored is not None
            return ray.train.Checkpoint(f"{run.path}/{stored.result()}", run.filesystem)

        ray.train.report(  # in the background: it waits until Ray's controller looks
            dict(metrics),
            run,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=place,
            delete_local_checkpoint_after_upload=False,
        )

    return report


def _preemption() -> Callable[[], bool]:
    """True once for each node whose end is announced, at the same call on every rank: it asks Ray,
    which waits for all of them."""
    announced: set[str] = set()

    def preempted() -> bool:
        info = ray.train.get_preemption_info()
        nodes = set() if info is None else {*info.preempted_node_ids} - announced
        announced.update(nodes)
        if nodes:
            logger.info(f"{len(nodes)} node(s) of this training will be taken away: saving now")
        return bool(nodes)

    return preempted


# Ctrl-C, through a table that Ray's head keeps

_STOP = b"stop"


def has_begun(token: str) -> bool:
    """Whether workers of the driver that holds the lease of this token have begun to train; False
    too where the cluster's head does not answer."""
    with contextlib.suppress(ray.exceptions.RayError):
        return internal_kv._internal_kv_get(_stop_key(token)) is not None
    return False


def ask_to_stop(token: str) -> bool:
    """Of the driver that holds the lease of this token: its workers save and end. False where none
    has begun to train, or the cluster's head does not answer."""
    if not has_begun(token):
        return False
    try:
        internal_kv._internal_kv_put(_stop_key(token), _STOP)
    except ray.exceptions.RayError:
        return False
    return True


@contextlib.contextmanager
def _stopping(token: str) -> Iterator[Callable[[], bool]]:
    """Lets the driver know that a training can be stopped from here on, and gives whether it asked
    for that: the table is read once a second, in a thread, so that no step waits for it."""
    internal_kv._internal_kv_put(_stop_key(token), b"training", overwrite=False)
    asked, done = threading.Event(), threading.Event()

    def look() -> None:
        while not (asked.is_set() or done.wait(1)):
            with contextlib.suppress(ray.exceptions.RayError):  # the head is away: nobody can ask
                if internal_kv._internal_kv_get(_stop_key(token)) == _STOP:
                    asked.set()

    threading.Thread(target=look, name="stop", daemon=True).start()
    try:
        yield asked.is_set
    finally:
        done.set()


def _stop_key(token: str) -> str:
    return f"alexnet-stop-{token}"


# Figures for Prometheus, by the names of the log line

GAUGES = {
    "images_per_second": "Of all workers, since the line before.",
    "data_wait": "Share of the steps' time spent waiting for data.",
    "utilization": "Share of the time spent computing.",
    "loss": "Of the train split, since the line before.",
    "val_top1": "Accuracy on the val split, after the last epoch.",
    "epoch": "Epochs done, with their fraction.",
    "step": "Steps done.",
    "workers": "Workers of the present group.",
    "eta_seconds": "Seconds to the end, evaluations included.",
}


@never_fatal
def show(run: str, figures: Mapping[str, float]) -> None:
    """Those that have a gauge; the others are left out."""
    for name in figures.keys() & GAUGES.keys():
        _gauge(name).set(float(figures[name]), {"run": label(run)})


@never_fatal
def count_restart(run: str) -> None:
    """A worker group that goes on with what another one began."""
    _restarts().inc(1, {"run": label(run)})


@functools.cache
def _gauge(name: str) -> Gauge:
    """Made at the first use, since importing does nothing."""
    return Gauge(f"alexnet_train_{name}", GAUGES[name], ("run",))


@functools.cache
def _restarts() -> Counter:
    return Counter(
        "alexnet_train_restarts",
        "Worker groups that continued the run: after a loss, a new size, or as another job.",
        ("run",),
    )
