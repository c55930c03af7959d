"""The paper's momentum and LARS against NumPy, and the plateau schedule by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from alexnet.model import AlexNet
from alexnet.optim import LARS, PaperSGD, Rates, plateau_factor, set_rates, sgd

# Large enough for every term of a formula to show in float32.
LR, MOMENTUM, DECAY, FACTOR, TRUST = 0.01, 0.9, 0.05, 2.0, 0.5
RATES = (0.01, 0.01, 0.001, 0.001, 0.02)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def optimizer_of(model: nn.Module, rule: str, **changes: float) -> torch.optim.Optimizer:
    optimizer = sgd(
        model, rule=rule, trust=TRUST, **({"momentum": MOMENTUM, "weight_decay": DECAY} | changes)
    )
    set_rates(optimizer, rates(LR))
    return optimizer


def rates(lr: float, factor: float = FACTOR) -> Rates:
    return Rates(lr, factor * lr, lr, factor * lr)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, lrs=RATES) -> None:
    """A step with each rate, on gradients that are the same in each call."""
    rng = np.random.default_rng(1)
    for lr in lrs:
        set_rates(optimizer, rates(lr))
        for parameter in model.parameters():
            gradient = rng.standard_normal(tuple(parameter.shape))
            parameter.grad = torch.from_numpy(gradient).float()
        optimizer.step()


def in_numpy(model: nn.Module, update, lrs=RATES) -> list[np.ndarray]:
    """What `update(w, v, gradient, lr, decay, is_weight) -> (w, v)` makes of the parameters."""
    rng = np.random.default_rng(1)
    values = [p.detach().double().numpy().copy() for p in model.parameters()]
    speeds = [np.zeros_like(value) for value in values]
    for lr in lrs:
        for i, value in enumerate(values):
            is_weight = value.ndim > 1
            values[i], speeds[i] = update(
                value,
                speeds[i],
                rng.standard_normal(value.shape),
                lr if is_weight else FACTOR * lr,
                DECAY if is_weight else 0.0,
                is_weight,
            )
    return values


def paper_update(w, v, gradient, lr, decay, is_weight):
    v = 0.9 * v - lr * decay * w - lr * gradient
    return w + v, v


def torch_update(w, v, gradient, lr, decay, is_weight):
    v = 0.9 * v + gradient + decay * w
    return w - lr * v, v


def lars_update(w, v, gradient, lr, decay, is_weight):
    if is_weight:
        lr *= TRUST * np.linalg.norm(w) / (np.linalg.norm(gradient) + decay * np.linalg.norm(w))
    v = 0.9 * v + lr * (gradient + decay * w)
    return w - v, v


@pytest.mark.parametrize(
    ("rule", "update"), [("paper", paper_update), ("torch", torch_update), ("lars", lars_update)]
)
def test_each_rule_is_its_formula_in_numpy_through_changes_of_the_rate(rule, update):
    model = small_model()
    expected = in_numpy(model, update)
    stepped(model, optimizer_of(model, rule))
    for value, parameter in zip(expected, model.parameters(), strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-5, atol=1e-6)


def test_paper_and_torch_agree_until_the_rate_changes():
    def learned(rule: str, lrs: tuple[float, ...]) -> torch.Tensor:
        model = small_model()
        stepped(model, optimizer_of(model, rule), lrs)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    steady = (0.01, 0.01, 0.01, 0.01)
    torch.testing.assert_close(learned("paper", steady), learned("torch", steady))
    lowered = (0.01, 0.01, 0.001, 0.001)
    difference = (learned("paper", lowered) - learned("torch", lowered)).abs().max()
    assert difference > 0.01  # the velocity that was under way goes on with the old rate


@pytest.mark.parametrize("rule", ["paper", "lars"])
def test_at_a_rate_of_zero_all_stands_still_and_the_velocity_waits_for_the_next_step(rule):
    model = nn.Linear(1, 2)  # a bias too, which has lars' rate of 1
    optimizer = optimizer_of(model, rule, weight_decay=0.0)

    def moved(rate: float) -> float:
        before = model.bias.detach().clone()
        set_rates(optimizer, rates(rate, factor=1.0))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return float((before - model.bias.detach())[0])

    assert moved(1.0) == pytest.approx(1)
    weight = model.weight.detach().clone()
    assert [moved(0.0) for _ in range(3)] == [0, 0, 0]
    assert torch.equal(model.weight, weight)
    assert moved(1.0) == pytest.approx(MOMENTUM + 1)


def test_a_lars_step_is_the_trusted_share_of_the_weights_whatever_the_gradients_size():
    for size in (1e-6, 1.0, 1e6):
        model = nn.Linear(8, 8)
        optimizer = optimizer_of(model, "lars", weight_decay=0.0)
        set_rates(optimizer, rates(2.0, factor=1.0))
        before, bias = model.weight.detach().clone(), model.bias.detach().clone()
        model.weight.grad = size * torch.randn(8, 8)
        model.bias.grad = torch.ones(8)
        optimizer.step()
        step = (model.weight.detach() - before).norm()
        assert float(step / before.norm()) == pytest.approx(2.0 * TRUST, rel=1e-3)
        torch.testing.assert_close(model.bias.detach(), bias - 2.0)  # no trust, no decay


def test_lars_moves_a_weight_of_zeros_and_stands_still_without_a_gradient():
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = optimizer_of(model, "lars")
    set_rates(optimizer, rates(0.5))
    model.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(model.weight.detach(), torch.full((2, 2), -0.5))
    still = nn.Linear(2, 2, bias=False)
    before = still.weight.detach().clone()
    still.weight.grad = torch.zeros(2, 2)
    optimizer_of(still, "lars", weight_decay=0.0).step()
    assert torch.equal(still.weight.detach(), before)


@pytest.mark.parametrize(("rule", "kind"), [("paper", PaperSGD), ("lars", LARS)])
def test_groups_and_state_are_those_of_the_torch_rule(rule, kind):
    def described(optimizer: torch.optim.Optimizer) -> list[tuple]:
        keys = ("lr", "rate", "weight_decay", "momentum")
        groups = optimizer.param_groups
        return [(len(group["params"]), *(group[key] for key in keys)) for group in groups]

    model = AlexNet(num_classes=3, width=1 / 32, batch_norm=True)
    optimizer = optimizer_of(model, rule)
    assert isinstance(optimizer, kind)
    assert described(optimizer) == described(optimizer_of(model, "torch"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        assert set(optimizer.state[parameter]) == {"momentum_buffer"}
        assert optimizer.state[parameter]["momentum_buffer"].stride() == parameter.stride()


@pytest.mark.parametrize("rule", ["paper", "lars"])
def test_a_run_that_goes_on_from_saved_velocities_is_bit_equal(rule):
    whole, first = small_model(), small_model()
    optimizer = optimizer_of(whole, rule)
    stepped(whole, optimizer, RATES[:2])
    half = optimizer_of(first, rule)
    stepped(first, half, RATES[:2])
    second = small_model()
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second, rule)
    for before, after in zip(first.parameters(), second.parameters(), strict=True):
        resumed.state[after]["momentum_buffer"] = half.state[before]["momentum_buffer"].clone()
    stepped(whole, optimizer, RATES[2:])
    stepped(second, resumed, RATES[2:])
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rule", ["torch", "paper", "lars"])
def test_parameters_without_a_gradient_stay(rule):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer_of(model, rule).step()
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert same == [False, False, True, True]


# Plateau

NAN = math.nan


@pytest.mark.parametrize(
    ("errors", "drops", "finished"),
    [
        ([], 0, False),
        ([0.9, 0.8, 0.7], 0, False),
        ([0.9, 0.9], 0, False),  # one epoch without a better one
        ([0.9, 0.9, 0.95], 1, False),
        ([0.9, 0.9, 0.8, 0.8], 0, False),  # a better one begins the count again
        ([0.9, 0.9, 0.8, 0.8, 0.8], 1, False),
        ([0.9, 1.0, 0.95, 0.91], 1, False),  # better than the last is not better than the best
        ([0.9] * 5, 2, False),
        ([0.9] * 6, 2, False),
        ([0.9] * 7, 2, True),
        ([0.9] * 7 + [0.1], 2, True),  # the end is the end
        ([0.9] * 5 + [0.1, 0.2], 2, False),
        ([NAN, NAN], 1, False),
        ([NAN, 0.5, NAN, 0.4], 0, False),
    ],
)
def test_two_epochs_without_a_better_error_lower_the_rate_twice_then_end(errors, drops, finished):
    factor, end = plateau_factor(errors, patience=2, drops=2)
    assert (factor, end) == (pytest.approx(0.1**drops), finished)


def test_a_factor_never_rises_as_epochs_are_added():
    errors = np.random.default_rng(0).random(200).tolist()
    factors = [plateau_factor(errors[:n], 5, 3)[0] for n in range(len(errors) + 1)]
    assert factors == sorted(factors, reverse=True) and factors[0] == 1
    assert factors[-1] == pytest.approx(1e-3)


def test_without_drops_the_first_plateau_ends_the_training():
    assert plateau_factor([0.5, 0.5, 0.5], patience=2, drops=0) == (1.0, True)
