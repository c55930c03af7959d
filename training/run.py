"""Trains AlexNet on a shard set and registers the result; `--help` lists every field.

Runs as a script from any folder and as a Ray job:

    python training/run.py [RECIPE] [flags]
    ray job submit --working-dir . -- python training/run.py [RECIPE] [flags]

Holds nothing that a worker needs: here it is `__main__`, which workers cannot import.
"""

import dataclasses
import json
import logging
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script's own folder comes first on its path: with the checkout in its place, the packages
    # are found from any folder, and no file beside this one can shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from training import interrupt

    interrupt.end_at_once()

import ray
import ray.train
from ray.train.torch import TorchTrainer

from alexnet.errors import UserError
from pipelines import cluster, shards, storage
from training import checkpoint, interrupt, tracking
from training.command_line import parse
from training.config import TrainConfig, to_dict
from training.dry_run import check_disks, dry_run, estimate, resolve
from training.registry.package import register
from training.worker import FinalErrors, said, train_worker

logger = logging.getLogger("training")

# As torch says it of the host and of a GPU, oneDNN, Python and Ray's own watch.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "could not create a primitive",
    "can't start new thread",
    "MemoryError",
    "OutOfMemoryError",
)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 trained, 1 training failed, 2 wrong usage or input, 130 interrupted."""
    logging.basicConfig(format="%(message)s")  # warnings of the libraries
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry to a server that is down
    logger.setLevel(logging.INFO)
    try:
        with interrupt.raised():
            command = parse(sys.argv[1:] if argv is None else argv)
            if command.action == "print":
                _show(json.dumps(to_dict(command.config), indent=1))
                return 0
            if command.action == "dry-run":
                _show(dry_run(command.config, _on_cluster if cluster.is_known() else None))
                return 0
            return train(command.config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the training began", file=sys.stderr)
        return interrupt.INTERRUPTED


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def train(config: TrainConfig) -> int:
    """From a checked config to a registered version."""
    config, manifest = resolve(config)
    check_disks(config, manifest)
    uri = tracking.tracking_uri()
    client = tracking.connect(uri)
    found = tracking.find_run(client, config, manifest)
    if found and found.info.status == "FINISHED":
        logger.info(f"run {config.name} is finished; train again under another --name")
        return 0
    try:
        # Left before anything is told, so that the last line is ours, after all that workers say.
        with cluster.connected(dashboard=True):
            version = _trained(config, manifest, client, uri)
    except ray.train.TrainingFailedError as error:
        logger.error(f"error: {_cause(error, config)}")
        return 1
    except tracking.FAILURES as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        logger.error(
            f"error: the run could not be recorded ({reason}); its checkpoints are safe: once that "
            f"is mended, continue with: {_again(config)}"
        )
        return 1
    except interrupt.KINDS:
        logger.error(f"interrupted; continue with: {_again(config)}")
        return interrupt.INTERRUPTED
    if version is not None:
        logger.info(f"registered alexnet version {version} as candidate; promote it with:")
        logger.info("  python -m training.registry promote")
    return 0


def _trained(config: TrainConfig, manifest: shards.Manifest, client: Any, uri: str) -> str | None:
    """Trains on the cluster that was joined; the number of the version it registers, if any."""
    scaling, cpus = _checked(config, uri)
    data = str(config.data)
    run_id = tracking.open_run(client, config, manifest, data).info.run_id
    job = {"config": config, "data": data, "manifest": manifest.digest, "cpus": cpus}
    job |= {"checkpoint": estimate(config, manifest).checkpoint}
    job |= {"tracking_uri": uri, "run_id": run_id, "terminal": sys.stderr.isatty()}
    _announce(config, manifest, cpus, scaling.use_gpu)
    # Ray Train's own print would put an empty line after each state of the progress bar.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    with interrupt.raised(), tracking.run_status(client, run_id):
        _fit(_trainer(config, scaling, job))
        return _register(client, run_id, manifest, config)


def _on_cluster(config: TrainConfig) -> str:
    """What the cluster would give to this training, for the dry run. Raises UserError where it
    could not start there."""
    with cluster.connected():
        scaling, cpus = _checked(config, tracking.tracking_uri())
        nodes = sum(node["Alive"] for node in ray.nodes())
    return f"a cluster of {nodes} nodes: {_workers(config, cpus, scaling.use_gpu)}"


def _checked(config: TrainConfig, uri: str) -> tuple[ray.train.ScalingConfig, int]:
    """`_scaling` where the joined cluster can run this training at all."""
    paths = [str(config.data), str(config.storage)]
    cluster.refuse_local_paths(paths, shared_fs=config.shared_fs)
    _refuse_embedded_mlflow(uri)
    return _scaling(config)


def _refuse_embedded_mlflow(uri: str) -> None:
    """Rank 0 may run on another node, where the store's file would be another, empty one."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    if uri.startswith("sqlite:") and nodes > 1:
        raise UserError(
            f"{uri} is a file of this node and the cluster has {nodes}; start `mlflow server` and "
            "set MLFLOW_TRACKING_URI to it"
        )


