"""What a checkpoint folder holds: tensors as safetensors, the rest as JSON, hashes last.

    model.safetensors       parameters and buffers
    optimizer.safetensors   momentum of each parameter
    NAME.safetensors        whatever else the training keeps, such as averaged weights
    state.json              step, config, manifest digest, MLflow run id, input spec, last metrics
    hashes.json             sha256 of the files above; written last, so its presence means complete

No pickle, so that a checkpoint from storage cannot run code.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from alexnet import former_network, renamed
from alexnet.classifier import read_tensors
from alexnet.errors import UserError
from pipelines import storage
from training.config import TrainConfig, completed, in_words, science
from training.order import Ids

logger = logging.getLogger("training")

Tensors = Mapping[str, Mapping[str, torch.Tensor]]

_HASHES = "hashes.json"
_FILE = re.compile(r"[A-Za-z0-9_-]+\.(safetensors|json)")  # no path: nothing outside is looked at
# Without these a folder is no checkpoint; hashes.json says what else belongs to it.
_LEAST = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class Position:
    """How far a run is, in state.json. step: how many are done. lowest_loss: of all log lines.
    metrics: of the last evaluation, after `evaluated_step`; val_errors: 1 - top-1 of each epoch.
    samples: see `learned_from`."""

    step: int = 0
    lowest_loss: float = math.inf
    metrics: dict[str, float] = field(default_factory=dict)
    evaluated_step: int = 0
    val_errors: list[float] = field(default_factory=list)
    samples: str = ""

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Position":
        return cls(**{name: document[name] for name in cls.__dataclass_fields__})

    def learned_from(self, ids: Ids) -> None:
        """After a step with the global batch `ids`. `samples` is the running digest of which were
        learned from: sha256 in hex of the digest before and the step (from 0) and sorted ids as
        int64. The same for every number of workers, and with any kills and resumptions in between.
        """
        row = np.concatenate([[self.step], np.sort(ids)]).astype("<i8")
        self.samples = hashlib.sha256(bytes.fromhex(self.samples) + row.tobytes()).hexdigest()
        self.step += 1

    @property
    def sample_digest(self) -> float:
        """The first 48 bits of `samples`, which a float holds exactly: for metrics."""
        return float(int(self.samples[:12], 16))


def held(tensors: Tensors, state: dict[str, Any]) -> Callable[[], Path]:
    """Copies the tensors where they are and gives what writes them, as `save` does, into a new
    folder on the local disk: in any thread, while the steps that follow change the originals."""
    copies = {
        name: {key: value.detach().clone() for key, value in entry.items()}
        for name, entry in tensors.items()
    }
    device = next(iter(copies["model"].values())).device
    copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def write() -> Path:
        folder = temporary_folder()
        save(folder, copies if copied is None else _on_host(copies, device, copied), state)
        return folder

    return write


def save(folder: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    """Writes a complete checkpoint into `folder`: NAME.safetensors for each entry of `tensors`,
    "model" and "optimizer" (see `momentum`) at least. `state` is JSON-ready.

    Raises UserError, and leaves no folder, where the disk is full or cannot be written.
    """
    names = [f"{name}.safetensors" for name in tensors]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, entry in zip(names, tensors.values(), strict=True):
            save_file({key: value.contiguous() for key, value in entry.items()}, folder / name)
        (folder / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
        hashes = {name: _sha256(folder / name) for name in (*names, "state.json")}
        (folder / "hashes.json").write_text(json.dumps(hashes, indent=1))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"a checkpoint cannot be written to {folder.parent} ({error}); make room there or set "
            "TMPDIR, then run the same command again"
        ) from error


def _on_host(tensors: Tensors, device: torch.device, copied: torch.cuda.Event) -> Tensors:
    """Beside the steps on the GPU, on a stream of its own."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_event(copied)
    with torch.cuda.stream(side):
        on_host = {
            name: {
                key: torch.empty_like(value, device="cpu", pin_memory=True).copy_(
                    value, non_blocking=True
                )
                for key, value in entry.items()
            }
            for name, entry in tensors.items()
        }
    side.synchronize()
    return on_host


def temporary_folder() -> Path:
    """A new empty folder on the local disk for `save`. Those that killed processes of this host
    left behind are removed: each may hold the room that this one needs."""
    mine = f"checkpoint-{socket.gethostname()}~"
    for left in Path(tempfile.gettempdir()).glob(f"{mine}*~*"):
        pid = left.name.removeprefix(mine).partition("~")[0]
        if pid.isdigit() and not storage.is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}~"))


def verify(folder: Path) -> None:
    """Raises UserError when a file is missing or its hash differs."""
    try:
        hashes = json.loads((folder / "hashes.json").read_text())
        if not isinstance(hashes, dict):
            raise TypeError(f"hashes.json is {type(hashes).__name__}")
    except (OSError, TypeError, ValueError, RecursionError) as error:  # absent, not an object
        raise UserError(f"checkpoint {folder} is incomplete: no readable hashes.json") from error
    for name in sorted({*_LEAST, *hashes}):
        if not _FILE.fullmatch(name):
            raise UserError(f"checkpoint {folder} is damaged: {name[:80]} is no file of it")
        with contextlib.suppress(OSError):  # gone, pruned by the run itself, or unreadable
            if _sha256(folder / name) == hashes.get(name):
                continue
        raise UserError(f"checkpoint {folder} is damaged: {name} does not match its sha256")


