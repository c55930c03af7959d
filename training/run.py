"""Trains AlexNet on a shard set and registers the result; `--help` lists every field.

Runs as a script from any folder and as a Ray job:

    python training/run.py [RECIPE] [flags]
    ray job submit --working-dir . -- python training/run.py [RECIPE] [flags]

Holds nothing that a worker needs: here it is `__main__`, which workers cannot import.
"""

import contextlib
import dataclasses
import inspect
import io
import logging
import queue
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script's own folder comes first on its path: with the checkout in its place, the packages
    # are found from any folder, and no file beside this one can shadow a library.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import ray
import ray.train
import torch
import tyro
from ray.train.torch import TorchTrainer

from alexnet.errors import UserError
from alexnet.preprocess import NETWORK_SIDE
from pipelines import cluster, shards, storage
from training import checkpoint, registry, tracking
from training.config import TrainConfig
from training.loop import TrainingStopped, build_model, input_spec
from training.order import steps_per_epoch
from training.recipes import RECIPES
from training.worker import train_worker

logger = logging.getLogger("training")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 trained, 1 training failed, 2 wrong usage or input, 130 interrupted."""
    logging.basicConfig(format="%(message)s")  # warnings of the libraries
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry to a server that is down
    logger.setLevel(logging.INFO)
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        return train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> TrainConfig:
    """The recipe named first (`deck` by default) with the fields that flags change."""
    recipe, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("deck", argv)
    if recipe not in RECIPES:
        raise UserError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                TrainConfig,
                default=RECIPES[recipe](),
                args=flags,
                prog=f"training/run.py {recipe}",
                description=inspect.cleandoc(RECIPES[recipe].__doc__ or ""),
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue())) from None


def train(config: TrainConfig) -> int:
    """From a checked config to a registered version."""
    config, manifest = resolve(config)
    data = str(config.data)
    _check_writable(str(config.storage))
    uri = tracking.tracking_uri()
    client = tracking.connect(uri)
    found = tracking.find_run(client, config, manifest)
    if found and found.info.status == "FINISHED":
        logger.info(f"run {config.name} is finished; train again under another --name")
        return 0
    cluster.connect(dashboard=True)
    cluster.refuse_local_paths([data, str(config.storage)], shared_fs=config.shared_fs)
    _refuse_embedded_mlflow(uri)
    scaling, cpus = _scaling(config)
    run_id = tracking.open_run(client, config, manifest, data).info.run_id
    job = {"config": config, "data": data, "tracking_uri": uri, "run_id": run_id, "cpus": cpus}
    _announce(config, manifest, cpus, scaling.use_gpu)
    try:
        with _terminable(), tracking.run_status(client, run_id):
            _fit(_trainer(config, scaling, job))
            with checkpoint.newest_good(
                storage.join(str(config.storage), str(config.name))
            ) as last:
                assert last is not None, "a finished training has saved its last step"
                version = registry.register(client, run_id, last, manifest, config)
    except ray.train.TrainingFailedError as error:
        logger.error(f"error: {_cause(error, config)}")
        return 1
    except tracking.FAILURES as error:
        logger.error(f"error: the run could not be recorded: {str(error).splitlines()[0][:200]}")
        logger.error(f"its checkpoints are safe; once MLflow answers: {_again(config)}")
        return 1
    except KeyboardInterrupt:
        ray.shutdown()  # ends the workers
        logger.error(f"interrupted; continue with: {_again(config)}")
        return 130
    if version:
        logger.info(f"registered alexnet version {version} as candidate; promote it with:")
        logger.info("  python -m training.registry promote")
    return 0


def resolve(config: TrainConfig) -> tuple[TrainConfig, shards.Manifest]:
    """Fills in what flags left open and refuses what cannot work, before anything starts."""
    data = config.data or storage.newest_shards()
    if data is None:
        raise UserError(
            f"no shards under {storage.home() / 'shards'}; build them with "
            "`python -m pipelines build --raw RAW`, or pass --data"
        )
    data = storage.absolute(data)
    manifest = shards.load_manifest(data)
    for split in ("train", "val"):
        if manifest.num_samples(split) == 0:
            raise UserError(f"{data} has no {split} split; rebuild with --splits train,val")
    _refuse_too_few(config, manifest)
    input_spec(manifest, config)  # refuses pixel statistics that cannot normalise
    with torch.device("meta"):
        build_model(config, manifest.num_classes)  # refuses what is no network, for no memory
    if config.augment.crop == "random" and manifest.crop == NETWORK_SIDE:
        raise UserError(
            f"--augment.crop random needs a margin, but {data} stores {NETWORK_SIDE} px; rebuild "
            "with `python -m pipelines build --crop 256`, or pass --augment.crop resized"
        )
    name = config.name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UserError(f"--name {name!r}: use letters, digits, '-', '_' and '.'")
    place = storage.absolute(config.storage or str(storage.home() / "runs"))
    return dataclasses.replace(config, data=data, name=name, storage=place), manifest


def _refuse_embedded_mlflow(uri: str) -> None:
    """Rank 0 may run on another node, where the store's file would be another, empty one."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    if uri.startswith("sqlite:") and nodes > 1:
        raise UserError(
            f"{uri} is a file of this node and the cluster has {nodes}; start `mlflow server` and "
            "set MLFLOW_TRACKING_URI to it"
        )