def _scaling(config: TrainConfig) -> tuple[ray.train.ScalingConfig, int]:
    """Ray's resources for the workers, and the CPUs of each. The cluster must have room for the
    fewest workers now; up to the most join when there is room for them."""
    fewest = config.min_workers or config.workers
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if config.device == "cuda" and gpus < fewest:
        raise UserError(
            f"{fewest} workers need a GPU each, the cluster has {gpus}; pass "
            f"--workers {max(gpus, 1)} or --device cpu"
        )
    use_gpu = config.device != "cpu" and gpus >= fewest
    kind = "GPU" if use_gpu else "CPU"
    useful = [node for node in nodes if node.get(kind, 0) >= 1]
    if not useful:
        raise UserError(
            f"{fewest} workers need a CPU each, no node of the cluster has one; start nodes with "
            "`ray start --address HOST:6379`"
        )
    per_node = min(-(-config.workers // len(useful)), max(int(node[kind]) for node in useful))
    share = int(min(node.get("CPU", 1) for node in useful)) // per_node
    cpus = config.cpus_per_worker or max(1, share)
    available = sum(int(node.get("CPU", 0)) // cpus for node in useful)
    if available < fewest:
        raise UserError(
            f"{fewest} workers of {cpus} CPUs do not fit: the cluster has room for "
            f"{available}; pass --workers {max(available, 1)}, or start more nodes"
        )
    if config.min_workers:
        # A node that just died still counts for a while, and a worker that waits for a place on it
        # keeps the others waiting; with a fixed number there is nothing to do but wait.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    scaling = ray.train.ScalingConfig(
        num_workers=(fewest, config.workers) if config.min_workers else config.workers,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
    )
    return scaling, cpus


def _trainer(
    config: TrainConfig, scaling: ray.train.ScalingConfig, job: dict[str, Any]
) -> TorchTrainer:
    return TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=str(storage.home() / "ray"),  # Ray's own notes; see training/uploads.py
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            callbacks=[FinalErrors()],
            worker_runtime_env={"env_vars": worker_settings(scaling.use_gpu)},
        ),
    )


def worker_settings(use_gpu: bool) -> dict[str, str]:
    """Environment of the workers, which their C library reads before any code runs there.

    On CPUs each step would give its memory back to the system and take it again, page by page
    (benchmarks/LOG.md). So malloc keeps what it has, in one heap for all threads; blocks from 1 GiB
    on, such as resident pictures, still come and go. What the driver's own environment says about
    these variables comes first. The bits of the results are the same.
    """
    keep = {"MALLOC_ARENA_MAX": 1, "MALLOC_MMAP_THRESHOLD_": 2**30}
    keep["MALLOC_TRIM_THRESHOLD_"] = 2**40
    return {} if use_gpu else {name: os.environ.get(name, str(keep[name])) for name in keep}


def _fit(trainer: TorchTrainer) -> None:
    """`trainer.fit()` in a thread of its own: in the main thread, Ray would answer Ctrl-C itself
    and end the process with exit code 0."""
    outcome: queue.Queue[BaseException | None] = queue.Queue()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread, which raises it
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    error = outcome.get()
    if error is not None:
        raise error


def _register(
    client: Any, run_id: str, manifest: shards.Manifest, config: TrainConfig
) -> str | None:
    """The new version's number; None where the flags want none or the pictures were none."""
    config = dataclasses.replace(config, register=config.register and not config.synthetic)
    with checkpoint.newest_good(storage.join(str(config.storage), str(config.name))) as last:
        if last is None:
            raise UserError(
                f"the checkpoints of run {config.name} are gone from {config.storage}; put them "
                "back, or the same command trains again from the beginning"
            )
        return register(client, run_id, last, manifest, config)


def _announce(config: TrainConfig, manifest: shards.Manifest, cpus: int, use_gpu: bool) -> None:
    totals = {split: manifest.num_samples(split) for split in ("train", "val")}
    logger.info(
        f"run {config.name}: recipe {config.recipe} ({config.model.variant} network, width "
        f"{config.model.width}), {totals['train']} train and {totals['val']} val samples of "
        f"{manifest.num_classes} classes from {config.data}"
    )
    workers = _workers(config, cpus, use_gpu)
    logger.info(f"{workers}; checkpoints in {config.storage}/{config.name}")


def _workers(config: TrainConfig, cpus: int, use_gpu: bool) -> str:
    count = f"{config.min_workers} to {config.workers}" if config.min_workers else config.workers
    return f"{count} worker(s) with {cpus} CPU(s){' and a GPU' if use_gpu else ''} each"


def _cause(error: ray.train.TrainingFailedError, config: TrainConfig) -> str:
    """What failed, in a worker's own words where it told; the traceback is in the log above."""
    if (cause := said(error)) is not None:
        return str(cause)
    last = str(error).strip().splitlines()[-1]
    if any(word in str(error) for word in _OUT_OF_MEMORY):
        return (
            f"a worker ran out of memory ({last[:200]}); give each more: fewer --workers on a node "
            f"or --cache none, or machines with more; continue with: {_again(config)}"
        )
    return f"{last}; the traceback is above; continue with: {_again(config)}"


def _again(config: TrainConfig) -> str:
    return f"python training/run.py {config.recipe} --name {config.name} (with the same flags)"


if __name__ == "__main__":
    sys.exit(main())
