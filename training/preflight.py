"""All that can be said of a run before it starts: what it is, what is missing and what it takes.

Needs no GPU and takes seconds; it writes one empty file, to see that it can, and starts nothing. A
cluster is asked where one is known, by whoever calls: nothing here imports Ray.
"""

import dataclasses
import logging
import os
import tempfile
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexnet import NETWORK_SIDE
from alexnet.errors import UserError
from pipelines import storage
from pipelines.shards import Manifest, load_manifest
from training import checkpoint, decoded, initial, lease, metrics, mix, tracking
from training.config import TrainConfig, checked_name
from training.initial import Initial
from training.network import build_model, input_spec
from training.order import steps_per_epoch
from training.recipes import small_parts
from training.steps import refuse_without_compiler

logger = logging.getLogger("training")

_FLOAT = 4  # bytes of a weight, a gradient, a velocity
_BATCHES_AHEAD = 4  # decoded images in memory: those in use and the loader's read-ahead
_LONGEST_PATH, _LONGEST_KEY = 4096, 1024  # of Linux, of S3
_BELOW = len("/checkpoint-00000000-000000/optimizer.safetensors") + 96  # as above, unrenamed


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker needs: weights with what is kept for each, every image of its part of a
    batch, and a checkpoint's copy while it is written. `checkpoint`: of one, on disk as well."""

    parameters: int
    weights: int
    image: int
    batch: int  # images
    checkpoint: int

    @property
    def total(self) -> int:
        return self.weights + self.checkpoint + self.batch * self.image


@dataclass(frozen=True)
class Job:
    """A run, resolved once and handed on to its workers, which decide nothing of it again.

    config: with data, name and storage filled in. run_id, status: of the run of this name in
    MLflow, None where it would be new. initial: for the driver alone. mix: see training/mix.py. The
    rest is known once the cluster is: CPUs of each worker, number and token of the lease.
    """

    config: TrainConfig
    manifest: Manifest = field(repr=False)  # the dashboard shows the rest
    memory: Memory
    tracking_uri: str
    run_id: str | None = None
    status: str | None = None
    initial: Initial | None = field(default=None, repr=False)
    mix: float | None = None
    cpus: int = 1
    lease: tuple[int, str] = (0, "")

    @property
    def data(self) -> str:
        return str(self.config.data)

    @property
    def folder(self) -> str:
        """Where the checkpoints are, a folder or s3:// prefix."""
        return storage.join(str(self.config.storage), str(self.config.name))


def preflight(config: TrainConfig, *, alone: bool) -> tuple[Job, Any]:
    """The job and a client of its MLflow. Asks, in one order for the dry run and the run, for all
    that can be known before a cluster is joined: data and flags, disks, MLflow with its run beside
    the checkpoints in storage, and, where it trains `alone`, this machine. Raises UserError."""
    config, manifest = resolve(config)
    memory = estimate(config, manifest)
    job = Job(config, manifest, memory, tracking.tracking_uri())
    _check_folders(job)
    if alone:
        check_node(job)
    client = tracking.connect(job.tracking_uri, config.experiment, write=True)
    config = initial.lasting(config)
    job = dataclasses.replace(job, config=config)
    if run := agreed(client, config, manifest):
        job = dataclasses.replace(job, run_id=run.info.run_id, status=run.info.status)
        if job.status == "RUNNING":  # perhaps with its checkpoints elsewhere
            before = run.data.params.get("storage", str(config.storage))
            lease.holder(storage.join(before, str(config.name)))
    if alone:
        _refuse_too_large(config, memory, *_here(config)[1:])
    if config.init_from is not None and checkpoint.last_step(job.folder) is None:
        job = dataclasses.replace(job, initial=initial.load_initial(config, manifest))
    if job.status != "FINISHED":
        job = dataclasses.replace(job, mix=mix.check_mix(config, manifest, begun=run is not None))
    return job, client


