"""Two and three processes over gloo learn, measure and decide what one does."""

import itertools
import multiprocessing
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from shard_sets import write_shard_set
from small_training import CPU, evaluated, fit, seen_ids, small_config, without_dropout

from alexnet.optim import Rates
from pipelines.shards import load_manifest
from training import guards
from training.evaluate import evaluate
from training.guards import Requests
from training.loader import Loader
from training.meter import GRAD_NORM, IMAGES, LOSS
from training.network import build_model, input_spec
from training.order import rank_part
from training.steps import Place, Stepper

BATCH = 7  # which neither 2 nor 3 ranks divide
WORLDS = (3, 2)


def serve(rank: int, folder: Path, *args: Any) -> None:
    """One process is this rank of each world that has it, since importing torch takes seconds."""
    torch.set_num_threads(1)
    without_dropout(setattr)
    for world_size in (size for size in WORLDS if rank < size):
        place = Place(CPU, rank=rank, world_size=world_size)
        meeting = f"file://{folder / f'meeting-{world_size}'}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=world_size)
        found = one_step(place) | trained(place, folder / f"{world_size}-{rank}", *args)
        torch.save(found, folder / f"{world_size}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, 227, 227, generator=generator), torch.arange(BATCH) % 4


def stepped(
    place: Place, dtype: torch.dtype = torch.float32, size: int = BATCH, **changes: Any
) -> dict[str, Any]:
    """What one step of this rank's part leaves; no decay, so that the momentum is the gradient."""
    config = small_config(optim_weight_decay=0.0, **changes)
    stepper = Stepper(config, build_model(config, 4).to(dtype), place)
    images, labels = batch()
    ids = torch.from_numpy(rank_part(torch.arange(size).numpy(), place.rank, place.world_size))
    how = {"number": 0, "rates": Rates(0.01, 0.01, 0.01, 0.01), "global_size": size}
    step = stepper.step(images[ids].to(dtype), labels[ids], **how)
    first, last = step.communication or (0.0, 0.0)
    return {
        "gradients": stepper.tensors()["optimizer"],
        "buffers": dict(stepper.model.named_buffers()),
        "sums": step.sums,
        "exposed": last - first,
    }


def one_step(place: Place) -> dict[str, Any]:
    last = lambda: place.rank == place.world_size - 1  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:  # rank 0's clock alone says when to look
        patch.setattr(guards, "_NOTICE_SECONDS", 0.0 if place.rank == 0 else 1e9)
        asked = {
            "rank 0 late": Requests(1e-9 if place.rank == 0 else None, place),
            "others late": Requests(None if place.rank == 0 else 1e-9, place),
            "last noticed": Requests(None, place, preempted=last),
            "last stopped": Requests(None, place, stopping=last),
            "nobody": Requests(60.0, place, stopping=lambda: False, preempted=lambda: False),
        }
        requests = {name: (r.made(1), r.made(2), r.late()) for name, r in asked.items()}
    return {
        "requests": requests,
        "looks": looks(place),
        "plain": stepped(place),
        "double": stepped(place, torch.float64),
        "compressed": stepped(place, compress_gradients=True),
        "normed": stepped(place, model_batch_norm=True),
        "scarce": [
            stepped(place, size=1, model_batch_norm=True, model_norm_group=group)["buffers"]
            for group in (64, 0)
        ],
    }


def looks(place: Place) -> list[int]:
    """After which of 12 steps, in which rank 0 is the slowest, somebody asks whether to stop."""
    asked: list[int] = []
    requests = Requests(None, place, stopping=lambda: bool(asked.append(step)))
    for step in range(1, 13):
        time.sleep(0.05 if place.rank == 0 else 0)
        assert requests.made(step) == (False, False)
    return asked


def counted(uri: str, place: Place) -> dict[str, Any]:
    """Of an untrained network, in float64: batches of other sizes round alike."""
    manifest, config = load_manifest(uri), small_config()
    network = build_model(config, 4).double().eval()
    with Loader(uri, manifest, "val", threads=1) as loader:
        where = {"device": CPU, "rank": place.rank, "world_size": place.world_size}
        found = evaluate(
            lambda x: network(x.double()), loader, input_spec(manifest, config), **where
        )
    return asdict(found)


def trained(place: Place, keep: Path, uri: str, few: str, middle: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        steps = seen_ids(patch.setattr)
        whole = fit(small_config(), uri, keep / "whole", place=place)
        rest = fit(small_config(), uri, keep / "rest", resume=middle, place=place)
    config = small_config(model_batch_norm=True, optim_epochs=1)
    norm = fit(config, uri, keep / "norm", place=place)
    return {
        "ids": steps,
        "folders": [run.last if run.folders else None for run in (whole, rest, norm)],
        "logged": whole.logged,
        "reported": whole.reported,
        "result": norm.result,
        "counts": [counted(data, place) for data in (uri, few)],
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """28 train images, 4 steps of 7; and fewer val images than ranks."""
    folder = tmp_path_factory.mktemp("sets")
    few = write_shard_set(folder / "few", train=(1,), val=(1, 1))
    return write_shard_set(folder / "set", train=(10, 9, 9), val=(7, 6)), few


@pytest.fixture(scope="module")
def alone(sets: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process does, here."""
    keep = tmp_path_factory.mktemp("ranks") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        without_dropout(patch.setattr)
        steps = seen_ids(patch.setattr)
        run = fit(small_config(checkpoint_steps=3), sets[0], keep)
        double, plain = stepped(Place(CPU), torch.float64), stepped(Place(CPU))
    counts = [counted(uri, Place(CPU)) for uri in sets]
    return {"run": run, "ids": steps, "double": double, "plain": plain, "counts": counts}


@pytest.fixture(scope="module")
def folder(sets, alone, tmp_path_factory) -> Path:
    """The same by two and three over gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.loop", "training.evaluate", "pytest"])
    args = (folder, *sets, alone["run"].folders[3])
    processes = [context.Process(target=serve, args=(rank, *args)) for rank in range(max(WORLDS))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * max(WORLDS)
    return folder


@pytest.fixture(scope="module", params=sorted(WORLDS))
def ranks(folder: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    files = [folder / f"{request.param}-{rank}.pt" for rank in range(request.param)]
    return [torch.load(file, weights_only=False) for file in files]


def test_gradients_of_uneven_parts_are_those_of_the_whole_batch(ranks, alone):
    """In float64 within 1e-6 of each tensor's largest; in float32, whose sums of thousands of
    products depend on their order by more, within 1e-6."""
    for rank, (what, unit) in itertools.product(ranks, (("double", True), ("plain", False))):
        gradients = alone[what]["gradients"]
        assert rank[what]["gradients"].keys() == gradients.keys()
        for name, expected in gradients.items():
            error = (rank[what]["gradients"][name] - expected).abs().max()
            assert error < 1e-6 * (expected.abs().max() if unit else 1), f"{what} {name}"


def test_sums_of_the_parts_are_those_of_the_batch_and_communication_is_measured(ranks, alone):
    sums, whole = torch.stack([rank["plain"]["sums"] for rank in ranks]), alone["plain"]
    assert sums[:, IMAGES].sum() == BATCH and len(set(sums[:, IMAGES].tolist())) == 2
    torch.testing.assert_close(sums[:, LOSS].sum(), whole["sums"][LOSS], rtol=1e-6, atol=0)
    norm = torch.sqrt(sum((value.double() ** 2).sum() for value in whole["gradients"].values()))
    for row in (*sums, whole["sums"]):
        torch.testing.assert_close(row[GRAD_NORM], norm, rtol=1e-5, atol=0)
    assert whole["exposed"] == 0 and all(rank["plain"]["exposed"] > 0 for rank in ranks)


def test_compressed_gradients_lose_what_bfloat16_loses(ranks, alone):
    first, *others = (rank["compressed"]["gradients"] for rank in ranks)
    for name, expected in alone["plain"]["gradients"].items():
        found = first[name]
        assert found.dtype == torch.float32
        assert torch.equal(found, found.bfloat16().float()), "sent as bfloat16"
        error = (found - expected).abs().max() / expected.abs().max()
        assert 0 < error < 2**-6, f"{name}: {error:.1e}"
        assert all(torch.equal(other[name], found) for other in others), "ranks differ"


def left_by(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The running statistics of one process that sees these images alone."""
    model = build_model(small_config(model_batch_norm=True), 4)
    model(images.contiguous(memory_format=torch.channels_last))
    named = dict(model.named_buffers()).items()
    return {name: buffer for name, buffer in named if buffer.is_floating_point()}


def test_running_statistics_are_the_means_over_the_images_of_all_ranks(ranks, monkeypatch):
    without_dropout(monkeypatch.setattr)
    parts = [batch()[0][rank :: len(ranks)] for rank in range(len(ranks))]
    own = [left_by(part) for part in parts]
    shares = torch.tensor([len(part) / BATCH for part in parts])
    for rank in ranks:
        for name in own[0]:
            mean = torch.stack([buffers[name] for buffers in own], dim=-1) @ shares
            found = rank["normed"]["buffers"][name]
            torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-6)


def test_ranks_without_images_do_not_move_running_statistics(ranks, monkeypatch):
    without_dropout(monkeypatch.setattr)
    for name, alone in left_by(batch()[0][:1]).items():
        for found in (buffers for rank in ranks for buffers in rank["scarce"]):
            torch.testing.assert_close(found[name], alone, rtol=1e-4, atol=1e-6)


def test_all_ranks_stop_and_save_by_the_clock_of_the_first_or_a_request_to_any(ranks):
    """(stop, save) after two steps, and whether it is late. Notices are asked for from the second
    on, when rank 0's clock has told all of them to."""
    nothing, save, stop = (False, False), (False, True), (True, False)
    for rank in ranks:
        assert rank["requests"] == {
            "rank 0 late": (save, save, True),
            "others late": (nothing, nothing, False),
            "last noticed": (nothing, save, False),
            "last stopped": (stop, stop, False),
            "nobody": (nothing, nothing, False),
        }


def test_all_ranks_meet_at_the_pace_of_the_first(ranks):
    first, *others = [rank["looks"] for rank in ranks]
    assert all(asked == first for asked in others)
    assert first[:2] == [1, 2] and len(first) < 12


def test_ranks_see_between_them_what_one_process_sees(ranks, alone):
    expected = alone["ids"] + alone["ids"][3:]  # the whole, and what is resumed
    assert len(alone["ids"]) == 8 and all(len(rank["ids"]) == len(expected) for rank in ranks)
    for step, ids in enumerate(expected):
        parts = [rank["ids"][step] for rank in ranks]
        assert sorted(itertools.chain(*parts)) == sorted(ids), f"step {step}"


@pytest.mark.parametrize("number", [0, 1], ids=["whole", "resumed from one process"])
def test_ranks_learn_what_one_process_learns(ranks, alone, number):
    """Weights after 8 steps of momentum. float32 sums in another order: 1e-6 is measured."""
    found = load_file(ranks[0]["folders"][number] / "model.safetensors")
    initial = build_model(small_config(), 4).state_dict()
    for name, value in load_file(alone["run"].last / "model.safetensors").items():
        moved = (value - initial[name]).abs().max()
        difference = (found[name] - value).abs().max()
        assert difference < 2e-3 * moved, f"{name}: moved {moved:.2e}, differs {difference:.2e}"


def test_only_rank_zero_speaks_and_all_ranks_report(ranks, alone):
    first, *others = ranks
    losses = [
        [metrics["loss"] for _, metrics in logged if "loss" in metrics]
        for logged in (first["logged"], alone["run"].logged)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(folder is not None for _, folder in first["reported"])
    for rank in others:
        assert rank["logged"] == [] and rank["folders"] == [None] * 3
        assert rank["reported"] == [(metrics, None) for metrics, _ in first["reported"]]


def test_measured_is_what_is_saved_with_batch_norm_over_ranks(ranks, sets):
    """Running statistics differ by rank: all ranks must evaluate those of the checkpoint."""
    first, *others = ranks
    assert all(rank["result"] == first["result"] for rank in others)
    found = evaluated(first["folders"][2], sets[0], "val", model_batch_norm=True)
    assert found.top1 == first["result"]["val_top1"]
    assert found.loss == pytest.approx(first["result"]["val_loss"], rel=1e-5)


def test_ranks_count_every_image_once_also_where_there_are_fewer_than_ranks(ranks, alone):
    assert [found["images"] for found in alone["counts"]] == [13, 2]
    for rank in ranks:
        for found, expected in zip(rank["counts"], alone["counts"], strict=True):
            assert found == expected | {"loss": pytest.approx(expected["loss"], rel=1e-9)}
