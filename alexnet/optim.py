"""Stochastic gradient descent with the 2012 rules for biases, and learning rates by step."""

import math
from collections.abc import Sequence

import torch
from torch import nn

# The devices whose fused SGD kernel was there when this was written; on the CPU it takes 30 ms
# instead of 121 ms for the 62 million parameters of `deck`.
FUSED_DEVICES = frozenset({"cpu", "cuda"})


def sgd(
    model: nn.Module, *, lr: float, momentum: float, weight_decay: float, bias_lr_factor: float
) -> torch.optim.SGD:
    """Two parameter groups: weights, then biases with the parameters of normalisation layers.

    Only the weights decay. The others learn at lr × bias_lr_factor: 2 in the 2012 source (0.02
    against 0.01), 1 in the paper's text. Each group carries its factor as "lr_factor" for set_lr.

    The update is v ← momentum·v + (gradient + weight_decay·w), w ← w − lr·v. The 2012 source keeps
    lr inside v; the two are equal until lr changes, after which PyTorch's applies the new lr to the
    old gradients too.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Convolutions and linear layers have 4 and 2 dimensions; biases and norm parameters have 1.
    weights = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": weight_decay, "lr": lr, "lr_factor": 1.0},
        {
            "params": others,
            "weight_decay": 0.0,
            "lr": lr * bias_lr_factor,
            "lr_factor": bias_lr_factor,
        },
    ]
    fused = all(parameter.device.type in FUSED_DEVICES for parameter in trained)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group lr × its "lr_factor"."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def step_decay(
    step: int, steps_per_epoch: int, milestones: Sequence[int], factor: float = 0.1
) -> float:
    """Multiplier of the base rate: factor^(milestones reached). Steps count from 0.

    Milestones are epochs, counted from 0 too: epoch m is the first with the lower rate. The 2012
    source divides by 10 at 25, 51 and 79.
    """
    return math.pow(factor, sum(step >= epoch * steps_per_epoch for epoch in milestones))


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Multiplier of the base rate: rises linearly over the warm-up, then half a cosine down to 0.

    Steps count from 0: the first has 1 / warmup_steps, never 0; from total_steps on it is 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
