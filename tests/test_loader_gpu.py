"""Pictures that stay or are decoded on a GPU: the CPU's pixels, or what they may differ by."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from shard_sets import write_shard_set
from test_loader import open_loader

from alexnet.errors import UserError
from training import gpu_jpeg

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IDS = [np.arange(8), np.array([3, 0, 7]), np.arange(8)[::-1]]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("gpu") / "set", train=(5, 3), val=(2,))


@pytest.fixture(scope="module")
def decoders() -> list[gpu_jpeg.Decode]:
    """Whichever are installed, each by itself."""
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    for make in (gpu_jpeg._nvimgcodec, gpu_jpeg._torchvision):
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            decode = gpu_jpeg._on_own_stream(make(device), device)
            gpu_jpeg._probe(decode)
            found.append(decode)
    if not found:
        pytest.skip("neither nvImageCodec nor torchvision decodes on this GPU")
    return found


def on_cuda(uri: str, **options) -> list[torch.Tensor]:
    device = torch.device("cuda")
    with open_loader(uri, device=device, **options) as loader:
        batches = [*loader.batches(IDS, pin=True), *loader.batches(IDS, pin=True)]
        assert all(batch.sample_ids.device.type == "cpu" for batch in batches)
        return [batch.images for batch in batches]


@needs_gpu
def test_pictures_resident_on_the_gpu_are_bit_for_bit_the_cpus(uri):
    expected = on_cuda(uri)
    assert expected[0].is_pinned()
    found = on_cuda(uri, cache="gpu")
    assert all(images.is_cuda for images in found)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found, strict=True))


@needs_gpu
def test_pinned_batches_survive_the_copy_that_is_still_under_way(uri):
    device = torch.device("cuda")
    with open_loader(uri, device=device) as loader:
        expected = loader.read(np.arange(8)).images
        copies = []
        for batch in loader.batches([np.roll(np.arange(8), i) for i in range(40)], pin=True):
            torch.cuda._sleep(20_000_000)  # the GPU lags behind, as in training
            copies.append(batch.images.to(device, non_blocking=True))
    for i, copy in enumerate(copies):
        assert torch.equal(copy.cpu(), expected.roll(i, 0))


@needs_gpu
def test_pixels_decoded_on_the_gpu_differ_by_rounding_only(decoders):
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    smooth = [
        Image.fromarray(pixels).resize((227, 227), Image.Resampling.BICUBIC) for pixels in rough
    ]
    jpegs, expected = [], []
    for picture in smooth:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        jpegs.append(memoryview(bytearray(buffer.getvalue())))
        expected.append(np.asarray(Image.open(buffer)))
    for decode in decoders:
        found = decode(jpegs)
        assert found.is_cuda and found.dtype == torch.uint8
        difference = np.abs(found.cpu().numpy().astype(int) - np.stack(expected))
        assert difference.mean() < 1.0 and difference.max() <= 12


@needs_gpu
@pytest.mark.parametrize("cache", ["none", "gpu"])
def test_batches_decoded_on_the_gpu_have_the_right_pictures_and_labels(uri, decoders, cache):
    expected, found = on_cuda(uri), on_cuda(uri, decode="gpu", cache=cache)
    for images, other in zip(expected, found, strict=True):
        assert other.is_cuda and other.is_contiguous(memory_format=torch.channels_last)
        means = images.float().mean((2, 3)), other.cpu().float().mean((2, 3))
        assert torch.allclose(*means, atol=1.0)


@needs_gpu
def test_picture_that_does_not_decode_on_the_gpu_is_named(decoders, tmp_path):
    small = Path(write_shard_set(tmp_path / "small", train=(3,), val=(1,), side=100))
    document = json.loads((small / "manifest.json").read_text())
    document["geometry"] = {"resize": 227, "crop": 227}
    (small / "manifest.json").write_text(json.dumps(document))
    device = torch.device("cuda")
    told = pytest.raises(UserError, match="sample 0 of train-000000 does not decode")
    with open_loader(small, decode="gpu", device=device) as loader, told:
        loader.read(np.array([0, 1]))


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The way of a whole batch through one call, on any machine: a decoder on the CPU in the place
    of the GPU's, and the sizes of the batches it was given."""
    sizes: list[int] = []

    def decode(jpegs: Sequence[memoryview]) -> torch.Tensor:
        sizes.append(len(jpegs))
        if 3 in sizes[:-1]:
            raise RuntimeError("out of memory")
        try:
            pixels = [simplejpeg.decode_jpeg(jpeg, colorspace="RGB") for jpeg in jpegs]
        except ValueError as error:
            raise RuntimeError("one of them") from error
        return torch.from_numpy(np.stack(pixels))

    monkeypatch.setattr("training.loader.gpu_decoder", lambda device: decode)
    return sizes


@pytest.mark.parametrize("cache", ["none", "gpu"])
def test_a_batch_decoded_by_one_call_has_its_pictures_in_order(uri, together, cache):
    with open_loader(uri) as plain, open_loader(uri, decode="gpu", cache=cache) as loader:
        ids = [np.arange(8)[::-1], np.array([5, 1]), np.zeros(0, np.int64), np.array([4, 4])]
        for expected, found in zip(plain.batches(ids), loader.batches(ids), strict=True):
            assert torch.equal(expected.images, found.images)
            assert expected.labels.tolist() == found.labels.tolist()
        assert loader.timings()["decode"] > 0
        loader.read(np.array([7]))
    assert together[-1] == (1 if cache == "none" else 2), "resident ones are not decoded again"


def test_what_one_call_does_not_decode_is_named_or_its_error_kept(uri, together, tmp_path):
    small = Path(write_shard_set(tmp_path / "small", train=(3,), val=(1,), side=100))
    document = json.loads((small / "manifest.json").read_text())
    document["geometry"] = {"resize": 227, "crop": 227}
    (small / "manifest.json").write_text(json.dumps(document))
    told = pytest.raises(UserError, match="sample 1 of train-000000 does not decode")
    with open_loader(small, decode="gpu") as loader, told:
        loader.read(np.array([1, 2]))
    with open_loader(uri, decode="gpu") as loader:
        loader.read(np.array([0, 1, 2]))
        with pytest.raises(RuntimeError, match="out of memory"):
            loader.read(np.array([0, 1]))