@contextlib.contextmanager
def newest_good(run: str) -> Iterator[Path | None]:
    """The checkpoint of the highest step below `run` (a folder or s3:// prefix) whose hashes match,
    as a local folder of the same name for the time of the block; None where there is none at all.

    A damaged one is reported and passed over: the run then repeats some steps instead of failing.
    One without hashes.json is none yet. Looks at the files, since Ray's list of checkpoints lags
    behind them when a run is killed. Raises UserError when there are checkpoints and none is good.
    """
    folders = _newest_first(run)
    for folder in folders:
        with local(storage.join(run, folder)) as here:
            try:
                verify(here)
            except UserError as error:
                logger.warning(f"{error}; trying the one before")
                continue
            yield here
            return
    if folders:
        raise UserError(_none_whole(run))
    yield None


@contextlib.contextmanager
def local(checkpoint: str) -> Iterator[Path]:
    """A checkpoint, of S3 a copy, as a local folder for the time of the block."""
    if not storage.is_s3(checkpoint):
        yield Path(checkpoint)
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        here = Path(folder) / checkpoint.rpartition("/")[2]
        here.mkdir()
        for name, _ in storage.list_files(checkpoint):
            content = _if_there(storage.join(checkpoint, name))
            if "/" not in name and content is not None:
                (here / name).write_bytes(content)
        yield here


def newest_state(run: str) -> dict[str, Any] | None:
    """state.json of the checkpoint of the highest step below `run`, without a look at its tensors;
    None where there is none at all. Raises UserError where none has the hash that it should."""
    folders = _newest_first(run)
    for folder in folders:
        text = _if_there(storage.join(run, folder, "state.json")) or b""
        hashes = _if_there(storage.join(run, folder, _HASHES)) or b"{}"
        with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
            if json.loads(hashes)["state.json"] == hashlib.sha256(text).hexdigest():
                return _current(json.loads(text))
    if folders:
        raise UserError(_none_whole(run))
    return None


def _none_whole(run: str) -> str:
    return f"no checkpoint in {run} is whole; start again under another --name"


def last_step(run: str) -> int | None:
    """The highest step that is stored below `run`, by names alone; None where there is none."""
    names = [name for name, _ in storage.list_files(run) if name.endswith("/hashes.json")]
    found = [re.match(r"checkpoint-(\d+)-", name) for name in names]
    return max((int(match[1]) for match in found if match), default=None)


def refuse_other(
    state: dict[str, Any], where: str, config: TrainConfig, manifest_digest: str
) -> None:
    """Raises UserError, naming what differs, for a checkpoint of other data, of a run that learns
    something else, or of a network that this release has no more."""
    variant = _leaf(state["config"], "model.variant")
    if former := former_network(variant, state.get("dropout")):
        raise UserError(
            f"checkpoint {where} of run {config.name} is of {former}; continue it with the release "
            "that wrote it, or choose another --name"
        )
    now = science(config) | {"manifest": manifest_digest[:16]}
    then = {key: _leaf(state["config"], key) for key in now}
    then["manifest"] = state["manifest"][:16]
    if differs := [f"{key}: {then[key]} -> {now[key]}" for key in now if then[key] != now[key]]:
        raise UserError(
            f"checkpoint {where} of run {config.name} is of another training "
            f"({', '.join(differs[:4])}); continue it with its own, or choose another --name"
        )


def load_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises UserError where it is not valid, or pruned."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict):
            raise TypeError(f"it is {type(state).__name__}")
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {folder} is damaged: state.json ({error})") from error
    return _current(state)


def load_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """NAME.safetensors of a checkpoint, on the CPU. Raises UserError where it is none."""
    try:
        return read_tensors(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {name}.safetensors ({error})") from error


def momentum(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What `save` takes as "optimizer": the momentum by name of its parameter, where there is one
    already. The learning rate is a function of the step and is not stored."""
    states = {name: optimizer.state.get(weight, {}) for name, weight in model.named_parameters()}
    buffers = {name: state.get("momentum_buffer") for name, state in states.items()}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def load_optimizer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copies the momentum that `momentum` gave."""
    saved = load_tensors(folder, "optimizer")
    for name, parameter in model.named_parameters():
        if name in saved:
            # preserve_format: the buffer must have the parameter's memory layout for fused SGD
            buffer = torch.empty_like(parameter).copy_(saved[name])
            optimizer.state[parameter]["momentum_buffer"] = buffer


def _current(state: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config := state.get("config"), dict):
        state["config"] = completed(renamed(config))
    return state


def _newest_first(run: str) -> list[str]:
    """The folders of a run that hold a complete checkpoint, by step."""
    parts = [name.rpartition("/") for name, _ in storage.list_files(run)]
    folders = [folder for folder, _, file in parts if folder and file == _HASHES]
    return sorted(folders, key=lambda name: (_step(storage.join(run, name)), name), reverse=True)


def _leaf(document: Any, dotted: str) -> str | None:
    """A config's field as `science` shows it; None where this checkpoint knows no such field."""
    for key in dotted.split("."):
        if not isinstance(document, dict) or key not in document:
            return None
        document = document[key]
    return in_words(document)


def _step(checkpoint: str) -> int:
    """-1 where it is damaged or gone, as verify will tell."""
    state = _if_there(storage.join(checkpoint, "state.json"))
    try:
        return -1 if state is None else int(json.loads(state)["step"])
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
        return -1


def _if_there(uri: str) -> bytes | None:
    """None for a file that was deleted since it was listed: by an uploader that still runs, or in a
    store whose listings lag behind."""
    try:
        return storage.read(uri)
    except UserError:
        if storage.exists(uri):
            raise
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