def dry_run(
    config: TrainConfig, cluster: Callable[[TrainConfig], tuple[str, bool]] | None = None
) -> str:
    """A table of what the run would do. Raises UserError for what would stop it later.

    cluster: says what it would give and whether that has GPUs, or raises; None: this machine alone.
    """
    job, client = preflight(config, alone=cluster is None)
    config, manifest, writer = job.config, job.manifest, lease.holder(job.folder)
    train, val = (manifest.num_samples(split) for split in ("train", "val"))
    batch, epochs = config.optim.batch_size, config.optim.epochs
    each = steps_per_epoch(train, batch)
    memory = f"about {_gb(job.memory.total)} for each worker"
    if cluster is None:
        use_gpu, total, device = _here(config)
        memory += f"; {device} has {_gb(total)}"
        place = "no cluster is known: a Ray of its own on this machine, which has "
        place += f"{torch.cuda.device_count()} GPUs"
    else:
        place, use_gpu = cluster(config)
    if use_gpu and (few := small_parts(config)):
        place += f"; {few}"
    after = "nothing is left to train" if job.status == "FINISHED" else "it continues"
    state = "is new" if job.status is None else f"exists ({job.status}): {after}"
    waits = [] if writer is None else [("writer", f"perhaps still {writer}: the run would wait")]
    return "\n".join(
        f"{name:<12}{text}"
        for name, text in [
            (
                "data",
                f"{job.data} ({manifest.digest[:12]}): {train:,} train and {val:,} val samples of "
                f"{manifest.num_classes} classes, {manifest.crop} px",
            ),
            *([] if job.mix is None else [("classes", mix.shown(job.mix))]),
            ("network", f"{config.model.variant}, {job.memory.parameters:,} parameters"),
            *([] if job.initial is None else [("", job.initial.said)]),
            (
                "steps",
                f"{each:,} in an epoch, {each * epochs:,} in {epochs} epochs; batches of {batch} "
                f"over {workers_of(config)} worker(s)",
            ),
            ("time", _time(client, config, epochs * train)),
            ("memory", memory),
            ("place", place),
            *([("decoded", _decoded(job))] if config.cache == "decoded" else []),
            ("checkpoints", _checkpoints(job)),
            ("tracking", f"{job.tracking_uri} answers; run {config.name} {state}"),
            *waits,
            ("", "nothing was started; leave --dry-run away to train"),
        ]
    )


def workers_of(config: TrainConfig) -> str:
    return f"{f'{config.min_workers} to ' if config.min_workers else ''}{config.workers}"


def resolve(config: TrainConfig) -> tuple[TrainConfig, Manifest]:
    """Fills in what flags left open and refuses what cannot work, before anything starts."""
    usual = f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = checked_name(usual if config.name is None else config.name, "--name")
    model_name = checked_name(config.model_name, "--model-name")
    place = checked_place(config.storage or str(storage.home() / "runs"), "--storage")
    refuse_unwritable_path(place, name)
    data = config.data or storage.newest_shards()
    if data is None:
        raise UserError(
            f"no shards under {storage.home() / 'shards'}; build them with "
            "`python -m pipelines build --raw RAW`, or pass --data"
        )
    data = checked_place(data, "--data")
    manifest = load_manifest(data)
    for split in ("train", "val"):
        if manifest.num_samples(split) == 0:
            raise UserError(
                f"{data} has no {split} split; rebuild with --splits train,val; where RAW lacks "
                f"it, first move some images of each class into {split}/"
            )
    samples = manifest.num_samples("train")
    smallest = samples // steps_per_epoch(samples, config.optim.batch_size)
    if smallest < config.workers:
        raise UserError(
            f"{samples} train samples in batches of {config.optim.batch_size} cannot feed "
            f"{config.workers} workers; pass --workers {smallest} or fewer"
        )
    input_spec(manifest, config)  # refuses pixel statistics that cannot normalise
    if config.augment.crop == "random" and manifest.crop == NETWORK_SIDE:
        raise UserError(
            f"--augment.crop random needs a margin, but {data} stores {NETWORK_SIDE} px; rebuild "
            "with `python -m pipelines build --raw RAW --crop 256`, or pass --augment.crop resized"
        )
    experiment = tracking.experiment_name(config.experiment)
    config = dataclasses.replace(config, model_name=model_name, experiment=experiment)
    return dataclasses.replace(config, data=data, name=name, storage=place), manifest


# Places that a user gives


def checked_place(uri: str, flag: str) -> str:
    """A folder or s3:// prefix, absolute, that can stand in a log line and in MLflow's database.
    Raises UserError for any other."""
    for letter in uri:
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
            raise UserError(
                f"{flag} {uri[:80]!r} holds {letter!r}, which cannot be shown; rename the folder"
            )
    return storage.absolute(uri)


def refuse_unwritable_path(place: str, name: str) -> None:
    """Raises UserError where the files of a run's checkpoints, at place/name, would have names
    that the file system or S3 does not take."""
    path = storage.join(place, name)
    size, limit = len(path.encode()) + _BELOW, _LONGEST_PATH
    if storage.is_s3(place):
        size, limit = len(path.split("/", 3)[3].encode()) + _BELOW, _LONGEST_KEY
        if any(part in ("", ".", "..") for part in path.removeprefix("s3://").split("/")):
            raise UserError(f"--storage {place[:200]} has a part that is empty, '.' or '..'")
    if size > limit:
        raise UserError(
            f"--storage {place[:80]}… with --name {name[:40]} makes names of {size:,} bytes for "
            f"checkpoints, {limit:,} at most; pass a shorter --storage"
        )


