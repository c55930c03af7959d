"""The cost model against simulations and counts on the real network."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from alexnet.model import AlexNet
from benchmarks import cost_model
from benchmarks.cost_estimate import INSTANCES, Instance, building, training
from benchmarks.cost_model import H200, NETWORKS, Cluster, all_reduce, smallest_batch, step
from benchmarks.scaling import main

# Nothing but bytes counts, one byte takes a second.
PLAIN = Cluster(gpus_per_node=1, network=1.0, hop_inside=0, hop_network=0)


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


def ring(members: int, size: int) -> tuple[list[int], bool, int]:
    """A ring all-reduce step by step: (values that each member sent, all sums right, rounds)."""
    values = np.random.default_rng(0).integers(0, 9, (members, size))
    expected, state = values.sum(axis=0), values.copy()
    chunks = np.array_split(np.arange(size), members)
    sent = [0] * members
    rounds = 0
    for phase, number in itertools.product(("reduce", "gather"), range(members - 1)):
        before = state.copy()
        for member in range(members):
            shift = member - number + (phase == "gather")
            chunk, right = chunks[shift % members], (member + 1) % members
            sent[member] += len(chunk)
            if phase == "reduce":
                state[right, chunk] += before[member, chunk]
            else:
                state[right, chunk] = before[member, chunk]
        rounds += 1
    return sent, bool((state == expected).all()), rounds


@pytest.mark.parametrize("members", [2, 3, 4, 8])
def test_all_reduce_sends_the_bytes_of_a_ring(members):
    sent, right, rounds = ring(members, 24)
    assert right and set(sent) == {2 * (members - 1) * 24 // members}
    assert all_reduce(PLAIN, members, 24, 1) == pytest.approx(sent[0])
    if members < 4:  # with more, a tree has fewer hops than the ring's rounds
        hops = dataclasses.replace(PLAIN, hop_network=1.0)
        assert all_reduce(hops, members, 0, 5) == 5 * rounds


def test_all_reduce_has_two_levels_and_is_free_for_one():
    cluster = Cluster(gpus_per_node=8, inside=100.0, network=10.0, hop_inside=1e-3, hop_network=0.5)
    assert all_reduce(cluster, 1, 1e9, 3) == 0
    inside = 2 * 7 / 8 * 400 / 100 + 3 * 6 * 1e-3
    assert all_reduce(cluster, 8, 400, 3) == pytest.approx(inside)
    assert all_reduce(cluster, 64, 400, 3) == pytest.approx(inside + 2 * 7 / 8 * 40 + 3 * 6 * 0.5)
    assert all_reduce(cluster, 4, 400, 1) == pytest.approx(2 * 3 / 4 * 4 + 4e-3)


def test_a_step_adds_what_the_backward_cannot_hide():
    cluster = Cluster(images_per_second=1000, step_overhead=0.01, gpus_per_node=1, network=1e9)
    cluster = dataclasses.replace(cluster, hop_network=0)
    found = step(cluster, 2, 64, 4)
    early, late = 58_631_144 * 4 / 1e9, 3_747_200 * 4 / 1e9  # 2·(2-1)/2 = 1
    hidden = 0.064 * 4.095 / 6.600
    assert found.exposed == pytest.approx(early + late - hidden)
    assert found.seconds == pytest.approx(0.064 + 0.01 + early + late - hidden)
    assert found.efficiency == pytest.approx(0.064 / found.seconds)
    assert found.bound_by == "communication"
    half = step(cluster, 2, 64, 2)
    assert half.all_reduce == pytest.approx(found.all_reduce / 2)
    long = step(cluster, 2, 640, 4)
    assert long.exposed == pytest.approx(late), "all of fc6-8 is hidden"
    assert long.bound_by == "computing"


def test_a_step_waits_for_data_and_not_for_more_than_they_take():
    cluster = dataclasses.replace(H200, decode=10_000)
    found = step(cluster, 1, 1000, 2)
    assert found.seconds == pytest.approx(0.1) and found.bound_by == "data"
    assert found.efficiency == pytest.approx(0.2)
    assert smallest_batch(cluster, 8, 2) is None
    assert step(H200, 1, 100, 2).bound_by == "step overhead"


@pytest.mark.parametrize("gpus", [1, 8, 64, 1024])
@pytest.mark.parametrize("network", NETWORKS.values())
def test_smallest_batch_is_the_first_that_suffices(gpus, network):
    cluster = dataclasses.replace(H200, network=network)
    found = smallest_batch(cluster, gpus, 2)
    assert step(cluster, gpus, found, 2).efficiency >= 0.9
    assert step(cluster, gpus, found - 1, 2).efficiency < 0.9


def test_own_figures_change_the_tables_and_nonsense_is_refused(capsys):
    assert main(["--images-per-second", "10000", "--batch", "1024", "--cores", "2"]) == 0
    out = capsys.readouterr().out
    assert "global batch of 1,024 (modelled)" in out and "| data |" in out and "| none |" in out
    for flags in (["--images-per-second", "0"], ["--batch", "0"], ["--cores", "-1"]):
        assert main(flags) == 2
        assert flags[0] in capsys.readouterr().err


def test_hours_of_a_build_are_those_of_the_slower_of_cpus_and_network():
    alone = Instance("", cpus=2, network=1e12)
    assert building(alone).hours == pytest.approx(1_331_167 / 546 / 3600)
    assert building(alone).bound_by == "CPUs"
    slow = Instance("", cpus=1000, network=1e9)
    assert building(slow).bound_by == "network"
    assert building(slow).hours == pytest.approx(1_331_167 * 135_700 / (0.115e9) / 3600)


def test_hours_of_a_training_are_those_of_the_cost_model():
    machine = next(i for i in INSTANCES if i.name == "p5.48xlarge")
    assert machine.cluster().images_per_second == pytest.approx(50_000, rel=0.01)
    assert machine.cluster().decode == 24 * 2880
    found = training(machine, 4096, 90).hours
    each = cost_model.step(machine.cluster(), 8, 512, 2).seconds
    assert found == pytest.approx(90 * 1_281_167 / 4096 * each / 3600)
    few = Instance("", cpus=8, network=1e12, gpus=8, flops=989e12, inside=476e9)
    assert training(few, 4096, 90).bound_by == "data"
