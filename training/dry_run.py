"""Everything that can be said of a training before it starts: what is missing, and what it takes.

Needs no GPU and takes seconds; it writes one empty file, to see that it can, and starts nothing. A
cluster is asked where one is known, by whoever calls: nothing here imports Ray.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexnet import NETWORK_SIDE
from alexnet.errors import UserError
from alexnet.model import AlexNet
from pipelines import shards, storage
from training import lease, tracking
from training.config import TrainConfig
from training.memories import agreed
from training.names import checked_name, checked_place, refuse_unwritable_path
from training.network import build_model, input_spec
from training.order import steps_per_epoch
from training.room import check_node, check_storage, gb

logger = logging.getLogger("training")

_FLOAT = 4  # bytes of a weight, a gradient, a velocity
_BATCHES_AHEAD = 4  # decoded pictures in memory: those in use and the loader's read-ahead


@dataclass(frozen=True)
class Ready:
    """What `preflight` found; run: that of this name, None where it would be new."""

    config: TrainConfig
    manifest: shards.Manifest
    uri: str
    client: Any
    run: Any | None


def preflight(config: TrainConfig, *, alone: bool) -> Ready:
    """Asks, in one order for the dry run and the run, for all that can be known before a cluster is
    joined: data and flags, disks, MLflow with its run beside the checkpoints in storage, and, where
    it trains `alone`, this machine. Raises UserError."""
    config, manifest = resolve(config)
    check_disks(config, manifest)
    uri = tracking.tracking_uri()
    client = tracking.connect(uri, write=True)
    run = agreed(client, config, manifest)
    if run is not None and run.info.status == "RUNNING":  # perhaps with its checkpoints elsewhere
        before = run.data.params.get("storage", str(config.storage))
        lease.holder(storage.join(before, str(config.name)))
    if alone:
        _refuse_too_large(config, estimate(config, manifest), *_device_memory(config))
        _refuse_missing_gpus(config)
        placed(config, [{"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}])
    return Ready(config, manifest, uri, client, run)


def dry_run(config: TrainConfig, cluster: Callable[[TrainConfig], str] | None = None) -> str:
    """A table of what the training would do. Raises UserError for what would stop it later.

    cluster: says what the cluster would give, or raises; None where it would be this machine alone.
    """
    ready = preflight(config, alone=cluster is None)
    config, manifest = ready.config, ready.manifest
    writer = lease.holder(storage.join(str(config.storage), str(config.name)))
    memory = estimate(config, manifest)
    total, device = _device_memory(config)
    place = _this_machine() if cluster is None else cluster(config)
    state = "is new"
    if ready.run is not None:
        done = ready.run.info.status == "FINISHED"
        after = "nothing is left to train" if done else "it continues"
        state = f"exists ({ready.run.info.status}): {after}"
    waits = [] if writer is None else [("writer", f"perhaps still {writer}: the run would wait")]
    return "\n".join(
        f"{name:<12}{text}"
        for name, text in [
            ("data", _data(config, manifest)),
            ("network", f"{config.model.variant}, {memory.parameters:,} parameters"),
            ("steps", _steps(config, manifest)),
            ("memory", f"about {gb(memory.total)} for each worker; {device} has {gb(total)}"),
            ("place", place),
            ("checkpoints", _checkpoints(config, memory.checkpoint)),
            ("tracking", f"{ready.uri} answers; run {config.name} {state}"),
            *waits,
            ("", "nothing was started; leave --dry-run away to train"),
        ]
    )


def resolve(config: TrainConfig) -> tuple[TrainConfig, shards.Manifest]:
    """Fills in what flags left open and refuses what cannot work, before anything starts."""
    given = config.name
    if given is None:
        given = f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = checked_name(given, "--name")
    place = checked_place(config.storage or str(storage.home() / "runs"), "--storage")
    refuse_unwritable_path(place, name)
    data = config.data or storage.newest_shards()
    if data is None:
        raise UserError(
            f"no shards under {storage.home() / 'shards'}; build them with "
            "`python -m pipelines build --raw RAW`, or pass --data"
        )
    data = checked_place(data, "--data")
    manifest = shards.load_manifest(data)
    for split in ("train", "val"):
        if manifest.num_samples(split) == 0:
            raise UserError(
                f"{data} has no {split} split; rebuild with --splits train,val; where RAW lacks "
                f"it, first move some images of each class into {split}/"
            )
    _refuse_too_few(config, manifest)
    input_spec(manifest, config)  # refuses pixel statistics that cannot normalise
    _on_meta(config, manifest)  # refuses what is no network
    if config.augment.crop == "random" and manifest.crop == NETWORK_SIDE:
        raise UserError(
            f"--augment.crop random needs a margin, but {data} stores {NETWORK_SIDE} px; rebuild "
            "with `python -m pipelines build --raw RAW --crop 256`, or pass --augment.crop resized"
        )
    return dataclasses.replace(config, data=data, name=name, storage=place), manifest


def check_disks(config: TrainConfig, manifest: shards.Manifest) -> None:
    """Raises UserError where checkpoints could not be written, or where this machine's disks are
    too full, which would show much later."""
    place = str(config.storage)
    _check_writable(str(storage.home()), "set ALEXNET_HOME to a folder")
    _check_writable(place, "pass --storage with a folder")
    run = storage.join(place, str(config.name))
    if not storage.is_s3(run) and storage.exists(run):
        if not Path(run).is_dir():
            raise UserError(f"{run} is no folder; move it away, or choose another --name")
        _check_writable(run, "choose another --name, or pass --storage with a folder")
    each = estimate(config, manifest).checkpoint
    check_storage(config, each)
    check_node(config, manifest, each)


def _check_writable(folder: str, do: str) -> None:
    probe = storage.join(folder, ".writable")
    try:
        storage.write(probe, b"")
    except UserError as error:
        if storage.is_s3(folder) or "; " in str(error):  # it has a remedy
            raise
        raise UserError(f"{error}; {do} that you can write") from error
    try:
        storage.delete(probe)
    except UserError as error:  # a store that takes and keeps: no reason not to train
        logger.warning(f"old checkpoints will stay, since nothing can be deleted there ({error})")


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker needs. `checkpoint` is what one takes on disk."""

    parameters: int
    weights: int
    activations: int
    pictures: int
    checkpoint: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.pictures