def _check_writable(place: str) -> None:
    """Raises UserError where checkpoints could not be written; Ray would find out much later."""
    probe = storage.join(place, ".writable")
    storage.write(probe, b"")
    storage.delete(probe)


def _refuse_too_few(config: TrainConfig, manifest: shards.Manifest) -> None:
    samples = manifest.num_samples("train")
    smallest = samples // steps_per_epoch(samples, config.optim.batch_size)
    if smallest < config.workers:
        raise UserError(
            f"{samples} train samples in batches of {config.optim.batch_size} cannot feed "
            f"{config.workers} workers; pass --workers {smallest} or fewer"
        )


def _scaling(config: TrainConfig) -> tuple[ray.train.ScalingConfig, int]:
    """Ray's resources for the workers, and the CPUs of each."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if config.device == "cuda" and gpus < config.workers:
        raise UserError(
            f"{config.workers} workers need a GPU each, the cluster has {gpus}; pass "
            f"--workers {max(gpus, 1)} or --device cpu"
        )
    use_gpu = config.device != "cpu" and gpus >= config.workers
    useful = [node for node in nodes if node.get("GPU" if use_gpu else "CPU", 0) >= 1]
    per_node = -(-config.workers // len(useful))
    share = int(min(node.get("CPU", 1) for node in useful)) // per_node
    cpus = config.cpus_per_worker or max(1, share)
    available = sum(int(node.get("CPU", 0)) // cpus for node in useful)
    if available < config.workers:
        raise UserError(
            f"{config.workers} workers of {cpus} CPUs do not fit: the cluster has room for "
            f"{available}; pass --workers {max(available, 1)}, or start more nodes"
        )
    resources = {"CPU": cpus, **({"GPU": 1} if use_gpu else {})}
    scaling = ray.train.ScalingConfig(
        num_workers=config.workers, use_gpu=use_gpu, resources_per_worker=resources
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
            storage_path=config.storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


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


def _announce(config: TrainConfig, manifest: shards.Manifest, cpus: int, use_gpu: bool) -> None:
    totals = {split: manifest.num_samples(split) for split in ("train", "val")}
    logger.info(
        f"run {config.name}: recipe {config.recipe} ({config.model.variant} network, width "
        f"{config.model.width}), {totals['train']} train and {totals['val']} val samples of "
        f"{manifest.num_classes} classes from {config.data}"
    )
    logger.info(
        f"{config.workers} worker(s) with {cpus} CPU(s)"
        f"{' and a GPU' if use_gpu else ''} each; checkpoints in {config.storage}/{config.name}"
    )


def _cause(error: ray.train.TrainingFailedError, config: TrainConfig) -> str:
    """What failed, in a worker's own words where it told; the traceback is in the log above."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError | TrainingStopped):
                return str(cause)
            cause = getattr(cause, "_base_exc", None) or cause.__cause__
    last = str(error).strip().splitlines()[-1]
    return f"{last}; the traceback is above; continue with: {_again(config)}"


def _again(config: TrainConfig) -> str:
    return f"python training/run.py {config.recipe} --name {config.name} (with the same flags)"


@contextlib.contextmanager
def _terminable() -> Any:
    """SIGTERM, which `ray job stop` sends, ends the run like Ctrl-C: recorded and resumable."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _one_line(complaint: str) -> str:
    """The message in tyro's complaint and the flags it suggests. The message stands between the
    first two rules: the first is the title's frame, or lies under it where there is only ASCII."""
    lines = [line.strip("│| ") for line in complaint.splitlines()]
    rules = [number for number, line in enumerate(lines) if line.startswith(("╭", "─", "---"))]
    message = " ".join(lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines).strip(" .")
    _, _, meant = complaint.partition("Perhaps you meant")
    flags = re.findall(r"^\W*(--[a-z][\w.-]*)", meant, re.MULTILINE)
    hint = f"; perhaps you meant {' or '.join(flags)}" if flags else ""
    return f"{message}{hint}; see `python training/run.py --help`"


if __name__ == "__main__":
    sys.exit(main())
