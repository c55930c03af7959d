"""What a data-parallel step costs: computing, the all-reduce of the gradients, the data.

A model to plan with, not a measurement: `CONSTANTS` says of every number where it comes from.
Seconds, bytes, bytes per second and images per second throughout.
"""

import math
from dataclasses import dataclass
from typing import Literal

TRAIN_IMAGES = 1_281_167  # of ILSVRC-2012

# `baseline` with 1000 classes. Backward runs from fc8 to conv1, so the 94 % of the gradients that
# belong to fc6-8 are ready while the convolutions' backward still has to run.
CONV_PARAMETERS, FC_PARAMETERS = 3_747_200, 58_631_144
# Forward and backward of one image, and the convolutions' backward in it.
FLOPS, CONV_BACKWARD_FLOPS = 6.600e9, 4.095e9
# DDP fills buckets of 25 MB from the last layer on and never splits a tensor.
FC_BUCKETS, CONV_BUCKETS = 3, 1


@dataclass(frozen=True)
class Constant:
    what: str
    value: str
    kind: Literal["measured", "cited", "assumed"]
    source: str


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, and how they are connected.

    images_per_second: of one GPU that waits for nothing; step_overhead: what a step costs at any
    batch; inside: bus bandwidth of all-reduce within a node, as nccl-tests defines it; network: of
    a whole node, in each direction; hop_*: latency of one message; decode: images per second and
    GPU that arrive (infinite where they stay in its memory).
    """

    images_per_second: float = 50_000.0
    step_overhead: float = 1.0e-3
    gpus_per_node: int = 8
    inside: float = 476e9
    network: float = 8 * 46e9
    hop_inside: float = 4e-6
    hop_network: float = 15e-6
    decode: float = math.inf


H200 = Cluster()
# Of a node. The same share of the line rate (46 of 50 GB/s) is taken for the slower ones.
NETWORKS = {
    "8 × 400 Gb/s": 8 * 46e9,
    "400 Gb/s": 46e9,
    "100 Gb/s": 11.5e9,
    "25 Gb/s": 2.875e9,
}
DECODE_PER_CORE = 2_880.0

CONSTANTS = (
    Constant(
        "parameters, operations per image",
        "62,378,344; 6.60 GFLOP",
        "measured",
        "counted on the network by tests/unit/test_scaling.py",
    ),
    Constant(
        "decoding, 227 px shards",
        "2,880 img/s per core",
        "measured",
        "benchmarks/results, loader: within the spread of half of two threads' rate on Zen 4",
    ),
    Constant(
        "all-reduce inside a node of 8",
        "476 GB/s (bus)",
        "cited",
        "H100 with NVLink SHARP, github.com/NVIDIA/nccl-tests/issues/290",
    ),
    Constant(
        "network",
        "46 GB/s per 400 Gb/s card",
        "cited",
        "same place, 46 to 48; other line rates by the same share",
    ),
    Constant("memory of an H200", "141 GB, 4.8 TB/s", "cited", "NVIDIA's data sheet"),
    Constant(
        "one GPU, bf16, large batch",
        "50,000 img/s",
        "assumed",
        "330 TFLOP/s, a third of the data sheet's 989; the one H200 measured had 25,400 (MFU 22 %) "
        "before the last changes for speed, see benchmarks/README.md",
    ),
    Constant(
        "step overhead",
        "1 ms",
        "assumed",
        "0.26 ms to update 62.4 M weights at 4.8 TB/s, the rest launching kernels",
    ),
    Constant("latency of a hop", "4 µs inside, 15 µs network", "assumed", "order of magnitude"),
)


@dataclass(frozen=True)
class Step:
    """Seconds of one step. exposed: the part of all_reduce that nothing hides; waiting: for data,
    after all that."""

    batch: float  # per GPU
    computing: float
    overhead: float
    all_reduce: float
    exposed: float
    waiting: float

    @property
    def seconds(self) -> float:
        return self.computing + self.overhead + self.exposed + self.waiting

    @property
    def efficiency(self) -> float:
        """Images per second as a share of what the GPUs do when they wait for nothing."""
        return self.computing / self.seconds

    @property
    def bound_by(self) -> str:
        """computing while efficiency is at least 90 %; else the greatest of the losses."""
        if self.efficiency >= 0.9:
            return "computing"
        losses = {
            "communication": self.exposed,
            "step overhead": self.overhead,
            "data": self.waiting,
        }
        return max(losses, key=lambda name: losses[name])


def step(cluster: Cluster, gpus: int, batch: float, bytes_per_gradient: int) -> Step:
    """batch: per GPU. bytes_per_gradient: 4 in float32, 2 with --compress-gradients.

    The gradients of fc6-8 travel while the convolutions' backward runs; those of the convolutions
    are the last and hidden by nothing, which is a little pessimistic. Decoding runs beside it all.
    """
    computing = batch / cluster.images_per_second
    early = all_reduce(cluster, gpus, FC_PARAMETERS * bytes_per_gradient, FC_BUCKETS)
    late = all_reduce(cluster, gpus, CONV_PARAMETERS * bytes_per_gradient, CONV_BUCKETS)
    exposed = late + max(0.0, early - computing * CONV_BACKWARD_FLOPS / FLOPS)
    busy = computing + cluster.step_overhead + exposed
    waiting = max(0.0, batch / cluster.decode - busy)
    return Step(batch, computing, cluster.step_overhead, early + late, exposed, waiting)


def all_reduce(cluster: Cluster, gpus: int, num_bytes: float, buckets: int) -> float:
    """Seconds for `num_bytes` on every GPU in `buckets` messages.

    Two levels, one after the other: summed within each node, then among the nodes, and back. Of n
    members each sends 2(n-1)/n of the bytes, which no algorithm can undercut (Patarasuk and Yuan
    2009). A ring would make 2(n-1) hops, NCCL takes its double binary tree instead where that has
    fewer: 2 log2(n), with the same bytes.
    """
    inside = min(gpus, cluster.gpus_per_node)
    nodes = -(-gpus // inside)
    seconds = 0.0
    for members, rate, hop in (
        (inside, cluster.inside, cluster.hop_inside),
        (nodes, cluster.network, cluster.hop_network),
    ):
        hops = min(2 * (members - 1), 2 * math.ceil(math.log2(members)))
        seconds += 2 * (members - 1) / members * num_bytes / rate + buckets * hops * hop
    return seconds


def smallest_batch(
    cluster: Cluster, gpus: int, bytes_per_gradient: int, share: float = 0.9
) -> int | None:
    """The fewest images per GPU with an efficiency of `share`; None where no batch has it,
    because the data come too slowly."""
    if min(cluster.decode, cluster.images_per_second) < share * cluster.images_per_second:
        return None
    low, high = 0, 2**30
    while high - low > 1:
        middle = (low + high) // 2
        enough = step(cluster, gpus, middle, bytes_per_gradient).efficiency >= share
        low, high = (low, middle) if enough else (middle, high)
    return high


def minutes(cluster: Cluster, gpus: int, batch: int, bytes_per_gradient: int, epochs: int) -> float:
    """Of a whole training with the global `batch`, without evaluation and checkpoints."""
    steps = epochs * TRAIN_IMAGES / batch
    return steps * step(cluster, gpus, batch / gpus, bytes_per_gradient).seconds / 60
