"""Decoded images are the decoder's, each is decoded once on a node, and no torn one is served."""

import os
import signal
from typing import Any

import numpy as np
import pytest
import simplejpeg
from shard_sets import SIZES, open_loader, write_shard_set
from small_training import fit, small_config

from alexnet.errors import UserError
from pipelines.shards import load_manifest
from training import decoded
from training.decoded import Decoded, kept_bytes, needed_bytes, open_decoded
from training.loader import Loader

pytestmark = pytest.mark.usefixtures("home")

ALL = np.arange(sum(SIZES))


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


def opened(uri: str, split: str = "train", limit_gb: float | None = None) -> Decoded:
    file = open_decoded(load_manifest(uri), split, limit_gb)
    assert file is not None
    return file


def worker(uri: str, split: str = "train", limit_gb: float | None = None) -> Loader:
    file = opened(uri, split, limit_gb)
    return Loader(uri, load_manifest(uri), split, threads=2, decoded=file)


def served(uri: str) -> dict[int, np.ndarray]:
    """By id, all images that the file of the train split gives."""
    file = opened(uri)
    side = load_manifest(uri).crop
    out = np.zeros((len(ALL), side, side, 3), np.uint8)
    missing = file.read(ALL, out)
    file.close()
    return {sample: out[sample] for sample in sorted(set(ALL.tolist()) - set(missing.tolist()))}


def filled(uri: str) -> None:
    with worker(uri) as loader:
        loader.read(ALL)


def test_images_of_the_file_are_bit_for_bit_those_of_the_decoder(uri, pixels, decodings):
    filled(uri)
    assert len(decodings) == len(ALL)
    ids = np.array([14, 0, 3, 5, 5, 8, 9, 1])
    with worker(uri) as loader:
        batches = list(loader.batches([ids, ids[:0], ALL]))
    for batch, wanted in zip(batches, (ids, ids[:0], ALL), strict=True):
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels[wanted])
        assert batch.labels.tolist() == (wanted % 4).tolist()
    assert len(decodings) == len(ALL), "the next run decodes none"
    with worker(uri, "val") as loader:
        assert loader.read(np.arange(3)).images.shape == (3, 3, 227, 227)
    assert len(decodings) == len(ALL) + 3, "val has a file of its own"


def test_two_workers_decode_each_image_once_in_the_first_epoch_and_none_in_the_second(
    uri, pixels, decodings
):
    """Their ends: pipes to a forked process, which shares with this one nothing but the file."""
    halves = [ALL[::2], ALL[1::2]]
    order, answers = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        with worker(uri) as loader:
            for mine in halves:
                os.read(order[0], 1)
                loader.read(mine)
                os.write(answers[1], bytes([len(decodings)]))
        os._exit(0)
    with worker(uri) as loader:
        counts = []
        for mine in reversed(halves):
            os.write(order[1], b"1")
            images = loader.read(mine).images
            counts.append(len(decodings) + os.read(answers[0], 1)[0])
            assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[mine])
    assert os.waitpid(pid, 0)[1] == 0
    for end in (*order, *answers):
        os.close(end)
    assert counts == [len(ALL), len(ALL)]


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
    for _ in range(2):
        with worker(uri, limit_gb=whole / 2e9) as loader:
            for _ in range(2):
                images = loader.read(ALL).images
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    half = len(ALL) // 2
    assert len(decodings) == half + 4 * (len(ALL) - half)
    assert kept_bytes() <= whole / 2 + 2 * 4096, "the heads of the file"


def test_shards_whose_images_are_all_decoded_are_not_opened(uri):
    with worker(uri) as loader:
        loader.read(ALL[:5])
    with worker(uri) as loader:
        list(loader.batches([ALL[:4], ALL[2:7]]))
        assert set(loader._files._verified) == {"train-000001"}


def killed_while_filling(uri: str, pixels: np.ndarray, at: int, mark_first: bool = False) -> None:
    """A process fills the file and gets SIGKILL within its `at`-th write, half of it done."""
    pid = os.fork()
    if not pid:
        write, calls = os.pwrite, []

        def dying(handle: int, data: Any, offset: int) -> int:
            calls.append(offset)
            if len(calls) == at:
                half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
                write(handle, half, offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(handle, data, offset)

        file = opened(uri)
        os.pwrite = dying
        for sample in ALL.tolist():
            if mark_first:
                write(file._handle, b"\1", 4096 + sample)
            file.keep(sample, pixels[sample])
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def torn(uri: str, pixels: np.ndarray) -> list[int]:
    return [
        sample for sample, row in served(uri).items() if not np.array_equal(row, pixels[sample])
    ]


@pytest.mark.parametrize("at", [1, 2, 3, 4, 2 * len(ALL)])
def test_no_torn_image_is_served_after_a_kill_and_the_whole_ones_stay(uri, pixels, at, caplog):
    killed_while_filling(uri, pixels, at)
    assert torn(uri, pixels) == []
    assert len(served(uri)) == (at - 1) // 2 and caplog.text == ""
    with worker(uri) as loader:
        loader.read(ALL)
    assert torn(uri, pixels) == [] and len(served(uri)) == len(ALL)


def test_torn_image_would_be_found(uri, pixels):
    killed_while_filling(uri, pixels, 5, mark_first=True)
    assert torn(uri, pixels) == [2]


def test_marks_from_before_a_reboot_count_only_after_a_clean_end(uri, pixels, monkeypatch, caplog):
    filled(uri)
    monkeypatch.setattr(decoded, "_boot", lambda: "second")
    assert len(served(uri)) == len(ALL) and caplog.text == ""
    killed_while_filling(uri, pixels, 3)
    monkeypatch.setattr(decoded, "_boot", lambda: "third")
    assert served(uri) == {}
    assert "was not closed before the machine started anew; it is rebuilt" in caplog.text


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


def test_full_disk_ends_the_keeping_with_one_line(uri, pixels, caplog, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with worker(uri) as loader:
        monkeypatch.setattr(os, "pwrite", full)
        for _ in range(2):
            images = loader.read(ALL).images
        monkeypatch.undo()
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    assert caplog.text.count("No space left on device") == 1


def test_file_is_the_users_alone_and_no_link_is_followed(uri, tmp_path):
    opened(uri).close()
    path = decoded.folder() / "train"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.chmod(0o666)
    with pytest.raises(UserError, match="others can write it; set ALEXNET_HOME"):
        opened(uri)
    path.unlink()
    path.symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="or pass --cache none"):
        opened(uri)
    path.unlink()
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="or pass --cache none"):
        opened(uri)
    assert not (tmp_path / "victim").exists() and list((tmp_path / "elsewhere").iterdir()) == []
