"""Shards on disk that are not, or no longer, what the manifest says: one line, no wrong pixels;
and when they are opened and closed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from shard_sets import SIZES, assert_equal_to_tars, open_loader, write_shard_set

from alexnet.errors import UserError
from training.order import epoch_order, global_batch, rank_part, steps_per_epoch
from training.shard_files import ShardUses


@pytest.fixture
def own_set(tmp_path: Path) -> Path:
    return Path(write_shard_set(tmp_path / "own", train=SIZES, val=(3,)))


def told_by(loader, ids: list[int]) -> str:
    with pytest.raises(UserError) as told:
        loader.read(np.array(ids))
    assert "\n" not in str(told.value)
    assert "verify --repair" in str(told.value)
    return str(told.value)


def test_shards_that_are_done_with_are_closed_and_others_are_not(own_set):
    order = [[0], [5], [1], [6], [14], [13], [12], [11], [10]]  # shards 0, 1, 0, 1, 2, 2, ...
    with open_loader(own_set, threads=3) as loader:
        batches = loader.batches([np.array(ids) for ids in order])
        open_at = []
        for ids in order:
            assert next(batches).sample_ids.tolist() == ids
            open_at.append(sorted(int(name[-1]) for name in loader._files._shards))
        batches.close()
        assert open_at == [[0, 1, 2]] * 3 + [[1, 2]] + [[2]] * 5, "done with when it came itself"
        assert not loader._files._shards


def test_descriptors_of_shards_are_closed_with_the_loader(own_set):
    def open_tars() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(os.path.realpath(link).startswith(f"{own_set}/train-") for link in links)

    with open_loader(own_set) as loader:
        loader.read(np.arange(15))
        assert open_tars() == 3
    assert open_tars() == 0


def test_missing_shard_is_told_in_one_line(own_set):
    (own_set / "train-000001.tar").unlink()
    with open_loader(own_set) as loader:
        told = told_by(loader, [6])
    assert "train-000001.tar cannot be read (No such file" in told


@pytest.mark.parametrize("change", [-100, 512])
def test_shard_of_another_size_than_promised_is_refused(own_set, change):
    path = own_set / "train-000002.tar"
    size = path.stat().st_size
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with open_loader(own_set) as loader:
        told = told_by(loader, [0, 14])
    assert f"has {size + change} bytes with sha256" in told and f"manifest says {size} " in told


def test_shard_of_the_right_size_with_other_bytes_is_refused(own_set):
    path = own_set / "train-000002.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with open_loader(own_set) as loader:
        told = told_by(loader, [14])
    assert f"train-000002.tar has {len(data)} bytes with sha256" in told


def test_shard_overwritten_in_place_under_the_run_stops_it_before_any_wrong_pixel(own_set):
    path = own_set / "train-000000.tar"
    with open_loader(own_set) as loader:
        loader.read(np.array([0, 1]))
        data = path.read_bytes()
        other = (own_set / "train-000002.tar").read_bytes()[: len(data)]
        with path.open("r+b") as file:
            file.write(other.ljust(len(data), b"\0"))
        told = told_by(loader, [0, 1])
        assert "train-000000.tar was changed under the run" in told
        path.write_bytes(data)  # repaired: the same run can go on
        assert_equal_to_tars(own_set, loader, "train", [0, 1])


def test_shard_cut_short_under_the_run_is_an_error_and_no_signal(own_set):
    path = own_set / "train-000000.tar"
    with open_loader(own_set) as loader:
        loader.read(np.array([4]))
        os.truncate(path, 1000)
        told = told_by(loader, [4])
        assert "was changed under the run" in told


def test_old_time_stamps_do_not_hide_a_change(own_set):
    path = own_set / "train-000000.tar"
    with open_loader(own_set) as loader:
        loader.read(np.array([0]))
        before = path.stat()
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert "changed under the run" in told_by(loader, [0])


def test_open_shard_that_is_deleted_renamed_or_touched_goes_on_with_its_own_bytes(own_set):
    copy = own_set.parent / "copy"
    shutil.copytree(own_set, copy)
    with open_loader(own_set) as loader:
        loader.read(np.arange(15))
        (own_set / "train-000000.tar").unlink()
        (own_set / "train-000001.tar").rename(own_set / "elsewhere.tar")
        os.utime(own_set / "train-000002.tar")
        assert_equal_to_tars(copy, loader, "train", [14, 0, 5, 9, 2])


def test_shard_replaced_while_it_was_not_open_is_hashed_again(own_set):
    path = own_set / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with open_loader(own_set) as loader:
        loader.read(np.array([0]))
        loader.read(np.array([14]))  # closes the first one
        path.write_bytes(data)
        assert "bytes with sha256" in told_by(loader, [0])


# Which shards the batches to come need

TWENTY = [100] * 20
NAMES = [f"train-{number:06d}" for number in range(20)]


def batches_of_shards(
    batch_size: int, rank: int = 0, world_size: int = 1, window: int = 8
) -> list[np.ndarray]:
    order = epoch_order(TWENTY, seed=1, epoch=0, window=window)
    steps = steps_per_epoch(len(order), batch_size)
    return [
        rank_part(global_batch(order, step, steps), rank, world_size) // 100
        for step in range(steps)
    ]


def test_every_batch_finds_its_shards_kept_and_later_ones_ahead():
    for world_size, window in ((1, 8), (3, 8), (1, 3)):
        batches = batches_of_shards(32, 0, world_size, window)
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
