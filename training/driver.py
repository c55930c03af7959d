"""The driver of a run: from a checked config to a registered version, or what a dry run says.

Takes seconds to import (Ray, torch, MLflow), which a wrong flag and --help need not wait for.
"""

import dataclasses
import logging
import os
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import ray
import ray.train
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.train.torch import TorchTrainer

from alexnet.errors import UserError
from pipelines import cluster, command, storage
from pipelines.progress import label
from training import checkpoint, initial, lease, preflight, stop, store, tracking
from training.command_line import again
from training.config import TrainConfig
from training.preflight import Job, placed, workers_of
from training.recipes import small_parts
from training.registry.package import register
from training.worker import FinalErrors, said, train_worker

logger = logging.getLogger("training")

_RAYS_NOTES = "checkpoint_manager_snapshot.json"

# As torch says it of the host and of a GPU, oneDNN, Python and Ray's own watch.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "could not create a primitive",
    "can't start new thread",
    "MemoryError",
    "OutOfMemoryError",
)


def train(config: TrainConfig) -> int:
    """Exit code: 0 trained, 1 training failed, 130 interrupted. Raises UserError for what can be
    known before it starts."""
    job, client = preflight.preflight(config, alone=not cluster.is_known())
    config = job.config
    if job.status == "FINISHED":
        logger.info(f"run {config.name} is finished; train again under another --name")
        return 0
    try:
        # Left before anything is reported, so that the last line is ours, after all that workers
        # say.
        with (
            lease.held(job.folder) as writer,
            cluster.connected(dashboard=True, ray_logs=config.ray_logs),
        ):
            ending = _trained(job, client, writer)
    except lease.Superseded as error:
        logger.error(f"error: {error}")
        return 1
    except ray.train.TrainingFailedError as error:
        logger.error(f"error: {_cause(error, config)}")
        return 1
    except tracking.FAILURES as error:
        logger.error(
            f"error: the run could not be recorded ({store.remedy(job.tracking_uri, error)}; its "
            f"checkpoints are safe: once that is mended, continue with: {again(config)}"
        )
        return 1
    except command.KINDS as left:
        why = f": {left}" if isinstance(left, stop.Stopped) else ""
        logger.error(f"interrupted{why}; continue with: {again(config)}")
        return command.INTERRUPTED
    for line in ending:
        logger.info(line)
    return 0


def dry_run(config: TrainConfig) -> str:
    """What a run would do, on the cluster where one is known. Starts nothing; raises UserError."""
    return preflight.dry_run(config, _on_cluster if cluster.is_known() else None)


def _trained(job: Job, client: Any, writer: lease.Lease) -> list[str]:
    """Trains on the cluster that was joined; lines that say what has come of it."""
    config, manifest = job.config, job.manifest
    cpus, use_gpu = _places(config, job.tracking_uri)
    if job.initial is not None:
        logger.info(job.initial.said)
        initial.keep(job.initial, job.folder)
    run_id = job.run_id or tracking.open_run(client, config, manifest, job.data).info.run_id
    job = dataclasses.replace(
        job, run_id=run_id, initial=None, cpus=cpus, lease=(writer.number, writer.token)
    )
    _announce(job, use_gpu)
    with command.raised(), tracking.run_status(client, run_id):
        stop.fit(_trainer(job, use_gpu).fit, writer)
        writer.check()
        with checkpoint.newest_good(job.folder) as last:
            if last is None:
                raise UserError(
                    f"the checkpoints of run {config.name} are gone from {config.storage}; put "
                    "them back, or train anew under another --name"
                )
            wanted = config.register and not config.synthetic  # random images: never
            final = dataclasses.replace(config, register=wanted)
            several = len(manifest.split_shards("val")) > 1  # of which Ray scores each by itself
            processes = cpus * config.workers if several else None
            version = register(client, run_id, last, manifest, final, workers=processes)
    return _ending(client, job, version)


def _ending(client: Any, job: Job, version: str | None) -> list[str]:
    """Where a finished run's curves and card are, what opens MLflow on it, and what comes next."""
    run = client.get_run(job.run_id).info
    artifacts = run.artifact_uri
    if artifacts.startswith("file://"):
        artifacts = unquote(artifacts.removeprefix("file://"))
    page = f"#/experiments/{run.experiment_id}/runs/{run.run_id}"
    server = f"python -m mlflow server --backend-store-uri {shlex.quote(job.tracking_uri)}"
    where = f"{server}, then http://127.0.0.1:5000/{page}"
    if store.database_of(job.tracking_uri) is None:
        where = f"{job.tracking_uri.rstrip('/')}/{page}"
    lines = [
        f"curves: {artifacts}/figures/curves.png",
        f"card:   {artifacts}/card/card.md",
        f"MLflow: {where}",
    ]
    if version is not None:
        name = job.config.model_name
        of = f" --model {name}" if name != TrainConfig.model_name else ""
        lines += [
            f"registered {name} version {version} as candidate; promote it with:",
            f"  python -m training.registry promote{of}",
        ]
    return lines


