"""A device that computes on the CPU and whose blocking transfers are listed.

Its tensors say that they are on the meta device and hold CPU tensors, so that a whole training runs
on it, with the results of the CPU. Pinned memory, streams and events are named and do nothing. Like
a GPU it refuses what would not repeat its bits where only deterministic algorithms are allowed.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
_MADE_FROM_PYTHON = (torch.tensor, torch.as_tensor)
# Of networks of pictures, by the documentation of torch.use_deterministic_algorithms.
_DO_NOT_REPEAT = (
    "adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "fractional_max_pool2d_backward",
    "grid_sampler_2d_backward",
    "nll_loss2d_forward",
    "reflection_pad2d_backward",
    "upsample_bilinear2d_backward",
)


class OnDevice(torch.Tensor):
    """held: the same values on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def record_stream(self, stream: Any) -> None:
        assert stream is not None


@contextlib.contextmanager
def blocking() -> Iterator[list[str]]:
    """Inside, DEVICE works in this thread; fills with file and operation of what would block."""
    found: list[str] = []
    _PINNED.clear()
    with (
        mock.patch.multiple(
            torch.cuda, Stream=mock.MagicMock(), current_stream=mock.MagicMock(), stream=_nothing
        ),
        _Python(found),
        _Operations(found),
    ):
        yield found


_nothing = contextlib.nullcontext
_PINNED: dict[int, Any] = {}  # the storages themselves, so that their addresses stay theirs


class _Python(TorchFunctionMode):
    """Tensors that are made of Python's values on the device: a copy from pageable memory."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MADE_FROM_PYTHON and _on_device(kwargs.get("device")):
            self._found.append(_place(func.__name__))
            del kwargs["device"]
            return OnDevice(func(*args, **kwargs))
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnDevice):
            self._found.append(_place("new_tensor"))
            return OnDevice(func(args[0].held, *args[1:], **kwargs))
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            self._found.append(_place("tolist"))
            return args[0].held.tolist()
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == "is_pinned":
            return _is_pinned(args[0])
        if name == "_pin_memory":
            return _pin(args[0].clone())
        if kwargs.pop("pin_memory", None):
            return _pin(func(*args, **kwargs))
        if torch.are_deterministic_algorithms_enabled() and name.strip("_") in _DO_NOT_REPEAT:
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        if self._blocks(name, args, kwargs):
            self._found.append(_place(name))
        return _run(func, args, kwargs)

    def _blocks(self, name: str, args: Any, kwargs: Any) -> bool:
        if name in ("_local_scalar_dense", "nonzero", "equal"):
            return any(isinstance(value, OnDevice) for value in args)
        if name == "_to_copy" and kwargs.get("device") is not None:
            source, there = args[0], _on_device(kwargs["device"])
            free = kwargs.get("non_blocking", False)
        elif name == "copy_":
            source, there = args[1], isinstance(args[0], OnDevice)
            free = kwargs.get("non_blocking", len(args) > 2 and args[2])
        else:
            return False
        if isinstance(source, OnDevice):
            return not there
        return there and not (free and _is_pinned(source))


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    there = [] if kwargs.get("device") is None else [_on_device(kwargs["device"])]

    def held(value: Any) -> Any:
        if isinstance(value, OnDevice):
            there.append(True)
            return value.held
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args, kwargs = tree_map(held, args), tree_map(held, kwargs)
    result = func(*args, **kwargs)
    if not there or not there[0]:
        return result
    return tree_map(lambda value: OnDevice(value) if type(value) is torch.Tensor else value, result)


def _on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    _PINNED[storage.data_ptr()] = storage
    return tensor


def _is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, OnDevice) and tensor.untyped_storage().data_ptr() in _PINNED


def _place(name: str) -> str:
    """The operation and the line of our packages that asked for it."""
    own = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.name}"
        for frame in traceback.extract_stack()
        if any(Path(frame.filename).is_relative_to(ROOT / name) for name in ("alexnet", "training"))
    ]
    return f"{name} in {own[-1]}"
