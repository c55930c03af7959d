"""Operations per picture by the formula of the layers' table, and the peak they are compared to."""

import subprocess

import pytest
import torch

from training import recipes
from training.meter import device_name, measured_peak, processor, training_flops
from training.network import build_model

# side of the output, kernel, input and output channels, groups in the paper's network
CONVOLUTIONS = [
    (55, 11, 3, 96, 1),
    (27, 5, 96, 256, 2),
    (13, 3, 256, 384, 1),
    (13, 3, 384, 384, 2),
    (13, 3, 384, 256, 2),
]


def by_hand(grouped: bool, classes: int) -> float:
    layers = [
        side**2 * kernel**2 * inputs * outputs // (groups if grouped else 1)
        for side, kernel, inputs, outputs, groups in CONVOLUTIONS
    ]
    layers += [6 * 6 * 256 * 4096, 4096 * 4096, 4096 * classes]
    return 2 * (3 * sum(layers) - layers[0])


@pytest.mark.parametrize(
    ("recipe", "billions"), [("baseline", 6.6), ("paper", 4.13), ("fast", 6.6)]
)
def test_operations_are_those_of_the_layers_three_times_less_the_pictures_gradient(
    recipe, billions
):
    config = recipes.RECIPES[recipe]()
    with torch.device("meta"):
        model = build_model(config, 1000)
    flops = training_flops(model)
    assert flops == by_hand(recipe == "paper", 1000)
    assert flops / 1e9 == pytest.approx(billions, abs=0.01)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_peak_is_that_of_a_matrix_product_and_moves_no_random_numbers():
    before = torch.random.get_rng_state()
    assert 1e7 < measured_peak(torch.device("cpu"), torch.float32, side=256) < 1e15
    assert torch.equal(torch.random.get_rng_state(), before)


def test_processor_is_the_one_that_the_system_names():
    shown = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    assert processor() in shown and device_name(torch.device("cpu")) == processor()