# Disks


def _check_folders(job: Job) -> None:
    """Raises UserError where checkpoints could not be written, or those that stay do not fit; one
    more than those is there while it is written."""
    config, place = job.config, str(job.config.storage)
    _check_writable(str(storage.home()), "set ALEXNET_HOME to a folder")
    _check_writable(place, "pass --storage with a folder")
    if not storage.is_s3(job.folder) and storage.exists(job.folder):
        if not Path(job.folder).is_dir():
            raise UserError(f"{job.folder} is not a folder; move it away, or choose another --name")
        _check_writable(job.folder, "choose another --name, or pass --storage with a folder")
    wanted = job.memory.checkpoint * (config.keep_last + config.keep_best + 1)
    remedy = "make room, lower --keep-last, or pass another --storage"
    _refuse_full(place, wanted, "the checkpoints of this run", remedy)


def check_node(job: Job) -> None:
    """Raises UserError where this node's own disk is too full: for the cache of shards on S3, of
    which `--cache-gb` or all are kept, for decoded images, or for a checkpoint on its way to
    storage."""
    remedy = "make room on this node, or set TMPDIR to another disk"
    one = job.memory.checkpoint
    _refuse_full(tempfile.gettempdir(), one, "a checkpoint on its way to storage", remedy)
    config, parts = job.config, list[tuple[str, str, int, int]]()
    if config.synthetic:
        return
    cache = str(storage.home() / "cache")
    if storage.is_s3(job.data):
        kept = sum(size for name, size in storage.list_files(cache) if name.endswith(".tar"))
        whole = sum(shard.num_bytes for shard in job.manifest.shards)
        wanted = min(round(config.cache_gb * 1e9), whole)
        parts.append(("the shards kept there", "--cache-gb", wanted, kept))
    if config.cache == "decoded":
        wanted, kept = decoded.needed_bytes(job.manifest, config.decoded_gb), decoded.kept_bytes()
        parts.append(("the decoded images", "--decoded-gb", wanted, kept))
    if parts:
        what, flags, sizes, reusable = zip(*parts, strict=True)
        remedy = "make room on this node, set ALEXNET_HOME to another disk, or pass a lower "
        remedy += " or ".join(flags)
        _refuse_full(cache, sum(sizes), " and ".join(what), remedy, reusable=sum(reusable))


def _refuse_full(place: str, wanted: int, what: str, remedy: str, reusable: int = 0) -> None:
    free = storage.free_bytes(place)
    if free is not None and free + reusable < wanted:
        raise UserError(
            f"{place} has {_gb(free + reusable)} free and {what} take {_gb(wanted)}; {remedy}"
        )


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


# Memory


