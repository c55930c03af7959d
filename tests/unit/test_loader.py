"""What the loader hands over is what lies in the tars; what is wrong with them is told."""

import hashlib
import json
import tarfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from shard_sets import SIZES, assert_equal_to_tars, decoded, open_loader, write_shard_set

from alexnet.errors import UserError
from training.loader import Buffers

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("loader") / "set", train=SIZES, val=(3,))


@pytest.fixture
def own_set(tmp_path: Path) -> Path:
    """A set that a test may damage."""
    return Path(write_shard_set(tmp_path / "own", train=SIZES, val=(3,)))


def promise(folder: Path, shard: str, **changes: object) -> None:
    """Lets the manifest say something else about a shard."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    row = next(row for row in document["shards"] if row["name"] == shard)
    row.update(changes)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_pixels_and_labels_are_those_of_the_tar_members_for_any_ids_in_any_order(uri, threads):
    with open_loader(uri, threads=threads) as loader:
        assert (loader.num_samples, loader.shard_sizes) == (15, list(SIZES))
        assert_equal_to_tars(uri, loader, "train", [14, 0, 3, 5, 5, 8, 9, 1])
        assert_equal_to_tars(uri, loader, "train", [7])
    with open_loader(uri, "val", threads=threads) as loader:
        assert_equal_to_tars(uri, loader, "val", [2, 1, 0])


def test_batches_come_in_the_order_asked_for(uri):
    wanted = [np.array(ids) for ids in ([3, 1], [0], [14, 13, 12], [2], [4], [6], [8], [10])]
    with open_loader(uri) as loader:
        got = [batch.sample_ids.tolist() for batch in loader.batches(wanted)]
    assert got == [ids.tolist() for ids in wanted]


def test_batches_that_are_kept_are_never_overwritten_by_later_ones(uri):
    pixels, _ = decoded(uri, "train")
    with open_loader(uri) as loader:
        kept = [batch.images for batch in loader.batches([np.array([i % 15]) for i in range(40)])]
        part = next(loader.batches([np.array([3, 4])])).images[1:, :, :5]  # a part keeps it, too
        later = list(loader.batches([np.array([9, 9])] * 20))
    for i, images in enumerate(kept):
        found = images[0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - pixels[i % 15]).max() <= 1
    assert np.abs(part[0].permute(1, 2, 0).numpy().astype(int) - pixels[4][:5]).max() <= 1
    assert len(later) == 20


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_survive_the_copy_that_is_still_under_way(uri):
    device = torch.device("cuda")
    with open_loader(uri) as loader:
        expected = loader.read(np.arange(8)).images
        copies = []
        for batch in loader.batches([np.roll(np.arange(8), i) for i in range(40)], pin=True):
            assert batch.images.is_pinned()
            torch.cuda._sleep(20_000_000)  # the GPU lags behind, as in training
            copies.append(batch.images.to(device, non_blocking=True))
    for i, copy in enumerate(copies):
        assert torch.equal(copy.cpu(), expected.roll(i, 0))


def test_an_empty_batch_is_a_batch(uri):
    with open_loader(uri) as loader:
        sizes = [len(b.images) for b in loader.batches([np.array([1]), np.zeros(0, np.int64)])]
    assert sizes == [1, 0]


def test_bytes_that_do_not_decode_name_their_sample_and_shard(own_set):
    path = own_set / "train-000000.tar"
    with tarfile.open(path) as tar:
        member = next(m for m in tar.getmembers() if m.name == "train_0002.jpg")
    data = bytearray(path.read_bytes())
    data[member.offset_data : member.offset_data + 400] = b"\0" * 400
    path.write_bytes(data)
    promise(own_set, "train-000000", sha256=hashlib.sha256(data).hexdigest())
    with open_loader(own_set) as loader:
        loader.read(np.array([1, 3]))
        with pytest.raises(UserError, match="sample 2 of train-000000 does not decode"):
            loader.read(np.array([1, 2, 3]))


def test_image_of_another_size_than_the_set_is_refused_and_not_half_filled(tmp_path):
    small = Path(write_shard_set(tmp_path / "small", train=(2,), val=(1,), side=100))
    document = json.loads((small / "manifest.json").read_text())
    document["geometry"] = {"resize": 227, "crop": 227}
    (small / "manifest.json").write_text(json.dumps(document))
    told = r"sample 0 of train-000000 .*\(100, 100\) pixels instead of \(227, 227\)"
    with open_loader(small) as loader, pytest.raises(UserError, match=told):
        loader.read(np.array([0]))


def test_index_of_another_length_than_the_manifest_is_refused(own_set):
    promise(own_set, "train-000000", samples=6)
    with pytest.raises(
        UserError, match=r"has 15 rows, its manifest promises 16; run `python -m pipelines verify "
    ):
        open_loader(own_set)


def test_error_in_the_read_ahead_reaches_the_consumer_after_the_good_batches(own_set):
    (own_set / "train-000002.tar").unlink()
    with open_loader(own_set) as loader:
        batches = loader.batches([np.array([0, 1]), np.array([5]), np.array([14]), np.array([2])])
        assert [next(batches).sample_ids.tolist() for _ in range(2)] == [[0, 1], [5]]
        with pytest.raises(UserError, match="train-000002"):
            next(batches)


def threads_of_loaders() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("shards", "decode"))]


def test_no_thread_is_left_after_the_end_an_early_leave_or_an_error(own_set):
    many = [np.array([i % 15]) for i in range(60)]
    with open_loader(own_set) as loader:
        assert len(list(loader.batches(many[:4]))) == 4
        batches = loader.batches(many)
        next(batches)
        assert threads_of_loaders()
        batches.close()
    assert threads_of_loaders() == []
    (own_set / "train-000000.tar").unlink()
    with open_loader(own_set) as loader, pytest.raises(UserError):
        list(loader.batches(many))
    assert threads_of_loaders() == []


def test_only_a_few_batches_are_begun_ahead(uri):
    with (
        open_loader(uri) as loader,
        mock.patch.object(loader, "_begin", wraps=loader._begin) as begun,
    ):
        batches = loader.batches([np.array([i]) for i in range(15)])
        next(batches)
        assert begun.call_count == 4, "one taken, three on their way"
        next(batches)
        assert begun.call_count == 5
        batches.close()


def test_timings_tell_reading_decoding_and_waiting_apart(uri):
    with open_loader(uri) as loader:
        assert loader.timings() == {"read": 0.0, "decode": 0.0, "wait": 0.0}
        start = time.perf_counter()
        for _ in loader.batches([np.arange(15)] * 4):
            time.sleep(0.01)  # a consumer at work is not one that waits
        elapsed = time.perf_counter() - start
        spent = loader.timings()
    assert 0 < spent["wait"] <= elapsed - 0.04
    assert spent["decode"] > 60 * 20e-6 and spent["read"] > 0
    assert spent["decode"] + spent["read"] <= 2 * elapsed, "two threads"