def estimate(config: TrainConfig, manifest: shards.Manifest) -> Memory:
    """Of the largest part of a batch that a worker may get, when the fewest are left.

    Weights count with gradient, velocity and average; activations are what autograd keeps for the
    backward pass and as much again as the largest of them, which the backward pass makes anew.
    Left out: the libraries' own workspaces.
    """
    model = _on_meta(config, manifest)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    averaged = 1 if config.optim.ema_decay else 0
    batch = -(-config.optim.batch_size // (config.min_workers or config.workers))
    saved = _saved_bytes(model, half=config.precision == "bf16")
    picture = 3 * manifest.crop**2
    view = 3 * NETWORK_SIDE**2 * _FLOAT
    return Memory(
        parameters=parameters,
        weights=parameters * _FLOAT * (3 + averaged),
        activations=batch * (sum(saved) + max(saved)),
        pictures=batch * (picture * _BATCHES_AHEAD + 2 * view),
        checkpoint=parameters * _FLOAT * (2 + averaged),
    )


def _saved_bytes(model: nn.Module, *, half: bool) -> list[int]:
    """Bytes of each tensor that autograd keeps for one picture, on a network without memory."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()._cdata  # views of one tensor count once
        if place not in own:
            kept[place] = tensor
        return tensor

    pair = 2  # batch normalisation wants more than one value for each channel
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.empty(pair, 3, NETWORK_SIDE, NETWORK_SIDE, device="meta")).sum()
    assert loss.requires_grad
    sizes = [2 if half and t.is_floating_point() else t.element_size() for t in kept.values()]
    return [t.numel() * size // pair for t, size in zip(kept.values(), sizes, strict=True)]


def _on_meta(config: TrainConfig, manifest: shards.Manifest) -> AlexNet:
    """The network without memory. Raises UserError for what is no network."""
    with torch.device("meta"):
        return build_model(config, manifest.num_classes)


def _refuse_too_few(config: TrainConfig, manifest: shards.Manifest) -> None:
    samples = manifest.num_samples("train")
    smallest = samples // steps_per_epoch(samples, config.optim.batch_size)
    if smallest < config.workers:
        raise UserError(
            f"{samples} train samples in batches of {config.optim.batch_size} cannot feed "
            f"{config.workers} workers; pass --workers {smallest} or fewer"
        )


def _refuse_too_large(config: TrainConfig, memory: Memory, total: int, device: str) -> None:
    if memory.total > total:
        for_batch = memory.activations + memory.pictures
        fits = int((total - memory.weights) / for_batch * config.optim.batch_size * 0.99)
        raise UserError(
            f"a batch of {config.optim.batch_size} over {config.min_workers or config.workers} "
            f"worker(s) needs about {gb(memory.total)} each, {device} has {gb(total)}; pass "
            f"--optim.batch-size {max(1, fits)} or more --workers"
        )


def _device_memory(config: TrainConfig) -> tuple[int, str]:
    """(bytes, name) of what this machine trains on; the workers' own may be another."""
    if config.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "the GPU here"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine"


def _refuse_missing_gpus(config: TrainConfig) -> None:
    gpus, fewest = torch.cuda.device_count(), config.min_workers or config.workers
    if config.device == "cuda" and gpus < fewest:
        raise UserError(
            f"{fewest} workers need a GPU each, this machine has {gpus} and no cluster is known; "
            "set RAY_ADDRESS to a cluster's host:port, or pass --device cpu"
        )


def placed(config: TrainConfig, nodes: Sequence[Mapping[str, float]]) -> tuple[int, bool]:
    """The CPUs of each worker on nodes with such resources, and whether it has a GPU. There must be
    room for the fewest workers now; up to the most join when there is room for them.
    Raises UserError where there is not."""
    fewest = config.min_workers or config.workers
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
            f"{fewest} workers of {cpus} CPUs do not fit: the cluster has room for {available}; "
            f"pass {f'--workers {available}' if available else 'fewer --cpus-per-worker'}, or "
            "start more nodes"
        )
    return cpus, use_gpu