def _on_cluster(config: TrainConfig) -> tuple[str, bool]:
    """What the cluster would give to this run, for the dry run, and whether that has GPUs. Raises
    UserError where it could not start there."""
    with cluster.connected():
        cpus, use_gpu = _places(config, tracking.tracking_uri())
        nodes = sum(node["Alive"] for node in ray.nodes())
    return f"a cluster of {nodes} nodes: {_workers(config, cpus, use_gpu)}", use_gpu


def _places(config: TrainConfig, uri: str) -> tuple[int, bool]:
    """CPUs of each worker on the joined cluster, and whether it has a GPU. Raises UserError where
    the cluster cannot run this at all."""
    paths = [str(config.data), str(config.storage)]
    cluster.refuse_local_paths(paths, shared_fs=config.shared_fs)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Rank 0 may run on another node, where the store's file would be another, empty one.
    if uri.startswith("sqlite:") and len(nodes) > 1:
        raise UserError(
            f"{uri} is a file of this node and the cluster has {len(nodes)}; start `mlflow server` "
            "and set MLFLOW_TRACKING_URI to it"
        )
    return placed(config, nodes)


def _trainer(job: Job, use_gpu: bool) -> TorchTrainer:
    config, least = job.config, job.config.min_workers
    # Ray takes a report of the workers as often, and waits for them all at the end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if least:
        # A node that just died still counts for a while, and a worker that waits for a place on it
        # keeps the others waiting; with a fixed number there is nothing to do but wait.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    settings = worker_settings(use_gpu)
    if "TMPDIR" in os.environ and not cluster.is_known():
        # Checkpoints wait in the user's TMPDIR, also where a Ray of our own has a shorter one.
        settings["TMPDIR"] = os.environ["TMPDIR"]
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=(least, config.workers) if least else config.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": job.cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            **_rays_notes(job),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            callbacks=[FinalErrors()],
            worker_runtime_env={"env_vars": settings},
        ),
    )


def _rays_notes(job: Job) -> dict[str, Any]:
    """Where Ray keeps its notes of a run: in its folder, where Ray's Result then finds the
    checkpoints. Of a store they are on this node instead, by the same path, since Ray would end the
    training where the store does not answer; so are those of a name that no label can hold, which
    Ray makes of it for its metrics."""
    runs, _, folder = job.folder.rpartition("/")
    name, root = label(folder), Path("/")
    if storage.is_s3(job.folder) or name != folder:
        runs, root = runs.removeprefix("s3://").lstrip("/"), storage.home() / "ray"
        root.mkdir(parents=True, exist_ok=True)
    # Of an earlier job: Ray refuses to begin where a checkpoint of its notes was pruned.
    (root / runs / name / _RAYS_NOTES).unlink(missing_ok=True)
    files = LocalFileSystem()
    if root != Path("/"):
        files = SubTreeFileSystem(str(root), files)
    return {"name": name, "storage_path": runs, "storage_filesystem": files}


def worker_settings(use_gpu: bool) -> dict[str, str]:
    """Environment of the workers, which their C library reads before any code runs there.

    On CPUs each step would give its memory back to the system and take it again, page by page
    (benchmarks/LOG.md). So malloc keeps what it has, in one heap for all threads; blocks from 1 GiB
    on still come and go. What the driver's own environment says about
    these variables comes first. The bits of the results are the same.
    """
    keep = {"MALLOC_ARENA_MAX": 1, "MALLOC_MMAP_THRESHOLD_": 2**30}
    keep["MALLOC_TRIM_THRESHOLD_"] = 2**40
    return {} if use_gpu else {name: os.environ.get(name, str(keep[name])) for name in keep}


def _announce(job: Job, use_gpu: bool) -> None:
    config, manifest = job.config, job.manifest
    train, val = (manifest.num_samples(split) for split in ("train", "val"))
    logger.info(
        f"run {config.name}: recipe {config.recipe} ({config.model.variant} network, width "
        f"{config.model.width}), {train} train and {val} val samples of {manifest.num_classes} "
        f"classes from {job.data}"
    )
    logger.info(f"{_workers(config, job.cpus, use_gpu)}; checkpoints in {job.folder}")
    if use_gpu and (few := small_parts(config)):
        logger.info(few)


def _workers(config: TrainConfig, cpus: int, use_gpu: bool) -> str:
    has_gpu = " and a GPU" if use_gpu else ""
    return f"{workers_of(config)} worker(s) with {cpus} CPU(s){has_gpu} each"


def _cause(error: ray.train.TrainingFailedError, config: TrainConfig) -> str:
    """What failed, in a worker's own words where it has any; of a defect the traceback is printed
    before."""
    if (cause := said(error)) is not None:
        return str(cause)
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if any(word in str(error) for word in _OUT_OF_MEMORY):
        return (
            f"a worker ran out of memory ({last[:200]}); give each more: fewer --workers on a node "
            f"or machines with more; continue with: {again(config)}"
        )
    failures = getattr(error, "worker_failures", {})
    logger.error("\n".join(map(str, [*failures.values()][:1] or [error])))
    return f"{last}; the traceback is above; continue with: {again(config)}"
