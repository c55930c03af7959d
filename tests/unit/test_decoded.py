"""Decoded images are the decoder's, and a file that is not what it should be is never read."""

import os
from typing import Any

import numpy as np
import pytest
import simplejpeg
from decoded_files import ALL, filled, opened, served, worker
from shard_sets import SIZES, open_loader, write_shard_set
from small_training import fit, small_config

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import decoded
from training.decoded import kept_bytes, needed_bytes, open_decoded

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("decoded") / "set", train=SIZES, val=(3,))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As many images, of another crop."""
    folder = tmp_path_factory.mktemp("decoded") / "other"
    return write_shard_set(folder, train=SIZES, val=(3,), side=256)


@pytest.fixture(scope="module")
def pixels(uri: str) -> np.ndarray:
    """All train images, by the decoder: uint8 (N,H,W,3)."""
    with open_loader(uri) as loader:
        return loader.read(ALL).images.permute(0, 2, 3, 1).numpy().copy()


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for each JPEG that is decoded from now on."""
    calls: list[int] = []
    decode = simplejpeg.decode_jpeg

    def counted(jpeg: memoryview, **rest: Any) -> np.ndarray:
        calls.append(len(jpeg))
        return decode(jpeg, **rest)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    return calls


def test_images_of_the_file_are_bit_for_bit_those_of_the_decoder(uri, pixels, decodings):
    filled(uri)
    ids = np.array([14, 0, 3, 5, 5, 8, 9, 1])
    with worker(uri) as loader:
        batches = list(loader.batches([ids, ids[:0], ALL]))
    for batch, wanted in zip(batches, (ids, ids[:0], ALL), strict=True):
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels[wanted])
        assert batch.labels.tolist() == (wanted % 4).tolist()
    assert len(decodings) == len(ALL), "the next run decodes none"


def test_two_workers_decode_each_image_once_and_read_each_others(uri, pixels, decodings):
    with worker(uri) as one, worker(uri) as other:
        for mine in (ALL[::2], ALL[1::2]):
            for loader in (one, other):
                images = loader.read(mine).images
                assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[mine])
    assert len(decodings) == len(ALL)


def test_training_from_decoded_images_learns_the_same_and_decodes_in_its_first_epoch_alone(
    uri, decodings
):
    losses, counts = [], [0]
    for cache in ("none", "decoded"):
        logged = fit(small_config(cache=cache), uri).logged
        losses.append([metrics["loss"] for _, metrics in logged if "loss" in metrics])
        counts.append(len(decodings))
    assert losses[0] == losses[1]
    assert np.diff(counts).tolist() == [2 * (len(ALL) + 3), len(ALL) + 3]


def test_images_beyond_the_limit_are_decoded_in_every_epoch(uri, pixels, decodings):
    whole = needed_bytes(load_manifest(uri), None)
    with worker(uri, limit_gb=whole / 2e9) as loader:
        for _ in range(3):
            images = loader.read(ALL).images
            assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    half = len(ALL) // 2
    assert len(decodings) == half + 3 * (len(ALL) - half)
    assert kept_bytes() <= whole / 2 + 2 * 4096, "the heads of the file"


def test_file_of_another_set_crop_or_decoder_or_cut_short_is_rebuilt_with_a_line(
    uri, other, pixels, caplog, monkeypatch
):
    path = decoded.folder() / "train"

    def rebuilt(why: str, uri: str = uri) -> None:
        caplog.clear()
        assert served(uri) == {}
        (record,) = caplog.records
        assert str(path) in record.message and why in record.message and "rebuilt" in record.message
        filled(uri)

    filled(uri)
    rebuilt("of another shard set (crop 227, now 256)", other)
    rebuilt("(crop 256, now 227)")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    rebuilt("bytes of")
    path.write_bytes(b"something else")
    rebuilt("no valid header")
    monkeypatch.setattr(simplejpeg, "__version__", "another")
    rebuilt("(decoder ")


def test_file_in_use_for_other_images_is_left_alone_and_images_are_decoded(uri, other, caplog):
    with worker(uri) as loader:
        loader.read(ALL)
        assert open_decoded(load_manifest(other), "train", None) is None
        assert "is in use for other images" in caplog.text
    assert len(served(uri)) == len(ALL)


def failing(*_: object) -> None:
    raise OSError(5, "Input/output error")


def test_disk_that_takes_no_more_ends_the_keeping_with_one_line(uri, pixels, caplog, monkeypatch):
    with worker(uri) as loader, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        for _ in range(2):
            images = loader.read(ALL).images
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    assert caplog.text.count("Input/output error; the rest is decoded every epoch") == 1


def test_file_whose_disk_fails_at_the_end_is_not_believed_again(uri, monkeypatch, caplog):
    """What could not be written is no longer in the page cache, and marked nevertheless."""
    with monkeypatch.context() as patch, worker(uri) as loader:
        loader.read(ALL)
        patch.setattr(os, "fsync", failing)
    assert "Input/output error; it is emptied" in caplog.text and served(uri) == {}


def test_file_is_the_users_alone_and_no_link_is_followed(uri, tmp_path):
    opened(uri).close()
    path = decoded.folder() / "train"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.chmod(0o666)
    with pytest.raises(UserError, match="others can write it; set ALEXNET_HOME"):
        opened(uri)
    path.unlink()
    (tmp_path / "elsewhere").mkdir()
    for place, to in ((path, "elsewhere/victim"), (path.parent, "elsewhere")):
        place.symlink_to(tmp_path / to)
        with pytest.raises(UserError, match="or pass --cache none"):
            opened(uri)
        place.unlink()
        if place == path:
            path.parent.rmdir()
    assert list((tmp_path / "elsewhere").iterdir()) == []