def _this_machine() -> str:
    gpus = torch.cuda.device_count()
    return f"no cluster is known: a Ray of its own on this machine, which has {gpus} GPUs"


def _data(config: TrainConfig, manifest: shards.Manifest) -> str:
    train, val = (manifest.num_samples(split) for split in ("train", "val"))
    return (
        f"{config.data} ({manifest.digest[:12]}): {train:,} train and {val:,} val samples of "
        f"{manifest.num_classes} classes, {manifest.crop} px"
    )


def _steps(config: TrainConfig, manifest: shards.Manifest) -> str:
    each = steps_per_epoch(manifest.num_samples("train"), config.optim.batch_size)
    fewest = f"{config.min_workers} to " if config.min_workers else ""
    return (
        f"{each:,} in an epoch, {each * config.optim.epochs:,} in {config.optim.epochs} epochs; "
        f"batches of {config.optim.batch_size} over {fewest}{config.workers} worker(s)"
    )


def _checkpoints(config: TrainConfig, each: int) -> str:
    steps, minutes = config.checkpoint_steps, config.checkpoint_minutes
    when = ["every epoch"]
    when += [f"every {steps} steps"] if steps else []
    when += [f"every {minutes:g} minutes"] if minutes else []
    room = storage.free_bytes(str(config.storage))
    free = "" if room is None else f", {gb(room)} free"
    return (
        f"{gb(each)} {', '.join(when)} to {config.storage}/{config.name}; the last "
        f"{config.keep_last} and the best {config.keep_best} stay{free}"
    )
