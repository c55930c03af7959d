"""Batches on their way to a device: nothing waits between two log lines, and nothing is mixed up.

On a stand-in device, which lists what would block a GPU; where there is a GPU, on that too.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import stand_in
import torch
from shard_sets import write_shard_set
from small_training import CPU, Record, fit, small_config
from torch import Tensor, nn

from alexnet.model import ResponseNorm
from pipelines.shards import load_manifest
from training import evaluate, loop
from training.loader import Loader
from training.meter import Meter, Reading
from training.order import epoch_order, global_batch, rank_part
from training.steps import Place
from training.transfer import sent

TRAIN = (10, 9, 9)  # 4 steps of 7


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shard_set(tmp_path_factory.mktemp("transfer") / "set", train=TRAIN)


def watched(uri: str, device: torch.device, told: Callable[..., object], **changes: Any) -> None:
    """An epoch with a log line every two steps, of which `told` gets metrics and step."""
    config, place = small_config(log_steps=2, optim_epochs=1, **changes), Place(device, threads=2)
    loop.fit(config, uri, load_manifest(uri), place, log=told, report=Record().report)


def blocked(uri: str, **changes: Any) -> list[Counter[str]]:
    """What would block the stand-in before each log line, that of its own reading included."""
    before: list[Counter[str]] = []

    def told(*_: object) -> None:
        before.append(Counter(found))
        found.clear()

    with stand_in.blocking() as found:
        watched(uri, stand_in.DEVICE, told, **changes)
    return before


READING = {"new_tensor in training/meter.py:read": 1, "tolist in training/meter.py:read": 1}
COUNTING = {
    "_to_copy in training/evaluate.py:evaluate": 1,
    "_local_scalar_dense in training/evaluate.py:evaluate": 2,
    "tolist in training/evaluate.py:evaluate": 1,
}
LARS = {"optim_rule": "lars", "optim_ema_decay": 0.9, "model_batch_norm": True}


KINDS = [{}, LARS, {"optim_rule": "paper"}, {"synthetic": True}]


@pytest.mark.parametrize("changes", KINDS)
def test_no_step_and_no_batch_of_an_evaluation_waits(uri, monkeypatch, changes):
    monkeypatch.setattr(evaluate, "_GPU_BATCH", 4)
    _, steps, evaluation = blocked(uri, **changes)
    assert steps == READING, "the second two steps, and the line after them"
    assert evaluation == COUNTING, "four batches, and what is read at their end"


@pytest.mark.parametrize(
    ("wait", "listed"),
    [
        (lambda x: x + torch.tensor(0.0, device=x.device), "tensor"),
        (lambda x: x + torch.zeros(()).to(x.device, non_blocking=True), "_to_copy"),
        (lambda x: x.mul_(bool(x.max() > -1)), "_local_scalar_dense"),
        (lambda x: x.copy_(torch.ones(x.shape)), "copy_"),
    ],
)
def test_a_step_that_waits_is_listed(uri, monkeypatch, wait, listed):
    view = loop.train_view
    monkeypatch.setattr(loop, "train_view", lambda *args: wait(view(*args)))
    _, steps, _ = blocked(uri)
    assert steps - Counter(READING) == {f"{listed} in training/loop.py:train_step": 2}


def test_batches_arrive_whole_in_order_and_each_with_its_own_draws(uri):
    order = epoch_order(TRAIN, seed=0, epoch=0)
    ids = [rank_part(global_batch(order, number, 9), 1, 2) for number in range(9)]

    def draw(sample_ids: Tensor) -> Tensor:
        return 2.0 * sample_ids

    with Loader(uri, load_manifest(uri), "train", threads=2) as loader:
        plain = list(sent(loader, ids, CPU, draw))
        with stand_in.blocking() as found:
            there = [arriving.received() for arriving in sent(loader, ids, stand_in.DEVICE, draw)]
        assert found == [] and len(plain) == len(there) == 9
        for expected, tensors, part in zip(plain, there, ids, strict=True):
            assert expected.batch.sample_ids.tolist() == part.tolist()
            assert tensors[2].held.tolist() == [2.0 * number for number in part]
            for here, value in zip(expected.received(), tensors, strict=True):
                assert torch.equal(here, value.held) and here.stride() == value.stride()
        assert [len(a.received()) for a in sent(loader, ids, CPU)] == [2] * 9


def test_a_run_on_the_stand_in_learns_what_the_cpu_does(uri):
    there = Place(stand_in.DEVICE, threads=2)
    with stand_in.blocking():
        found = fit(small_config(), uri, place=there)
    expected = fit(small_config(), uri)
    losses = [[m["loss"] for _, m in run.logged if "loss" in m] for run in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found.result == pytest.approx(expected.result, rel=1e-5)


def deterministic(uri: str, variant: str) -> Record:
    with stand_in.blocking():
        config = small_config(deterministic=True, model_variant=variant)
        return fit(config, uri, place=Place(stand_in.DEVICE, threads=2))


@pytest.mark.parametrize("variant", ["ungrouped", "paper"])
def test_a_deterministic_run_does_nothing_that_a_gpu_would_refuse(uri, variant):
    assert deterministic(uri, variant).result["val_loss"] > 0


def test_what_a_gpu_would_refuse_of_a_deterministic_run_is_refused(uri, monkeypatch):
    monkeypatch.setattr(ResponseNorm, "forward", nn.LocalResponseNorm.forward)  # torch's own
    with pytest.raises(RuntimeError, match="avg_pool3d_backward does not have a deterministic"):
        deterministic(uri, "paper")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("changes", KINDS)
def test_no_step_and_no_batch_of_an_evaluation_waits_on_a_gpu(uri, monkeypatch, changes):
    strict = torch.cuda.set_sync_debug_mode
    read, scores = Meter.read, evaluate._scores
    steps: list[int] = []

    def reading(self: Meter, world_size: int) -> Reading:
        strict("default")
        return read(self, world_size)

    def scoring(*args: Any) -> Iterator[Any]:
        for number, found in enumerate(scores(*args)):
            strict("error" if number else "default")  # the first makes the constants
            yield found
        strict("default")

    def told(_: object, step: int) -> None:
        steps.append(step)
        strict("error" if step == 2 else "default")

    monkeypatch.setattr(Meter, "read", reading)
    monkeypatch.setattr(evaluate, "_scores", scoring)
    monkeypatch.setattr(evaluate, "_GPU_BATCH", 4)
    try:
        watched(uri, torch.device("cuda", 0), told, **changes)
    finally:
        strict("default")
    assert steps == [2, 4, 4]
