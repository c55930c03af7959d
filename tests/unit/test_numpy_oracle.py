"""Both networks and their rules written in NumPy, in float64, from the formulas of their sources.

Of torch come the first weights, and which units each dropout kept; the rest is computed twice.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from small_training import CPU, small_config
from torch import nn

from alexnet.model import AlexNet
from alexnet.optim import Rates
from training.network import build_model
from training.steps import Place, Stepper

Array = np.ndarray
Arrays = dict[str, Array]
MOMENTUM, DECAY = 0.9, 0.05  # a decay large enough to show
# Of weights, biases, conv1's weights, conv1's biases; the last step finds conv1 frozen.
RATES = [(1e-6, 2e-6, 1e-6, 2e-6), (1e-6, 2e-6, 1e-7, 2e-6), (1e-7, 2e-6, 0.0, 0.0)]
# stride, padding, groups in `paper`, response normalisation in `paper`, pooling
CONVOLUTIONS = [
    (4, 0, 1, True, True),
    (1, 2, 2, True, True),
    (1, 1, 1, False, False),
    (1, 1, 2, False, False),
    (1, 1, 2, False, True),
]


class Tape:
    """Forward values, and what takes a gradient back to where it came from. kept: units that each
    dropout lets through; none in evaluation."""

    def __init__(self, weights: Arrays, kept: list[Array] | None) -> None:
        self.weights, self.kept = weights, kept
        self.back: list[Callable[[Array], Array]] = []
        self.gradients: Arrays = {}

    def convolution(self, x: Array, name: str, stride: int, padding: int, groups: int) -> Array:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        side = weight.shape[2]
        padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        cut = sliding_window_view(padded, (side, side), (2, 3))[:, :, ::stride, ::stride]
        rows, columns = cut.shape[2:4]
        inputs = np.split(cut, groups, 1)
        kernels = np.split(weight, groups)
        outputs = [
            np.tensordot(part, kernel, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
            for part, kernel in zip(inputs, kernels, strict=True)
        ]

        def back(gradient: Array) -> Array:
            parts = np.split(gradient, groups, 1)
            self.gradients[f"{name}.bias"] = gradient.sum((0, 2, 3))
            self.gradients[f"{name}.weight"] = np.concatenate(
                [
                    np.tensordot(part, given, ((0, 2, 3), (0, 2, 3)))
                    for part, given in zip(parts, inputs, strict=True)
                ]
            )
            towards = np.zeros_like(padded)
            for i in range(side):
                for j in range(side):
                    spread = [
                        np.einsum("bohw,oc->bchw", part, kernel[:, :, i, j])
                        for part, kernel in zip(parts, kernels, strict=True)
                    ]
                    below, right = i + stride * rows, j + stride * columns
                    towards[:, :, i:below:stride, j:right:stride] += np.concatenate(spread, 1)
            return towards[:, :, padding : padding + x.shape[2], padding : padding + x.shape[3]]

        self.back.append(back)
        return np.concatenate(outputs, 1) + bias[:, None, None]

    def relu(self, x: Array) -> Array:
        self.back.append(lambda gradient: gradient * (x > 0))
        return np.maximum(x, 0)

    def response_norm(self, x: Array) -> Array:
        """x·(2 + 1e-4/5·Σx²)^-0.75 over five channels of the same half."""
        place = np.arange(x.shape[1])
        half = place // (x.shape[1] // 2)
        near = abs(place[:, None] - place) <= 2
        seen = (near & (half[:, None] == half)).astype(float)
        base = 2 + 2e-5 * np.einsum("ij,bjhw->bihw", seen, x**2)

        def back(gradient: Array) -> Array:
            through_base = np.einsum("ij,bihw->bjhw", seen, gradient * x * base**-1.75)
            return gradient * base**-0.75 - 0.75 * 2 * 2e-5 * x * through_base

        self.back.append(back)
        return x * base**-0.75

    def max_pool(self, x: Array) -> Array:
        cut = sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2]
        largest = cut.max((4, 5))
        place = cut.reshape(*cut.shape[:4], 9).argmax(4)

        def back(gradient: Array) -> Array:
            towards, (rows, columns) = np.zeros_like(x), gradient.shape[2:]
            for i in range(9):
                below, right = i // 3 + 2 * rows, i % 3 + 2 * columns
                towards[:, :, i // 3 : below : 2, i % 3 : right : 2] += gradient * (place == i)
            return towards

        self.back.append(back)
        return largest

    def dropout(self, x: Array, number: int, training: float, evaluation: float) -> Array:
        """Times `training` what is kept, or times `evaluation` everything."""
        factor = evaluation if self.kept is None else training * self.kept[number]
        self.back.append(lambda gradient: gradient * factor)
        return x * factor

    def linear(self, x: Array, name: str) -> Array:
        def back(gradient: Array) -> Array:
            self.gradients[f"{name}.bias"] = gradient.sum(0)
            self.gradients[f"{name}.weight"] = gradient.T @ x
            return gradient @ self.weights[f"{name}.weight"]

        self.back.append(back)
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def logits(self, x: Array, variant: str) -> Array:
        paper = variant == "paper"
        for i, (stride, padding, groups, normalised, pooled) in enumerate(CONVOLUTIONS, start=1):
            x = self.convolution(x, f"conv{i}", stride, padding, groups if paper else 1)
            x = self.relu(x)
            x = self.response_norm(x) if paper and normalised else x
            x = self.max_pool(x) if pooled else x
        shape = x.shape
        self.back.append(lambda gradient: gradient.reshape(shape))
        x = x.reshape(len(x), -1)
        for number, name in enumerate(("fc6", "fc7")):
            if paper:
                x = self.dropout(self.relu(self.linear(x, name)), number, 1.0, 0.5)
            else:
                x = self.relu(self.linear(self.dropout(x, number, 2.0, 1.0), name))
        return self.linear(x, "fc8")

    def loss(self, x: Array, labels: Array, variant: str) -> float:
        """The mean cross-entropy; its gradients are in `gradients` afterwards."""
        logits = self.logits(x, variant)
        logits = logits - logits.max(1, keepdims=True)
        sums = np.exp(logits).sum(1, keepdims=True)
        right = np.eye(logits.shape[1])[labels]
        gradient = (np.exp(logits) / sums - right) / len(labels)
        for back in reversed(self.back):
            gradient = back(gradient)
        return float((np.log(sums) - (logits * right).sum(1, keepdims=True)).mean())


def updated(
    variant: str, weights: Arrays, velocities: Arrays, gradients: Arrays, rates: tuple[float, ...]
) -> None:
    """`paper` by its section 5, standing still at a rate of 0; `ungrouped` by torch's rule."""
    for name, gradient in gradients.items():
        kind = 2 * name.startswith("conv1") + name.endswith("bias")
        rate, decay = rates[kind], 0.0 if name.endswith("bias") else DECAY
        if variant == "paper" and rate == 0:
            continue
        if variant == "paper":
            velocities[name] *= MOMENTUM
            velocities[name] -= decay * rate * weights[name] + rate * gradient
            weights[name] = weights[name] + velocities[name]
        else:
            velocities[name] *= MOMENTUM
            velocities[name] += gradient + decay * weights[name]
            weights[name] = weights[name] - rate * velocities[name]


