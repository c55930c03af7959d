"""Grouped batch normalisation against torch's BatchNorm2d on each group, and against NumPy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from alexnet.model import AlexNet, GroupedBatchNorm2d


def batch(count: int, channels: int = 3) -> torch.Tensor:
    """Every image has a mean and a spread of its own, so that groups differ."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, channels, 4, 5, generator=generator)
    return x * (1 + torch.arange(count)[:, None, None, None]) + torch.arange(count).view(
        -1, 1, 1, 1
    )


def grouped(group: int, channels: int = 3) -> GroupedBatchNorm2d:
    norm = GroupedBatchNorm2d(channels, group)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
    return norm


@pytest.mark.parametrize(
    ("count", "group", "sizes"),
    [
        (8, 4, [4, 4]),
        (12, 4, [4, 4, 4]),
        (9, 4, [4, 5]),
        (11, 4, [4, 7]),
        (7, 4, [7]),
        (3, 4, [3]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_each_group_is_normalised_like_a_batch_of_its_own(count, group, sizes):
    norm = grouped(group)
    x = batch(count).requires_grad_()
    y = norm(x)
    y.square().sum().backward()

    expected, gradients, weight_gradient = [], [], torch.zeros(3)
    for part in x.detach().split(sizes):
        alone = nn.BatchNorm2d(3)
        alone.load_state_dict(grouped(group).state_dict())
        part.requires_grad_()
        out = alone(part)
        out.square().sum().backward()
        expected.append(out.detach())
        gradients.append(part.grad)
        weight_gradient += alone.weight.grad
    torch.testing.assert_close(y.detach(), torch.cat(expected))
    torch.testing.assert_close(x.grad, torch.cat(gradients))
    torch.testing.assert_close(norm.weight.grad, weight_gradient)


def test_running_statistics_move_once_per_batch_to_the_mean_over_the_groups():
    norm = grouped(4)
    mean, variance = np.zeros(3), np.ones(3)
    for seed_and_count in (8, 13, 9):
        x = batch(seed_and_count)
        count = seed_and_count // 4
        parts = np.split(x.double().numpy(), [4 * i for i in range(1, count)])
        mean = 0.9 * mean + 0.1 * np.mean([p.mean((0, 2, 3)) for p in parts], 0)
        variance = 0.9 * variance + 0.1 * np.mean([p.var((0, 2, 3), ddof=1) for p in parts], 0)
        norm(x)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-5)
    assert int(norm.num_batches_tracked) == 3


def test_what_is_learned_does_not_depend_on_how_groups_are_split_over_ranks():
    whole = grouped(4)
    ranks = [copy.deepcopy(whole) for _ in range(4)]
    for count in (16, 16, 16):
        x = batch(count) + whole.running_mean[0]
        y = whole(x)
        parts = [rank(part) for rank, part in zip(ranks, x.split(4), strict=True)]
        torch.testing.assert_close(torch.cat(parts), y)
    for name in ("running_mean", "running_var"):
        averaged = torch.stack([getattr(rank, name) for rank in ranks]).mean(0)
        torch.testing.assert_close(averaged, getattr(whole, name))
    assert not torch.allclose(ranks[0].running_var, whole.running_var)  # so averaging is needed
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(grouped(4).state_dict())
    x = batch(16)
    halves = torch.cat([copy.deepcopy(plain)(half) for half in x.split(8)])
    assert not torch.allclose(plain(x), halves, atol=0.1)  # as plain normalisation does


def test_in_evaluation_it_is_torchs_and_changes_nothing():
    norm, plain = grouped(2), nn.BatchNorm2d(3)
    norm(batch(8))
    plain.load_state_dict(norm.state_dict())
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = batch(6)
    assert torch.equal(norm.eval()(x), plain.eval()(x))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


@pytest.mark.parametrize(("count", "group"), [(8, 4), (9, 4), (15, 4), (3, 1)])
def test_what_the_compiler_gets_is_the_same_function(count, group, monkeypatch):
    plain, fusible = grouped(group), grouped(group)
    results = []
    for norm, compiling in ((plain, False), (fusible, True)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda said=compiling: said)
        x = batch(count).requires_grad_()
        y = norm(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, norm.weight.grad, norm.bias.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, fusible.state_dict()[name])
    x = batch(count).bfloat16().to(memory_format=torch.channels_last)
    assert fusible(x).dtype == torch.bfloat16
    if group > 1:  # of single images there are several layouts at once
        assert fusible(x).is_contiguous(memory_format=torch.channels_last)


def test_statistics_stay_near_those_of_float32_with_bfloat16_input():
    exact, rounded = grouped(4), grouped(4)
    x = batch(8)
    torch.testing.assert_close(rounded(x.bfloat16()).float(), exact(x), atol=0.05, rtol=0.05)
    torch.testing.assert_close(rounded.running_mean, exact.running_mean, rtol=0.02, atol=0.02)


def test_network_takes_groups_of_the_size_asked_and_plain_layers_for_zero():
    def norms(**options: int) -> list[nn.Module]:
        model = AlexNet(num_classes=2, width=1 / 32, batch_norm=True, **options)
        return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]

    assert [norm.group for norm in norms()] == [64] * 5
    assert [norm.group for norm in norms(norm_group=16)] == [16] * 5
    assert {type(norm) for norm in norms(norm_group=0)} == {nn.BatchNorm2d}
