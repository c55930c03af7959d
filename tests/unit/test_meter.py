"""What a log line says; the clock is a script, everything else is real."""

from collections.abc import Iterator

import pytest
import torch

from training import meter, recipes
from training.meter import Meter, Step, log_line, measured_peak, training_flops
from training.network import build_model

CPU = torch.device("cpu")
TRAINED = {
    "epoch": 1.5,
    "loss": 2.25,
    "top1": 0.5,
    "top5": 0.75,
    "lr": 0.01,
    "grad_norm": 1.234,
    "images_per_second": 99.6,
    "step_images_per_second": 120.4,
    "data_wait": 0.02,
    "eta_seconds": 61.0,
    "sample_digest": float(0xAB12),
    "progress": 0.25,
}


def step(loss: float = 2.0, images: int = 4, norm: float = 1.0) -> Step:
    sums = torch.tensor([loss * images, 1, 3, images, norm], dtype=torch.float64)
    return Step(sums, None)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The instants that the meter reads, one after another."""
    instants: list[float] = []
    monkeypatch.setattr(meter.time, "perf_counter", lambda: instants.pop(0))
    yield instants
    assert instants == [], "looked at the clock less often"


def one_step(measured: Meter, what: Step) -> None:
    measured.data_arrived()
    measured.data_copied()
    measured.add(what)


def test_time_is_waiting_copying_or_computing_and_the_runs_first_step_does_not_count(at):
    at += [0.0, 0.0]  # start
    measured = Meter(CPU)
    at += [50.0, 51.0, 60.0]  # the first step, slow as first steps are
    one_step(measured, step())
    at += [61.0, 63.0, 70.0]  # waits 1, copies 2, computes 7
    one_step(measured, step())
    at += [70.5, 71.0, 80.0]  # waits 0.5, copies 0.5, computes 9
    one_step(measured, step())
    at += [81.0, 81.0, 81.0]  # read, then start
    metrics = measured.read(1).metrics
    assert metrics["utilization"] == pytest.approx(16 / 20)
    assert metrics["data_wait"] == pytest.approx(1.5 / 20)
    assert metrics["data_copy"] == pytest.approx(2.5 / 20)
    assert metrics["step_images_per_second"] == pytest.approx(8 / 20)
    assert metrics["images_per_second"] == pytest.approx(12 / 81)
    assert (metrics["seconds"], metrics["steps"]) == (81.0, 3.0)


def test_what_happens_between_steps_is_not_theirs_after_start(at):
    at += [0.0, 0.0]
    measured = Meter(CPU)
    at += [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    one_step(measured, step())
    first = measured.read(1).metrics
    assert first["step_images_per_second"] == 4 and "utilization" not in first, "it warms up"
    at += [100.0, 100.0]  # a checkpoint of 99 seconds
    measured.start()
    at += [101.0, 101.0, 102.0, 102.0, 102.0, 102.0]
    one_step(measured, step())
    metrics = measured.read(1).metrics
    assert metrics["data_wait"] == 0.5 and metrics["step_images_per_second"] == 2
    assert metrics["utilization"] == 0.5
    assert metrics["images_per_second"] == pytest.approx(4 / 101), "of the wall's clock they are"


def test_exposed_communication_is_its_share_of_all_time(at, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda both: both.mul_(2))  # a twin rank
    at += [0.0, 0.0]
    measured = Meter(CPU)
    at += [0.0, 0.0, 10.0, 11.0, 11.0, 11.0]
    one_step(measured, Step(step().sums, (7.0, 9.5)))
    metrics = measured.read(2).metrics
    assert metrics["exposed_communication"] == 0.25
    assert metrics["step_images_per_second"] == 0.8, "of both ranks"
    assert metrics["images_per_second"] == 8 / 11
    assert metrics["grad_norm"] == 1.0 and metrics["loss"] == 2.0


def test_sums_become_means_over_images_and_each_step_keeps_its_loss():
    measured = Meter(CPU)
    one_step(measured, step(loss=1.0, images=3, norm=2.0))
    one_step(measured, step(loss=float("inf"), images=1, norm=4.0))
    reading = measured.read(1)
    assert reading.losses == [1.0, float("inf")] and reading.grad_norms == [2.0, 4.0]
    assert reading.metrics["top1"] == 2 / 4 and reading.metrics["top5"] == 6 / 4
    assert reading.metrics["grad_norm"] == 3.0


def test_a_log_line_is_words_with_an_equals_sign():
    assert log_line(TRAINED, 7) == (
        "step=7 epoch=1.50 loss=2.2500 top1=0.500 lr=0.01000 img/s=100 eta=1:01"
    )
    more = {"utilization": 0.97, "exposed_communication": 0.011, "mfu": 0.4321}
    line = log_line(TRAINED | more | {"gpu_memory_gb": 3.14}, 7)
    assert " mfu=43.2% eta=" in line and line.count("=") == 8


# Operations and the peak


@pytest.mark.parametrize(("recipe", "groups"), [("baseline", 1), ("paper", 2), ("fast", 1)])
def test_operations_are_those_of_the_layers_three_times_less_the_images_gradient(recipe, groups):
    with torch.device("meta"):
        model = build_model(recipes.RECIPES[recipe](), 1000)
    layers = [
        55**2 * 11**2 * 3 * 96,  # side of the output, kernel, input and output channels
        27**2 * 5**2 * 96 * 256 // groups,
        13**2 * 3**2 * 256 * 384,
        13**2 * 3**2 * 384 * 384 // groups,
        13**2 * 3**2 * 384 * 256 // groups,
        *(6 * 6 * 256 * 4096, 4096 * 4096, 4096 * 1000),
    ]
    assert training_flops(model) == 2 * (3 * sum(layers) - layers[0])


def test_peak_is_that_of_a_matrix_product_and_moves_no_random_numbers():
    before = torch.random.get_rng_state()
    assert 1e7 < measured_peak(torch.device("cpu"), torch.float32, side=256) < 1e15
    assert torch.equal(torch.random.get_rng_state(), before)
