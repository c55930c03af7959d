"""One step of one process: what its dropout depends on, what it says of its gradient."""

import numpy as np
import pytest
import torch
from small_training import CPU, small_config

from alexnet.optim import Rates
from training.meter import GRAD_NORM
from training.network import build_model
from training.steps import Place, Stepper


def gradient(*, seed: int = 0, number: int = 0, rank: int = 0) -> torch.Tensor:
    """Of the last layer, for the same weights and images."""
    stepper = Stepper(
        small_config(seed=seed), build_model(small_config(), 4), Place(CPU, rank=rank)
    )
    x = torch.randn(3, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    rates = Rates(0.01, 0.01, 0.01, 0.01)
    stepper.step(x, torch.tensor([0, 1, 2]), number=number, rates=rates, global_size=3)
    return stepper.tensors()["optimizer"]["classifier.fc8.weight"]


def test_masks_are_drawn_anew_by_seed_step_and_rank_and_by_nothing_else():
    drawn = [gradient(), gradient(number=1), gradient(number=2), gradient(rank=1), gradient(seed=1)]
    for number, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:number])
    torch.manual_seed(99)
    assert torch.equal(gradient(number=1), drawn[1])


def test_a_step_leaves_out_the_share_of_hidden_inputs_that_the_config_says():
    network = build_model(small_config(optim_dropout=0.2, model_width=0.5), 10).train()
    for layer in (network.classifier.dropout6, network.classifier.dropout7):
        ones = torch.ones(100, 1000)
        assert abs(float((layer(ones) == 0).float().mean()) - 0.2) < 0.01


def test_the_norm_that_a_step_leaves_is_that_of_its_whole_gradient():
    stepper = Stepper(small_config(), build_model(small_config(model_width=0.25), 4), Place(CPU))
    x = torch.randn(3, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    rates = Rates(0.01, 0.01, 0.01, 0.01)
    sums = stepper.step(x, torch.tensor([0, 1, 2]), number=0, rates=rates, global_size=3).sums
    each = [p.grad.double().numpy() for p in stepper.model.parameters()]
    exact = np.sqrt(sum(np.square(gradient).sum() for gradient in each))
    assert float(sums[GRAD_NORM]) == pytest.approx(exact, rel=1e-5)
