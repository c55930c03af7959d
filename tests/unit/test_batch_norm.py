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
        (9, 4, [5, 4]),
        (11, 4, [4, 4, 3]),
        (7, 4, [4, 3]),
        (6, 4, [3, 3]),
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_group_is_normalised_like_a_batch_of_its_own(count, group, sizes, dtype):
    norm = grouped(group).to(dtype)
    x = batch(count).to(dtype).requires_grad_()
    y = norm(x)
    y.square().sum().backward()

    expected, gradients, weight_gradient = [], [], torch.zeros(3, dtype=dtype)
    for part in x.detach().split(sizes):
        alone = nn.BatchNorm2d(3).to(dtype)
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


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_running_statistics_move_once_per_batch_to_the_mean_over_the_images(dtype, rtol):
    norm = grouped(4).to(dtype)
    mean, variance = np.zeros(3), np.ones(3)
    for count, groups in ((8, 2), (13, 3), (10, 3)):
        x = batch(count).to(dtype)
        parts = np.array_split(x.double().numpy(), groups)
        sizes = [len(part) for part in parts]
        own = [(part.mean((0, 2, 3)), part.var((0, 2, 3), ddof=1)) for part in parts]
        mean = 0.9 * mean + 0.1 * np.average([m for m, _ in own], 0, weights=sizes)
        variance = 0.9 * variance + 0.1 * np.average([v for _, v in own], 0, weights=sizes)
        norm(x)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=rtol)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=rtol)
    assert int(norm.num_batches_tracked) == 3


@pytest.mark.parametrize(("count", "group"), [(511, 64), (4093, 64), (96, 64), (95, 64), (10, 8)])
def test_groups_are_as_many_as_fit_best_and_nearly_equal(count, group, monkeypatch):
    sizes = []
    normalise = nn.functional.batch_norm

    def recording(x, *args):
        sizes.append(len(x))
        return normalise(x, *args)

    monkeypatch.setattr(nn.functional, "batch_norm", recording)
    GroupedBatchNorm2d(1, group)(torch.randn(count, 1, 1, 2))
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
    assert abs(len(sizes) - count / group) <= 0.5


@pytest.mark.parametrize("compiling", [False, True])
def test_a_batch_without_images_moves_nothing_and_has_no_gradient(monkeypatch, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    norm = grouped(4)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    y = norm(torch.empty(0, 3, 4, 5))
    y.sum().backward()
    assert y.shape == (0, 3, 4, 5) and not norm.weight.grad.any() and not norm.bias.grad.any()
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_what_is_learned_does_not_depend_on_how_groups_are_split_over_ranks():
    whole, sizes = grouped(4), [4, 8, 0, 4]
    ranks = [copy.deepcopy(whole) for _ in sizes]
    for count in (16, 16, 16):
        x = batch(count) + whole.running_mean[0]
        y = whole(x)
        parts = [rank(part) for rank, part in zip(ranks, x.split(sizes), strict=True)]
        torch.testing.assert_close(torch.cat(parts), y)
    for name in ("running_mean", "running_var"):
        averaged = sum(
            count * getattr(rank, name) for count, rank in zip(sizes, ranks, strict=True)
        )
        torch.testing.assert_close(averaged / sum(sizes), getattr(whole, name))
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


@pytest.mark.parametrize(("count", "group"), [(8, 4), (9, 4), (15, 4), (7, 4), (3, 1)])
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