def estimate(config: TrainConfig, manifest: Manifest) -> Memory:
    """Of the largest part of a batch that a worker may get, with the minimum of workers.

    Weights count with gradient, velocity and average; activations are what autograd keeps for the
    backward pass and as much again as the largest of them, which the backward pass makes anew.
    Left out: the libraries' own workspaces. Raises UserError for what is not a network.
    """
    with torch.device("meta"):
        model = build_model(config, manifest.num_classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    averaged = 1 if config.optim.ema_decay else 0
    saved = _saved_bytes(model, half=config.precision == "bf16")
    views = 2 * 3 * NETWORK_SIDE**2 * _FLOAT
    return Memory(
        parameters=parameters,
        weights=parameters * _FLOAT * (3 + averaged),
        image=sum(saved) + max(saved) + 3 * manifest.crop**2 * _BATCHES_AHEAD + views,
        batch=-(-config.optim.batch_size // (config.min_workers or config.workers)),
        checkpoint=parameters * _FLOAT * (2 + averaged),
    )


def _saved_bytes(model: nn.Module, *, half: bool) -> list[int]:
    """Bytes of each tensor that autograd keeps for one image, on a network without memory."""
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


def _refuse_too_large(config: TrainConfig, memory: Memory, total: int, device: str) -> None:
    if memory.total > total:
        workers = config.min_workers or config.workers
        fits = int((total - memory.weights - memory.checkpoint) / memory.image * workers * 0.99)
        raise UserError(
            f"a batch of {config.optim.batch_size} over {workers} worker(s) needs about "
            f"{_gb(memory.total)} each, {device} has {_gb(total)}; pass --optim.batch-size "
            f"{max(1, fits)} or more --workers"
        )


def _here(config: TrainConfig) -> tuple[bool, int, str]:
    """Whether workers would have a GPU each; bytes and name of what they train on."""
    here = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
    use_gpu = placed(config, [here], alone=True)[1]
    refuse_without_compiler(config, use_gpu)
    if use_gpu:
        return True, torch.cuda.get_device_properties(0).total_memory, "the GPU here"
    return False, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine"


# Workers


def placed(
    config: TrainConfig, nodes: Sequence[Mapping[str, float]], *, alone: bool = False
) -> tuple[int, bool]:
    """The CPUs of each worker on nodes with such resources, and whether it has a GPU. The minimum
    of workers must fit now; up to the most join when there is a place for them.
    alone: the one node is this machine. Raises UserError where they do not fit."""
    fewest = config.min_workers or config.workers
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if config.device == "cuda" and gpus < fewest:
        has = f"the cluster has {gpus}; pass --workers {max(gpus, 1)}"
        if alone:
            has = f"this machine has {gpus} and no cluster is known; set RAY_ADDRESS of one"
        raise UserError(f"{fewest} workers need a GPU each, {has} or --device cpu")
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


# MLflow's run and the checkpoints in storage


def agreed(client: Any, config: TrainConfig, manifest: Manifest) -> Any | None:
    """The run of this name, with which the training goes on or has ended; None for a new one.

    Raises UserError where MLflow or the storage lacks what the other remembers, or is of another
    training: to go on would train unseen steps, or register a version that nothing is known about.
    """
    place = storage.join(str(config.storage), str(config.name))
    state = checkpoint.newest_state(place)
    owner = "" if state is None else str(state.get("run_id") or "unknown")
    run = tracking.find_run(client, config, manifest, owner)
    if run is not None and run.info.status == "FINISHED":
        return run
    if state is None:
        if run is not None:
            _refuse_lost(run, place, config)
        return run
    if run is None or run.info.run_id != owner:
        holds = f"{place} holds checkpoints, up to step {state['step']}, of MLflow's run {owner}"
        raise UserError(f"{holds}, which {_another(client, owner, config, run)}")
    checkpoint.refuse_other(state, place, config, manifest.digest)
    return run


def _refuse_lost(run: Any, place: str, config: TrainConfig) -> None:
    """A run that was killed before its first checkpoint begins again."""
    step, before = run.data.tags.get(tracking.STORED), run.data.params.get("storage")
    if step is None:
        return
    there = "" if before == config.storage else f", pass --storage {before} as before"
    raise UserError(
        f"run {config.name} has stored a checkpoint of step {step}, and {place} holds none; put "
        f"its checkpoints back{there}, or train anew under another --name"
    )


def _another(client: Any, owner: str, config: TrainConfig, run: Any | None) -> str:
    known = tracking.run_or_none(client, owner)
    if known is not None and known.info.lifecycle_stage != "active":
        return tracking.deleted(client, owner)
    if known is not None:
        return (
            f"is named {known.info.run_name} there; name it {config.name} again in MLflow, or "
            "choose another --name"
        )
    lacks = "does not have" if run is None else f"does not have: its run {config.name} is another"
    return (
        f"MLflow at {client.tracking_uri} {lacks}; set MLFLOW_TRACKING_URI to the store that has "
        "it, move the folder away, or choose another --name"
    )


# Lines of the table


def _checkpoints(job: Job) -> str:
    config, free = job.config, storage.free_bytes(str(job.config.storage))
    steps, minutes = config.checkpoint_steps, config.checkpoint_minutes
    when = ["at the end"]
    when += ["after the best epochs"] if config.keep_best else []
    when += [f"every {steps} steps"] if steps else []
    when += [f"every {minutes:g} minutes"] if minutes else []
    left = "" if free is None else f", {_gb(free)} free"
    return (
        f"{_gb(job.memory.checkpoint)} {', '.join(when)} to {job.folder}; the last "
        f"{config.keep_last} and the best {config.keep_best} stay{left}"
    )


def _time(client: Any, config: TrainConfig, images: int) -> str:
    rate = metrics.measured_rate(client, config)
    if rate is None:
        hours = images / 1000 / 3600
        return (
            f"{hours:,.2f} h at 1,000 img/s; no run of this network and precision has shown a rate"
        )
    hours = images / rate.images_per_second / 3600
    return (
        f"about {hours:,.2f} h, at the {rate.images_per_second:,.0f} img/s of run {rate.run} on "
        f"{rate.on}"
    )


def _decoded(job: Job) -> str:
    needed = decoded.needed_bytes(job.manifest, job.config.decoded_gb)
    there = decoded.kept_bytes()
    return f"{_gb(needed)} of images on each node's disk in {decoded.folder()}, {_gb(there)} here"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
