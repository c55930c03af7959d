"""Pictures that stay decoded: the same pixels, no shard read twice, refused without the room."""

import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from shard_sets import write_shard_set
from test_loader import SIZES, assert_equal_to_tars, open_loader

from alexnet.errors import UserError
from training import resident
from training.buffers import Buffers

EPOCHS = [np.random.default_rng(seed).permutation(15) for seed in range(3)]
CACHES = ["ram", "gpu"]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("resident") / "set", train=SIZES, val=(3,))


@pytest.fixture
def own_set(tmp_path: Path) -> Path:
    return Path(write_shard_set(tmp_path / "own", train=SIZES, val=(3,)))


def pixels_of(loader, pin: bool = False) -> list[torch.Tensor]:
    return [
        batch.images
        for order in EPOCHS
        for batch in loader.batches(np.array_split(order, 4), pin=pin)
    ]


@pytest.mark.parametrize("cache", CACHES)
def test_resident_pictures_are_bit_for_bit_those_that_are_decoded_each_time(uri, cache):
    with open_loader(uri) as plain, open_loader(uri, cache=cache) as kept:
        for expected, found in zip(pixels_of(plain), pixels_of(kept), strict=True):
            assert torch.equal(expected, found)
            assert found.is_contiguous(memory_format=torch.channels_last)
        assert_equal_to_tars(uri, kept, "train", [14, 3, 3, 0])


@pytest.mark.parametrize("cache", CACHES)
def test_after_the_first_epoch_nothing_is_read_or_decoded(own_set, cache, monkeypatch):
    def again(*_: object, **__: object) -> None:
        raise AssertionError("read or decoded again")

    with open_loader(own_set, cache=cache) as loader:
        for batch in loader.batches(np.array_split(EPOCHS[0], 4)):
            assert len(batch.images)
        for path in own_set.glob("*.tar"):
            path.unlink()
        monkeypatch.setattr(os, "preadv", again)
        monkeypatch.setattr(simplejpeg, "decode_jpeg", again)
        again = [batch.sample_ids for batch in loader.batches(np.array_split(EPOCHS[1], 4))]
        assert torch.cat(again).tolist() == EPOCHS[1].tolist()


@pytest.mark.parametrize("cache", CACHES)
def test_a_rank_keeps_its_share_and_fetches_only_what_another_had(own_set, cache):
    with open_loader(own_set, cache=cache) as loader:
        loader.read(np.arange(5))
        (own_set / "train-000000.tar").unlink()  # its five samples are there
        assert loader.read(np.array([7, 2])).sample_ids.tolist() == [7, 2]
        assert loader._resident.filled.nonzero()[0].tolist() == [0, 1, 2, 3, 4, 7]


@pytest.mark.parametrize("cache", CACHES)
def test_pictures_of_a_shard_that_changed_are_not_kept(own_set, cache):
    path = own_set / "train-000000.tar"
    with open_loader(own_set, cache=cache) as loader:
        loader.read(np.array([0]))
        path.write_bytes(path.read_bytes()[::-1])
        with pytest.raises(UserError, match="changed under the run"):
            loader.read(np.array([1]))
        assert loader._resident.filled.nonzero()[0].tolist() == [0]


@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_is_the_consumers_own(uri, cache):
    with open_loader(uri, cache=cache) as loader:
        for _ in range(2):
            loader.read(np.array([1, 2])).images.zero_()
        assert_equal_to_tars(uri, loader, "train", [1, 2])


@pytest.fixture
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What /proc/meminfo is taken to be; no earlier loader has been promised any memory."""
    monkeypatch.setattr(resident, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(resident, "_promised", weakref.WeakSet())
    return tmp_path / "meminfo"


def test_a_set_larger_than_the_free_memory_is_refused_with_both_sizes(uri, monkeypatch, meminfo):
    needed = 15 * 227 * 227 * 3
    meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {needed // 1000} kB\n")
    with pytest.raises(UserError) as told:
        open_loader(uri, cache="ram")
    assert (
        "--cache ram needs 0.00232 GB for 15 pictures of 227 px, 0.00237 GB are free on cpu"
        in str(told.value)
    )
    assert "\n" not in str(told.value) and "--cache none" in str(told.value)
    meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {needed // 700} kB\n")
    with open_loader(uri, cache="ram") as loader:
        loader.read(np.arange(15))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as many workers want the same
        with pytest.raises(UserError, match="in each of 2 workers"):
            open_loader(uri, cache="ram")


def test_what_another_loader_has_yet_to_fill_does_not_count_as_free(uri, meminfo):
    needed = 15 * 227 * 227 * 3
    meminfo.write_text(f"MemAvailable: {2 * needed // 1024} kB\n")
    with open_loader(uri, cache="ram") as first:
        with pytest.raises(UserError, match="--cache ram needs"):
            open_loader(uri, cache="ram")
        first.read(np.arange(15))
        with open_loader(uri, cache="ram"):
            pass


def test_a_containers_limit_counts_without_the_files_it_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(resident, "_CGROUP", tmp_path)
    assert resident._free_in_container() > 2**60
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 400\n")
    assert resident._free_in_container() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert resident._free_in_container() > 2**60


def test_a_buffer_comes_back_when_the_last_look_into_it_is_gone():
    buffers = Buffers(8, idle=2)
    first = buffers.take(4, pin=False)
    address = first.data_ptr()
    view = first.permute(0, 3, 1, 2)[2:, 1].numpy()
    del first
    assert buffers.take(4, pin=False).data_ptr() != address, "the view still looks into it"
    del view
    assert address in {buffers.take(3, pin=False).data_ptr() for _ in range(2)}


def test_no_more_buffers_are_kept_than_batches_are_ahead():
    buffers = Buffers(8, idle=2)
    many = [buffers.take(1, pin=False) for _ in range(9)]
    assert len({tensor.data_ptr() for tensor in many}) == 9
    many.clear()
    assert len(buffers._free) == 2
    assert buffers.take(5, pin=False).shape == (5, 8, 8, 3), "too small ones are replaced"


def test_training_without_a_gpu_has_no_decoder_on_one(uri):
    with pytest.raises(UserError, match="this run is on cpu; use --decode cpu"):
        open_loader(uri, decode="gpu", device=torch.device("cpu"))
    with pytest.raises(UserError, match="use --cache gpu"):
        open_loader(uri, decode="gpu", cache="ram", device=torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_is_not_there_is_told(uri):
    with pytest.raises(UserError, match="finds no CUDA device; use --decode cpu"):
        open_loader(uri, decode="gpu", device=torch.device("cuda"))
