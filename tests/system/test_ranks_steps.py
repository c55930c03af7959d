"""One step over two and three processes: gradients, compressed ones, batch norm, who may save."""

import time
from typing import Any

import pytest
import torch
from ranks import run_ranks
from small_training import CPU, small_config, without_dropout

from alexnet.optim import Rates
from training import guards
from training.guards import Requests
from training.meter import GRAD_NORM, IMAGES, LOSS
from training.network import build_model
from training.order import rank_part
from training.steps import Place, Stepper

BATCH = 7  # neither 2 nor 3 divide it


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, 227, 227, generator=generator), torch.arange(BATCH) % 4


def stepped(place: Place, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """What one step of this rank's part leaves; no decay, so that the momentum is the gradient."""
    config = small_config(optim_weight_decay=0.0, **changes)
    stepper = Stepper(config, build_model(config, 4).to(dtype), place)
    images, labels = batch()
    images = images.to(dtype)
    ids = torch.from_numpy(rank_part(torch.arange(BATCH).numpy(), place.rank, place.world_size))
    rates = Rates(0.01, 0.01, 0.01, 0.01)
    step = stepper.step(images[ids], labels[ids], number=0, rates=rates, global_size=BATCH)
    first, last = step.communication or (0.0, 0.0)
    return {
        "gradients": stepper.tensors()["optimizer"],
        "buffers": dict(stepper.model.named_buffers()),
        "sums": step.sums,
        "exposed": last - first,
    }


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    without_dropout(setattr)
    place = Place(CPU, rank=rank, world_size=world_size)
    setattr(guards, "_NOTICE_SECONDS", 0.0 if rank == 0 else 1e9)  # noqa: B010  rank 0's clock
    last = lambda: rank == world_size - 1  # noqa: E731
    asked = {
        "rank 0 late": Requests(1e-9 if rank == 0 else None, place),
        "others late": Requests(None if rank == 0 else 1e-9, place),
        "last noticed": Requests(None, place, preempted=last),
        "last stopped": Requests(None, place, stopping=last),
        "nobody": Requests(60.0, place, stopping=lambda: False, preempted=lambda: False),
    }
    return {
        "looks": looks(place),
        "plain": stepped(place),
        "double": stepped(place, torch.float64),
        "compressed": stepped(place, compress_gradients=True),
        "normed": stepped(place, model_batch_norm=True),
        "requests": {
            name: (requests.made(1), requests.made(2), requests.late())
            for name, requests in asked.items()
        },
    }


def looks(place: Place) -> list[int]:
    """After which of 12 steps, in which rank 0 is the slowest, somebody asks whether to stop."""
    asked: list[int] = []

    def stopping() -> bool:
        asked.append(step)
        return False

    requests = Requests(None, place, stopping=stopping)
    for step in range(1, 13):
        time.sleep(0.15 if place.rank == 0 else 0)
        assert requests.made(step) == (False, False)
    return asked


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return run_ranks([3, 2], on_rank, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        without_dropout(patch.setattr)
        place = Place(CPU)
        return {"double": stepped(place, torch.float64), "plain": stepped(place)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_of_uneven_parts_are_those_of_the_whole_batch(ranks, alone, world_size):
    """In float64 within 1e-6 of each tensor's largest; in float32, whose sums of thousands of
    products depend on their order by more, within 1e-6."""
    for rank in ranks[world_size]:
        for what, unit in (("double", True), ("plain", False)):
            gradients = alone[what]["gradients"]
            assert rank[what]["gradients"].keys() == gradients.keys()
            for name, expected in gradients.items():
                error = (rank[what]["gradients"][name] - expected).abs().max()
                assert error < 1e-6 * (expected.abs().max() if unit else 1), f"{what} {name}"


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_of_the_parts_are_those_of_the_batch(ranks, alone, world_size):
    sums = torch.stack([rank["plain"]["sums"] for rank in ranks[world_size]])
    assert sums[:, IMAGES].sum() == BATCH and len(set(sums[:, IMAGES].tolist())) == 2
    torch.testing.assert_close(sums[:, LOSS].sum(), alone["plain"]["sums"][LOSS], rtol=1e-6, atol=0)
    gradients = alone["plain"]["gradients"].values()
    norm = torch.sqrt(sum((gradient.double() ** 2).sum() for gradient in gradients))
    for row in (*sums, alone["plain"]["sums"]):
        torch.testing.assert_close(row[GRAD_NORM], norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_compressed_gradients_lose_what_bfloat16_loses(ranks, alone, world_size):
    first, *others = (rank["compressed"]["gradients"] for rank in ranks[world_size])
    for name, expected in alone["plain"]["gradients"].items():
        found = first[name]
        assert found.dtype == torch.float32
        assert torch.equal(found, found.bfloat16().float()), "sent as bfloat16"
        error = (found - expected).abs().max() / expected.abs().max()
        assert 0 < error < 2**-6, f"{name}: {error:.1e}"
        assert all(torch.equal(other[name], found) for other in others), "ranks differ"


@pytest.mark.parametrize("world_size", [2, 3])
def test_running_statistics_are_the_means_over_all_ranks(ranks, world_size):
    own = []  # what each rank's part alone would leave
    images, _ = batch()
    with pytest.MonkeyPatch.context() as patch:
        without_dropout(patch.setattr)
        for rank in range(world_size):
            model = build_model(small_config(model_batch_norm=True), 4)
            model(images[rank::world_size].contiguous(memory_format=torch.channels_last))
            own.append(dict(model.named_buffers()))
    for rank in ranks[world_size]:
        for name, found in rank["normed"]["buffers"].items():
            if name.endswith("num_batches_tracked"):
                assert found == 1
            else:
                mean = torch.stack([buffers[name] for buffers in own]).mean(0)
                torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_stop_and_save_by_the_clock_of_the_first_or_a_request_to_any(ranks, world_size):
    """(stop, save) after two steps, and whether it is late. Notices are asked for from the second
    on, when rank 0's clock has told all of them to."""
    nothing, save, stop = (False, False), (False, True), (True, False)
    for rank in ranks[world_size]:
        assert rank["requests"] == {
            "rank 0 late": (save, save, True),
            "others late": (nothing, nothing, False),
            "last noticed": (nothing, save, False),
            "last stopped": (stop, stop, False),
            "nobody": (nothing, nothing, False),
        }


def test_communication_is_measured_where_there_are_others(ranks, alone):
    assert alone["plain"]["exposed"] == 0
    for world_size in (2, 3):
        assert all(rank["plain"]["exposed"] > 0 for rank in ranks[world_size])


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_meet_at_the_pace_of_the_first(ranks, world_size):
    first, *others = [rank["looks"] for rank in ranks[world_size]]
    assert all(asked == first for asked in others)
    assert first[:2] == [1, 2] and len(first) < 12
