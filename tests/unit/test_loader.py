"""What the loader hands over is what lies in the tars; shards that are not, or no longer, what the
manifest says are one line and no wrong pixels."""

import hashlib
import json
import os
import re
import shutil
import tarfile
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from shard_sets import SIZES, assert_equal_to_tars, decoded, open_loader, write_shard_set

from alexnet.errors import UserError
from training.order import epoch_order, global_batch, rank_part, steps_per_epoch
from training.shard_files import ShardUses

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("loader") / "set", train=SIZES, val=(3,))


@pytest.fixture
def own_set(tmp_path: Path) -> Path:
    """A set that a test may damage."""
    return Path(write_shard_set(tmp_path / "own", train=SIZES, val=(3,)))


def promise(folder: Path, **changes: object) -> None:
    """Lets the manifest say something else about the first shard."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    row = next(row for row in document["shards"] if row["name"] == "train-000000")
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


def test_batches_come_in_the_order_asked_for_also_empty_ones(uri):
    wanted = [[3, 1], [], [14, 13, 12], [2], [4], [6], [8], [10]]
    with open_loader(uri) as loader:
        batches = loader.batches([np.array(ids, np.int64) for ids in wanted])
        assert [batch.sample_ids.tolist() for batch in batches] == wanted


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


def test_only_a_few_batches_are_begun_ahead_of_the_consumer(uri):
    with (
        open_loader(uri) as loader,
        mock.patch.object(loader, "_begin", wraps=loader._begin) as begun,
    ):
        batches = loader.batches([np.array([i]) for i in range(15)])
        next(batches)
        assert begun.call_count == 4, "one taken, three on their way"


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


def test_bytes_that_do_not_decode_name_their_sample_and_shard(own_set):
    path = own_set / "train-000000.tar"
    with tarfile.open(path) as tar:
        member = next(m for m in tar.getmembers() if m.name == "train_0002.jpg")
    data = bytearray(path.read_bytes())
    data[member.offset_data : member.offset_data + 400] = b"\0" * 400
    path.write_bytes(data)
    promise(own_set, sha256=hashlib.sha256(data).hexdigest())
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
    promise(own_set, samples=6)
    with pytest.raises(UserError, match=r"has 15 rows, its manifest promises 16; run `python -m "):
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


def test_no_thread_is_left_after_an_early_leave_or_an_error(own_set):
    many = [np.array([i % 15]) for i in range(60)]
    with open_loader(own_set) as loader:
        batches = loader.batches(many)
        next(batches)
        assert threads_of_loaders()
        batches.close()
    assert threads_of_loaders() == []
    (own_set / "train-000000.tar").unlink()
    with open_loader(own_set) as loader, pytest.raises(UserError):
        list(loader.batches(many))
    assert threads_of_loaders() == []


# Shards on disk


def told_by(loader, ids: list[int]) -> str:
    with pytest.raises(UserError) as told:
        loader.read(np.array(ids))
    assert "\n" not in str(told.value)
    assert "verify --repair" in str(told.value)
    return str(told.value)


def spoiled(path: Path, at: int = -1) -> bytes:
    """The shard with one bit turned, written in place."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    return data


def test_shards_that_are_done_with_are_closed_and_others_are_not(own_set):
    def open_now() -> list[int]:
        links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        return sorted(int(link[-5]) for link in links if link.startswith(f"{own_set}/train-"))

    order = [[0], [5], [1], [6], [14], [13], [12], [11], [10]]  # shards 0, 1, 0, 1, 2, 2, ...
    with open_loader(own_set, threads=3) as loader:
        batches = loader.batches([np.array(ids) for ids in order])
        open_at = []
        for ids in order:
            assert next(batches).sample_ids.tolist() == ids
            open_at.append(open_now())
        batches.close()
        assert open_at[0] == [0, 1, 2] and open_at[-1] == [2], "done with when it came itself"
        loader.read(np.arange(15))
        assert open_now() == [0, 1, 2]
    assert open_now() == []


