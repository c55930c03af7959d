"""JPEGs decoded on a GPU, by nvImageCodec or torchvision where one of them is installed.

Their pixels are not bit for bit the CPU's: the inverse DCT is rounded in another way, and chroma
that was stored at half size may be repeated where libjpeg-turbo interpolates it (nvImageCodec is
told to interpolate, torchvision cannot be told). So a run should decode by one of them throughout.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from alexnet.errors import UserError

# uint8 (B, H, W, 3) on the GPU from JPEGs of one size; RuntimeError when one does not decode.
Decode = Callable[[Sequence[memoryview]], Tensor]

_PROBE_SIDE = 32
_PROBE_TOLERANCE = 4.0  # mean difference to the CPU's pixels, levels; a wrong layout is far more


def gpu_decoder(device: torch.device) -> Decode:
    """The first decoder that works on `device`, tried on a small picture.

    Its results are complete when it returns. Raises UserError where there is none.
    """
    if device.type != "cuda":
        raise UserError(
            f"--decode gpu needs a CUDA device, this run is on {device}; use --decode cpu"
        )
    if not torch.cuda.is_available():
        raise UserError("--decode gpu finds no CUDA device; use --decode cpu")
    if str(device) == "cuda":  # it is used by a thread that has another current device
        device = torch.device("cuda", torch.cuda.current_device())
    reasons = []
    for name, make in (("nvidia.nvimgcodec", _nvimgcodec), ("torchvision", _torchvision)):
        try:
            decode = _on_own_stream(make(device), device)
            _probe(decode)
            return decode
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            reasons.append(f"{name}: {' '.join(str(error).split())[:120]}")
    raise UserError(
        f"--decode gpu finds no decoder ({'; '.join(reasons)}); "
        "pip install nvidia-nvimgcodec-cu12[all], or this torch's torchvision, or use --decode cpu"
    )


def _nvimgcodec(device: torch.device) -> Decode:
    codec: Any = importlib.import_module("nvidia.nvimgcodec")
    decoder = codec.Decoder(device_id=device.index, options=":fancy_upsampling=1")
    params = codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB)

    def decode(jpegs: Sequence[memoryview]) -> Tensor:
        stream = torch.cuda.current_stream(device)
        sources = [codec.CodeStream(bytes(jpeg)) for jpeg in jpegs]
        pictures = decoder.decode(sources, params=params, cuda_stream=stream.cuda_stream)
        if any(picture is None for picture in pictures):
            raise RuntimeError("nvImageCodec does not decode a picture")
        batch = torch.stack([torch.utils.dlpack.from_dlpack(picture) for picture in pictures])
        stream.synchronize()  # before the memory of `pictures`, which is not PyTorch's, is freed
        return batch

    return decode


def _torchvision(device: torch.device) -> Decode:
    io: Any = importlib.import_module("torchvision.io")

    def decode(jpegs: Sequence[memoryview]) -> Tensor:
        sources = [torch.from_numpy(np.asarray(jpeg)) for jpeg in jpegs]
        pictures = io.decode_jpeg(sources, mode=io.ImageReadMode.RGB, device=device)
        return torch.stack(pictures).permute(0, 2, 3, 1).contiguous()

    return decode


def _on_own_stream(decode: Decode, device: torch.device) -> Decode:
    """Beside the training's stream, and complete on return, for use on any other stream."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def decode_all(jpegs: Sequence[memoryview]) -> Tensor:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            pictures = decode(jpegs)
        stream.synchronize()
        return pictures

    return decode_all


def _probe(decode: Decode) -> None:
    """Raises RuntimeError when what comes back is not the picture."""
    ramp = np.linspace(0, 255, _PROBE_SIDE, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), axis=-1)
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=95)
    expected = simplejpeg.decode_jpeg(jpeg, colorspace="RGB").astype(np.float32)
    found = decode([memoryview(bytearray(jpeg))] * 2).cpu().numpy()
    if found.shape != (2, *expected.shape) or found.dtype != np.uint8:
        raise RuntimeError(f"gives {found.dtype} {found.shape}")
    if (difference := float(np.abs(found - expected).mean())) > _PROBE_TOLERANCE:
        raise RuntimeError(f"is off by {difference:.1f} levels on average")
