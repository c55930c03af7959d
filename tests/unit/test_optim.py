"""Groups and rates of the optimiser, schedules against golden values, averages against NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from alexnet.model import AlexNet
from alexnet.optim import Ema, Rates, set_rates, sgd, step_decay, warmup_cosine

MOMENTUM, DECAY = 0.9, 5e-4


def optimizer_of(model: nn.Module, **changes: float) -> torch.optim.SGD:
    return sgd(model, **({"momentum": MOMENTUM, "weight_decay": DECAY} | changes))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_groups_hold_each_parameter_once_and_only_weights_decay(batch_norm):
    model = AlexNet(num_classes=3, width=1 / 16, batch_norm=batch_norm)
    groups = {group["rate"]: group for group in optimizer_of(model).param_groups}
    own_bias = [] if batch_norm else ["conv1_biases"]  # no bias before a norm
    assert set(groups) == {"weights", "biases", "conv1_weights", *own_bias}
    listed = sorted(id(p) for group in groups.values() for p in group["params"])
    assert listed == sorted(id(p) for p in model.parameters())
    for rate, group in groups.items():
        weights = rate.endswith("weights")
        assert {p.ndim > 1 for p in group["params"]} == {weights}
        assert group["weight_decay"] == (DECAY if weights else 0.0)
    assert [id(p) for p in groups["conv1_weights"]["params"]] == [id(model.conv1.weight)]


def test_each_group_gets_the_rate_that_it_is_named_by():
    optimizer = optimizer_of(AlexNet(num_classes=3, width=1 / 16))
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    set_rates(optimizer, Rates(weights=1, biases=2, conv1_weights=3, conv1_biases=4))
    found = {group["rate"]: group["lr"] for group in optimizer.param_groups}
    assert found == {"weights": 1, "biases": 2, "conv1_weights": 3, "conv1_biases": 4}


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
    assert step_decay(10**9, 10, ()) == 1


def test_warmup_rises_in_equal_steps_and_cosine_falls_from_one_through_one_half_to_zero():
    assert [warmup_cosine(step, 100, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warmup_cosine(10, 110, 10) == 1
    assert warmup_cosine(35, 110, 10) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert warmup_cosine(60, 110, 10) == pytest.approx(0.5)
    assert warmup_cosine(110, 110, 10) == 0
    assert warmup_cosine(500, 110, 10) == 0
    assert warmup_cosine(0, 1, 0) == warmup_cosine(4, 5, 5) == 1


# Averaged weights


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def changed(model: nn.Module, seed: int) -> None:
    """Every parameter and buffer gets a new value, as a training step gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator))
            else:
                value.add_(1)


def test_average_is_the_formula_in_numpy_with_its_ramp():
    model = small_model()
    ema = Ema(model, 0.5)
    expected = {name: value.double().numpy() for name, value in model.state_dict().items()}
    for n in range(1, 21):
        changed(model, seed=n)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))  # 2/11, 3/12 … and 1/2 from n = 8 on
        for name, value in model.state_dict().items():
            now = value.double().numpy()
            expected[name] = decay * expected[name] + (1 - decay) * now
    assert int(ema.state["1.num_batches_tracked"]) == 20 == ema.updates
    for name in ema.state.keys() - {"1.num_batches_tracked"}:
        np.testing.assert_allclose(ema.state[name].numpy(), expected[name], rtol=1e-5)


def test_applied_weights_are_the_averaged_ones_and_the_models_own_come_back():
    model = small_model().eval()
    ema = Ema(model, 0.9)
    changed(model, seed=1)
    ema.update()
    averaged = small_model().eval()
    averaged.load_state_dict(ema.state)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    places = [parameter.data_ptr() for parameter in model.parameters()]
    x = torch.rand(5, 3)
    with pytest.raises(KeyError), ema.applied():  # also after an error
        assert torch.equal(model(x), averaged(x))
        raise KeyError
    assert not torch.equal(model(x), averaged(x))
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


def test_average_has_the_layout_of_the_model_and_is_not_its_memory():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    ema = Ema(model, 0.9)
    assert ema.state["weight"].stride() == model.weight.stride()
    assert ema.state["weight"].data_ptr() != model.weight.data_ptr()
    assert not any(value.requires_grad for value in ema.state.values())
