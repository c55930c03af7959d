"""The optimiser against NumPy, the schedules against golden values."""

import math

import pytest
import torch
from torch import nn

from alexnet.model import AlexNet
from alexnet.optim import Rates, set_rates, sgd, step_decay, warmup_cosine

MOMENTUM, DECAY = 0.9, 5e-4


def optimizer_of(model: nn.Module, **changes: float) -> torch.optim.SGD:
    return sgd(model, **({"momentum": MOMENTUM, "weight_decay": DECAY} | changes))


def test_groups_hold_each_parameter_once_and_only_weights_decay():
    model = AlexNet(num_classes=3, width=1 / 16)
    groups = {group["rate"]: group for group in optimizer_of(model).param_groups}
    assert set(groups) == {"weights", "biases", "conv1_weights", "conv1_biases"}
    listed = sorted(id(p) for group in groups.values() for p in group["params"])
    assert listed == sorted(id(p) for p in model.parameters())
    for rate, group in groups.items():
        weights = rate.endswith("weights")
        assert {p.ndim > 1 for p in group["params"]} == {weights}
        assert group["weight_decay"] == (DECAY if weights else 0.0)
    for rate, parameter in (("weights", model.conv1.weight), ("biases", model.conv1.bias)):
        assert [id(p) for p in groups[f"conv1_{rate}"]["params"]] == [id(parameter)]


def test_parameters_of_normalisation_learn_and_do_not_decay_like_biases():
    model = AlexNet(num_classes=3, width=1 / 16, batch_norm=True)
    groups = {group["rate"]: group for group in optimizer_of(model).param_groups}
    norms = {id(p) for name, p in model.named_parameters() if p.ndim == 1}
    assert {id(p) for p in groups["biases"]["params"]} == norms
    assert set(groups) == {"weights", "biases", "conv1_weights"}  # no bias before a norm


def test_each_group_gets_the_rate_that_it_is_named_by():
    optimizer = optimizer_of(AlexNet(num_classes=3, width=1 / 16))
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    set_rates(optimizer, Rates(weights=1, biases=2, conv1_weights=3, conv1_biases=4))
    found = {group["rate"]: group["lr"] for group in optimizer.param_groups}
    assert found == {"weights": 1, "biases": 2, "conv1_weights": 3, "conv1_biases": 4}


def test_the_fused_kernel_is_used_on_the_cpu_and_not_where_there_is_none():
    assert optimizer_of(nn.Linear(2, 2)).defaults["fused"] is True
    assert optimizer_of(nn.Linear(2, 2, device="meta")).defaults["fused"] is False


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = optimizer_of(model).param_groups
    assert group["params"] == [model.weight]


def test_step_decay_follows_the_published_schedule():
    steps_per_epoch = 10_009
    first_epochs = {0: 1e-2, 24: 1e-2, 25: 1e-3, 50: 1e-3, 51: 1e-4, 78: 1e-4, 79: 1e-5, 90: 1e-5}
    for epoch, lr in first_epochs.items():
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
            multiplier = step_decay(step, steps_per_epoch, (25, 51, 79))
            assert 0.01 * multiplier == pytest.approx(lr, rel=1e-12)


def test_step_decay_takes_no_milestones():
    assert step_decay(10**9, 10, ()) == 1


def test_warmup_rises_in_equal_steps_to_the_full_rate():
    assert [warmup_cosine(step, 100, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_from_one_through_one_half_to_zero():
    assert warmup_cosine(10, 110, 10) == 1
    assert warmup_cosine(35, 110, 10) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert warmup_cosine(60, 110, 10) == pytest.approx(0.5)
    assert warmup_cosine(110, 110, 10) == 0
    assert warmup_cosine(500, 110, 10) == 0
    falling = [warmup_cosine(step, 110, 10) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_without_warmup_or_without_decay():
    assert warmup_cosine(0, 1, 0) == 1
    assert warmup_cosine(4, 5, 5) == 1
