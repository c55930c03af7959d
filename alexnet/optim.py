"""Update rules with the 2012 treatment of biases, averaged weights, learning rates by step."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet import Rule


@dataclass(frozen=True)
class Rates:
    """Learning rates of a step, one for each group of parameters. `biases` are those of
    normalisation layers too; `conv1_…` are the first layer's, which the 2012 source froze."""

    weights: float
    biases: float
    conv1_weights: float
    conv1_biases: float


def sgd(
    model: nn.Module,
    *,
    momentum: float,
    weight_decay: float,
    rule: Rule = "torch",
    trust: float = 0.001,
) -> torch.optim.Optimizer:
    """A parameter group for each field of Rates that the model has parameters for, named by its
    "rate". Only weights decay. All rates are 0 until set_rates.

    Whatever the rule, the velocity is in the state of each parameter as "momentum_buffer".

    torch: v ← momentum·v + (gradient + weight_decay·w), w ← w − lr·v. Equal to `paper` until lr
    changes, after which it applies the new lr to the old gradients too.
    paper and lars: see PaperSGD and LARS, which alone takes `trust`.
    """
    named: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        # Convolutions and linear layers have 4 and 2 dimensions; biases and norm parameters have 1.
        kind = "weights" if parameter.ndim > 1 else "biases"
        rate = f"conv1_{kind}" if "conv1" in name.split(".") else kind
        if parameter.requires_grad:
            named.setdefault(rate, []).append(parameter)
    decays = {rate: weight_decay if rate.endswith("weights") else 0.0 for rate in named}
    groups: list[dict[str, Any]] = [
        {"params": named[rate], "weight_decay": decays[rate], "rate": rate} for rate in named
    ]
    if rule == "paper":
        return PaperSGD(groups, momentum=momentum)
    if rule == "lars":
        return LARS(groups, momentum=momentum, trust=trust)
    # On the CPU 30 ms instead of 121 ms for the 62 million parameters of `ungrouped`.
    fused = all(p.device.type in ("cpu", "cuda") for row in named.values() for p in row)
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=fused)


class PaperSGD(torch.optim.Optimizer):
    """v ← momentum·v − lr·weight_decay·w − lr·gradient, w ← w + v: section 5 of Krizhevsky 2012.

    A step's rate stays with its gradient, so a lower rate slows down what comes, not what is under
    way. At a rate of 0 nothing happens at all: w stands still, and v stays as it is, to be taken up
    by the next step with a rate. Source of both, and of the sign of v: the released code's update
    of weights.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, momentum: float) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()  # torch's own takes a closure, which no caller here has
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights, gradients, velocities = _trained(self, group)
            if not weights or not group["lr"]:
                continue
            torch._foreach_mul_(velocities, group["momentum"])
            if group["weight_decay"]:
                decay = -group["lr"] * group["weight_decay"]
                torch._foreach_add_(velocities, weights, alpha=decay)
            torch._foreach_add_(velocities, gradients, alpha=-group["lr"])
            torch._foreach_add_(weights, velocities)


class LARS(torch.optim.Optimizer):
    """Layer-wise rates, You, Gitman and Ginsburg 2017 (arXiv 1708.03888), algorithm 1:

        λ = trust·|w| / (|gradient| + weight_decay·|w|)
        v ← momentum·v + lr·λ·(gradient + weight_decay·w), w ← w − v

    per weight tensor. Biases and normalisation parameters, whose norms say little, have λ = 1, as
    has a weight that is all zero: it would stay so for ever. At a rate of 0 nothing happens at all,
    as in PaperSGD.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, momentum: float, trust: float) -> None:
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()  # torch's own takes a closure, which no caller here has
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            decay = group["weight_decay"]
            if not group["lr"]:
                continue
            for weight, gradient, velocity in zip(*_trained(self, group), strict=True):
                # A tensor on the device, so that the step waits for no norm.
                rate = group["lr"] * _local_rate(weight, gradient, group["trust"], decay)
                velocity.mul_(group["momentum"]).addcmul_(gradient, rate)
                if decay:
                    velocity.addcmul_(weight, decay * rate)
                weight.sub_(velocity)


def _local_rate(weight: Tensor, gradient: Tensor, trust: float, decay: float) -> Tensor:
    if weight.ndim <= 1:
        return weight.new_ones(())
    length = torch.linalg.vector_norm(weight)
    whole = torch.linalg.vector_norm(gradient) + decay * length
    return torch.where((length > 0) & (whole > 0), trust * length / whole, 1.0)


def _trained(
    optimizer: torch.optim.Optimizer, group: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights of a group, gradients and velocities (zero at first), where there is a gradient."""
    weights = [weight for weight in group["params"] if weight.grad is not None]
    for weight in weights:
        if "momentum_buffer" not in optimizer.state[weight]:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    velocities = [optimizer.state[weight]["momentum_buffer"] for weight in weights]
    return weights, [weight.grad for weight in weights], velocities


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Gives each group the rate that it is named by."""
    by_name = asdict(rates)
    for group in optimizer.param_groups:
        group["lr"] = by_name[group["rate"]]


def step_decay(step: int, steps_per_epoch: int, milestones: Sequence[int]) -> float:
    """Multiplier of the base rate: 0.1^(milestones reached). Steps count from 0.

    Milestones are epochs, counted from 0 too: epoch m is the first with the lower rate.
    """
    return math.pow(0.1, sum(step >= epoch * steps_per_epoch for epoch in milestones))


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Multiplier of the base rate: rises linearly over the warm-up, then half a cosine down to 0.

    Steps count from 0: the first has 1 / warmup_steps, never 0; from total_steps on it is 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def plateau_factor(errors: Sequence[float], patience: int, drops: int) -> tuple[float, bool]:
    """Multiplier of the base rate after epochs with these val errors, and whether to stop.

    A tenth each time `patience` epochs in a row are no better than the best before them, `drops`
    times at most; the next such plateau ends the training. NaN is no better than anything. The
    paper: "divide the learning rate by 10 when the validation error rate stopped improving".
    """
    best, waited, dropped = math.inf, 0, 0
    for error in errors:
        waited = 0 if error < best else waited + 1
        best = error if error < best else best
        if waited == patience:
            if dropped == drops:
                return math.pow(0.1, dropped), True
            waited, dropped = 0, dropped + 1
    return math.pow(0.1, dropped), False


class Ema:
    """Moving average of a model's parameters and buffers, once per step.

    average ← d·average + (1 − d)·value with d = min(decay, (1 + n) / (10 + n)) at update n, counted
    from 1: TensorFlow's ramp, without which a short run's average would be its initialisation.
    Whole numbers, such as counts of batches, are copied. `state` has the keys of model.state_dict()
    and lies on its devices; a checkpoint must hold `state` and `updates`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay, self.updates = model, decay, 0
        self.state = _cloned(model.state_dict())

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        now = self._model.state_dict()
        averaged = [name for name, value in self.state.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.state[name] for name in averaged], [now[name] for name in averaged], 1 - decay
        )
        for name in self.state.keys() - set(averaged):
            self.state[name].copy_(now[name])

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Goes on from what was saved; tensors may lie on another device."""
        _copy(state, self.state)
        self.updates = updates

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again."""
        live = self._model.state_dict()
        own = _cloned(live)
        _copy(self.state, live)
        try:
            yield
        finally:
            _copy(own, live)


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