def float64_of(model: nn.Module, of: Callable[[nn.Parameter], Any]) -> Arrays:
    named = {name.partition(".")[2]: of(p) for name, p in model.named_parameters()}
    return {name: value.detach().numpy().copy() for name, value in named.items()}


def model_of(variant: str) -> tuple[Stepper, AlexNet]:
    config = small_config(
        model_variant=variant,
        model_width=1 / 16,
        optim_rule="paper" if variant == "paper" else "torch",
        optim_momentum=MOMENTUM,
        optim_weight_decay=DECAY,
    )
    model = build_model(config, 5).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(model.get_parameter("classifier.fc8.weight"), std=0.01)
    return Stepper(config, model, Place(CPU)), model


def apart(found: Arrays, wanted: Arrays) -> float:
    assert found.keys() == wanted.keys()
    far = {name: abs(found[name] - wanted[name]).max() for name in wanted}
    return max(far[name] / (abs(wanted[name]).max() or 1.0) for name in wanted)


@pytest.mark.parametrize("variant", ["ungrouped", "paper"])
def test_loss_gradients_and_three_updates_are_those_of_numpy(variant):
    stepper, model = model_of(variant)
    generator = torch.Generator().manual_seed(1)
    # Large enough that the sums of squares matter beside the 2 of the response normalisation.
    scale = 30 if variant == "paper" else 5
    x = scale * torch.randn(3, 3, 227, 227, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])
    kept: list[Array] = []
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(lambda _l, _x, y: kept.append((y != 0).numpy()))
    weights = float64_of(model, lambda p: p)
    velocities = {name: np.zeros_like(value) for name, value in weights.items()}
    losses = []
    for number, rates in enumerate(RATES):
        kept.clear()
        before, ours = weights.copy(), float64_of(model, lambda p: p)
        step = stepper.step(x, labels, number=number, rates=Rates(*rates), global_size=3)
        tape = Tape(weights, kept)
        losses.append((float(step.sums[0]) / 3, tape.loss(x.numpy(), labels.numpy(), variant)))
        updated(variant, weights, velocities, tape.gradients, rates)
        now = float64_of(model, lambda p: p)
        moved = {name: now[name] - ours[name] for name in now}
        far = (
            abs(losses[-1][0] / losses[-1][1] - 1),
            apart(float64_of(model, lambda p: p.grad), tape.gradients),
            apart(moved, {name: weights[name] - before[name] for name in weights}),
        )
        print(f"{variant}, step {number}: loss {far[0]:.1e}, gradients {far[1]:.1e}, ", end="")
        print(f"update {far[2]:.1e} from NumPy's; loss {losses[-1][1]:.3f}")
        # The product takes its logits in float32.
        assert max(far) < 1e-6
        assert all(abs(gradient).max() > 0 for gradient in tape.gradients.values())
    model.eval()
    evaluated = Tape(weights, None).logits(x.numpy(), variant)
    with torch.no_grad():
        np.testing.assert_allclose(model(x).numpy(), evaluated, rtol=1e-6, atol=1e-6)
