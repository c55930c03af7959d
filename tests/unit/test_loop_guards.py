"""When a run ends early and what it says then; which bottleneck a warning names."""

import logging
import math
import time
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from shard_sets import write_shard_set
from small_training import fit, small_config
from torch import nn

from training import guards
from training.guards import TrainingStopped, check_losses, check_weights, starved
from training.meter import Reading


def reading(*losses: float, norms: tuple[float, ...] = ()) -> Reading:
    return Reading(
        {"loss": sum(losses) / len(losses)}, [*losses], [*(norms or [1.0] * 9)][: len(losses)]
    )


def check(what: Reading, step: int, lowest: float = math.inf, **changes: Any) -> float:
    return check_losses(
        what,
        lowest,
        step=step,
        config=small_config(**changes),
        num_classes=1000,
        ids_of=lambda number: np.arange(100 * number, 100 * number + 12),
    )


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_first_broken_step_of_a_reading_is_named_with_its_samples(broken):
    with pytest.raises(TrainingStopped) as stopped:
        check(reading(6.9, 6.8, broken, math.nan), step=40, optim_lr=0.5)
    assert str(stopped.value).startswith(
        f"loss is {broken} at step 39 (batch of 12 samples, ids "
        "3900, 3901, 3902, 3903, 3904, 3905, 3906, 3907, …); train again under another --name "
    )
    assert "lower --optim.lr (now 0.5)" in str(stopped.value)


def test_gradient_that_is_not_finite_stops_before_the_loss_shows_it():
    with pytest.raises(TrainingStopped, match=r"gradient norm is inf at step 2 \("):
        check(reading(6.9, 6.8, norms=(1.0, math.inf)), step=2)


def test_lowest_loss_is_kept_and_a_flat_one_stops_at_its_patience():
    assert check(reading(6.9, 6.7), step=99, flat_loss_steps=100) == pytest.approx(6.8)
    assert check(reading(7.0), step=100, lowest=6.8, flat_loss_steps=100) == 6.8
    for patience, synthetic in ((0, False), (100, True)):
        check(reading(6.9), step=100, flat_loss_steps=patience, synthetic=synthetic)
    with pytest.raises(TrainingStopped, match=r"in 100 steps, guessing gives 6.908 \(last: batch"):
        check(reading(6.9), step=100, flat_loss_steps=100)


def test_weights_that_are_not_finite_are_not_saved():
    model = nn.Linear(3, 2)
    check_weights(model, 5, small_config())
    with torch.no_grad():
        model.bias[1] = math.nan
    with pytest.raises(TrainingStopped, match="weights are not finite after step 5; train again"):
        check_weights(model, 5, small_config())


@pytest.mark.parametrize(
    ("wait", "copy", "spent", "cause"),
    [
        (0.1, 0.3, {"wait": 1.0, "read": 0.0, "decode": 0.0}, "copying images to the device"),
        (0.4, 0.0, {"wait": 4.0, "read": 9.0, "decode": 2.0}, "the store"),
        (0.4, 0.0, {"wait": 4.0, "read": 2.0, "decode": 9.0}, "decoding"),
        (0.4, 0.0, {"wait": 0.1, "read": 2.0, "decode": 9.0}, "the loop itself"),
        (0.0, 0.0, {"wait": 0.0, "read": 2.0, "decode": 9.0}, "the loop itself"),
    ],
)
def test_starved_accelerator_is_told_with_its_cause(wait, copy, spent, cause):
    used = 1 - (wait + copy or 0.5)  # a GPU that idles between the kernels of its steps
    metrics = {"utilization": used, "data_wait": wait, "data_copy": copy, "seconds": 10}
    said = starved(metrics, spent)
    assert said is not None
    assert f"waits for {cause}" in said and f"computes for {used:.0%}" in said


def test_busy_or_unmeasured_accelerator_is_not_complained_about():
    times = {"data_wait": 0.1, "data_copy": 0.0, "seconds": 10.0}
    spent = {"wait": 1.0, "read": 1.0, "decode": 1.0}
    assert starved(times | {"utilization": 0.9}, spent) is None
    assert starved(times, spent) is None
    assert starved(times | {"utilization": 0.899}, spent) is not None


def test_slow_decoder_is_named_once_in_a_run(tmp_path, monkeypatch, caplog):
    uri = write_shard_set(tmp_path / "set", train=(12,), val=(2,))
    decode = simplejpeg.decode_jpeg

    def slowly(*args: Any, **rest: Any) -> Any:
        time.sleep(0.05)
        return decode(*args, **rest)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", slowly)
    with caplog.at_level(logging.WARNING, "training"):
        run = fit(small_config(optim_batch_size=4), uri)
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "waits for decoding; try --cache decoded" in said[0]
    late = [metrics for _, metrics in run.logged if "utilization" in metrics]
    assert len(late) == 5, "all lines but that of the first step"
    assert any(metrics["utilization"] < guards._USEFUL_UTILIZATION for metrics in late)
