"""The cost model against simulations and counts on the real network."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from alexnet.model import AlexNet
from benchmarks import cost_model
from benchmarks.cost_model import H200, Cluster, all_reduce, smallest_batch, step
from benchmarks.scaling import main


# Nothing but bytes counts, one byte takes a second.
@pytest.fixture(scope="module")
def network() -> AlexNet:
    with torch.device("meta"):
        return AlexNet("ungrouped", num_classes=1000)


def test_parameters_are_those_of_the_network(network):
    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    assert count(network.features) == cost_model.CONV_PARAMETERS
    assert count(network.classifier) == cost_model.FC_PARAMETERS


def test_operations_are_those_that_torch_counts(network):
    image = torch.zeros(2, 3, 227, 227, device="meta")
    with FlopCounterMode(display=False) as counter:
        pooled = network.features(image)
        forward = counter.get_total_flops()
        network.classifier(pooled.flatten(1)).sum().backward()
    whole, counts = counter.get_total_flops() / 2, counter.get_flop_counts()["Global"]
    assert whole == pytest.approx(cost_model.FLOPS, rel=1e-3)
    backward = counts[torch.ops.aten.convolution_backward] / 2
    assert backward == pytest.approx(cost_model.CONV_BACKWARD_FLOPS, rel=1e-3)
    assert backward < forward, "of two images against one"


def test_all_reduce_is_a_ring_or_a_tree_at_each_of_two_levels_and_free_for_one():
    cluster = Cluster(gpus_per_node=8, inside=100.0, network=10.0, hop_inside=1e-3, hop_network=0.5)
    assert all_reduce(cluster, 1, 1e9, 3) == 0
    assert all_reduce(cluster, 3, 300, 1) == pytest.approx(4 * 100 / 100 + 4e-3)  # 4 hops
    inside = 2 * 7 / 8 * 400 / 100 + 3 * 6 * 1e-3
    assert all_reduce(cluster, 64, 400, 3) == pytest.approx(inside + 2 * 7 / 8 * 40 + 3 * 6 * 0.5)


def test_a_step_adds_what_the_backward_cannot_hide():
    cluster = Cluster(images_per_second=1000, step_overhead=0.01, gpus_per_node=1, network=1e9)
    cluster = dataclasses.replace(cluster, hop_network=0)
    found = step(cluster, 2, 64, 4)
    early, late = 58_631_144 * 4 / 1e9, 3_747_200 * 4 / 1e9  # 2·(2-1)/2 = 1
    hidden = 0.064 * 4.095 / 6.600
    assert found.exposed == pytest.approx(early + late - hidden)
    assert found.seconds == pytest.approx(0.064 + 0.01 + early + late - hidden)
    assert found.bound_by == "communication"
    long = step(cluster, 2, 640, 4)
    assert long.exposed == pytest.approx(late), "all of fc6-8 is hidden"
    assert long.bound_by == "computing"


def test_a_step_waits_for_data_and_not_for_more_than_they_take():
    cluster = dataclasses.replace(H200, decode=10_000)
    found = step(cluster, 1, 1000, 2)
    assert found.seconds == pytest.approx(0.1) and found.bound_by == "data"
    assert smallest_batch(cluster, 8, 2) is None


@pytest.mark.parametrize("gpus", [1, 8, 1024])
def test_smallest_batch_is_the_first_that_suffices(gpus):
    found = smallest_batch(H200, gpus, 2)
    assert step(H200, gpus, found, 2).efficiency >= 0.9 > step(H200, gpus, found - 1, 2).efficiency


def test_own_figures_change_the_tables_and_nonsense_is_refused(capsys):
    assert main(["--images-per-second", "10000", "--batch", "1024", "--cores", "2"]) == 0
    out = capsys.readouterr().out
    assert "global batch of 1,024 (modelled)" in out and "| data |" in out and "| none |" in out
    for flags in (["--images-per-second", "0"], ["--batch", "0"], ["--cores", "-1"]):
        assert main(flags) == 2
        assert flags[0] in capsys.readouterr().err