@pytest.mark.parametrize("change", ["cut", "longer", "one bit", "gone"])
def test_shard_that_is_not_what_was_promised_is_refused(own_set, change):
    path = own_set / "train-000002.tar"
    size, data = path.stat().st_size, spoiled(path)
    contents = {"cut": data[:-100], "longer": data + bytes(512), "one bit": data}
    if change == "gone":
        path.unlink()
        told = r"train-000002\.tar cannot be read \(No such file"
    else:
        path.write_bytes(contents[change])
        told = rf"has {len(contents[change])} bytes with sha256 .* manifest says {size} "
    with open_loader(own_set) as loader:
        assert re.search(told, told_by(loader, [0, 14]))


@pytest.mark.parametrize("change", ["overwritten", "cut", "one bit with the old time stamps"])
def test_shard_changed_in_place_under_the_run_stops_it_before_any_wrong_pixel(own_set, change):
    path = own_set / "train-000000.tar"
    data, before = path.read_bytes(), path.stat()
    with open_loader(own_set) as loader:
        loader.read(np.array([0, 4]))
        if change == "overwritten":
            other = (own_set / "train-000002.tar").read_bytes()[: len(data)]
            path.write_bytes(other.ljust(len(data), b"\0"))
        elif change == "cut":
            os.truncate(path, 1000)  # an error and no signal
        else:
            spoiled(path, at=700)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert "train-000000.tar was changed under the run" in told_by(loader, [0, 4])
        path.write_bytes(data)  # repaired: the same run can go on
        assert_equal_to_tars(own_set, loader, "train", [0, 4])


def test_open_shard_that_is_deleted_renamed_or_touched_goes_on_with_its_own_bytes(own_set):
    copy = shutil.copytree(own_set, own_set.parent / "copy")
    with open_loader(own_set) as loader:
        loader.read(np.arange(15))
        (own_set / "train-000000.tar").unlink()
        (own_set / "train-000001.tar").rename(own_set / "elsewhere.tar")
        os.utime(own_set / "train-000002.tar")
        assert_equal_to_tars(copy, loader, "train", [14, 0, 5, 9, 2])


def test_shard_replaced_while_it_was_not_open_is_hashed_again(own_set):
    path = own_set / "train-000000.tar"
    with open_loader(own_set) as loader:
        loader.read(np.array([0]))
        loader.read(np.array([14]))  # closes the first one
        spoiled(path)
        assert "bytes with sha256" in told_by(loader, [0])


# Which shards the batches to come need

NAMES = [f"train-{number:06d}" for number in range(20)]


def test_every_batch_finds_its_shards_kept_and_later_ones_ahead():
    for world_size, window in ((1, 8), (3, 8), (1, 3)):
        order = epoch_order([100] * 20, seed=1, epoch=0, window=window)
        steps = steps_per_epoch(len(order), 32)
        whole = [global_batch(order, step, steps) for step in range(steps)]
        batches = [rank_part(ids, 0, world_size) // 100 for ids in whole]
        numbers = np.repeat(np.arange(len(batches)), [len(shards) for shards in batches])
        first = {NAMES[s]: n for n in reversed(range(len(batches))) for s in batches[n]}
        plan = ShardUses(np.concatenate(batches), numbers, NAMES, window)
        for number, shards in enumerate(batches):
            keep, ahead = plan.advance(number)
            rest = {NAMES[shard] for shard in np.concatenate(batches[number:])}
            assert {NAMES[shard] for shard in shards} <= set(keep)
            assert set(keep) <= rest and set(ahead) <= rest, "what nobody needs is neither"
            assert not set(keep) & set(ahead)
            assert len(keep) <= 2 * window and len(ahead) <= window
            later = sorted(first[name] for name in rest - set(keep))
            assert [first[name] for name in ahead] == later[:window]
