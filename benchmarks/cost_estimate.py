"""What a build of all of ImageNet takes on named machines: hours, money.

python -m benchmarks.cost_estimate [--price c7a.16xlarge=4 ...]

A model on top of benchmarks/cost_model.py: docs/operations.md shows its table and says of every
number where it comes from. Prices are the reader's. benchmarks/cost.py models trainings besides.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alexnet.errors import UserError
from benchmarks.cost_model import (
    DECODE_PER_CORE,
    FLOPS,
    NETWORKS,
    TRAIN_IMAGES,
    Cluster,
    minutes,
    step,
)
from pipelines import command

IMAGES = TRAIN_IMAGES + 50_000  # of a build with its default splits, train and val
RAW_IMAGE_BYTES, STORED_SAMPLE_BYTES = 113e3, 22.7e3
BUILD_PER_CORE = 388.0  # images a second, measured: benchmarks/results, builder, over its CPUs
USABLE = 0.92  # of a network's line rate, as in docs/scaling.md
GPU_SHARE = 1 / 3  # of the data sheet's dense bfloat16 rate: assumed, as in docs/scaling.md


@dataclass(frozen=True)
class Instance:
    """flops: of one GPU, dense bfloat16, by its data sheet. network: line rate, bits a second.
    inside: bytes a second of an all-reduce within the machine."""

    name: str
    cpus: int
    network: float
    gpus: int = 0
    flops: float = 0.0
    inside: float = 0.0

    def cluster(
        self, decode_per_core: float = DECODE_PER_CORE, gpu_share: float = GPU_SHARE
    ) -> Cluster:
        """One machine, its CPUs shared among its GPUs."""
        return Cluster(
            images_per_second=self.flops * gpu_share / FLOPS,
            gpus_per_node=self.gpus,
            inside=self.inside,
            network=NETWORKS["100 Gb/s"],  # of no account: one machine
            decode=self.cpus / self.gpus * decode_per_core,
        )


INSTANCES = (
    Instance("c7a.4xlarge", cpus=16, network=12.5e9),
    Instance("c7a.16xlarge", cpus=64, network=25e9),
    Instance("g5.12xlarge", cpus=48, network=40e9, gpus=4, flops=70e12, inside=10e9),
    Instance("p4d.24xlarge", cpus=96, network=400e9, gpus=8, flops=312e12, inside=230e9),
    Instance("p5.48xlarge", cpus=192, network=3200e9, gpus=8, flops=989e12, inside=476e9),
)


@dataclass(frozen=True)
class Estimate:
    """Of one machine, from the first image to the last."""

    hours: float
    bound_by: str


def building(instance: Instance, per_core: float = BUILD_PER_CORE) -> Estimate:
    """All of ImageNet, read and written over the network: that or the CPUs, whichever is slower.
    per_core: images a second."""
    computing = IMAGES / (instance.cpus * per_core)
    num_bytes = IMAGES * (RAW_IMAGE_BYTES + STORED_SAMPLE_BYTES)
    moving = num_bytes / (instance.network * USABLE / 8)
    return Estimate(max(computing, moving) / 3600, "CPUs" if computing >= moving else "network")


def training(
    instance: Instance,
    batch: int,
    epochs: int,
    decode_per_core: float = DECODE_PER_CORE,
    gpu_share: float = GPU_SHARE,
) -> Estimate:
    """`baseline` on all GPUs of the machine with bfloat16 gradients; the shards are in its cache.
    decode_per_core: images a second. gpu_share: of `flops`, reached."""
    cluster = instance.cluster(decode_per_core, gpu_share)
    bound_by = step(cluster, instance.gpus, batch / instance.gpus, 2).bound_by
    return Estimate(minutes(cluster, instance.gpus, batch, 2, epochs) / 60, bound_by)


def table(prices: Mapping[str, float]) -> str:
    """As Markdown; prices: US dollars an hour by name, for those that are known."""
    head = ["job", "instance", "CPUs", "hours", "bound by"] + ["USD"] * bool(prices)
    lines = [head, ["---"] * len(head)]
    for instance in (each for each in INSTANCES if not each.gpus):
        found, known = building(instance), prices.get(instance.name)
        cells = ["build", instance.name, f"{instance.cpus}", f"{found.hours:.2f}", found.bound_by]
        if prices:
            cells.append("-" if known is None else f"{found.hours * known:.2f}")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("python -m benchmarks.cost_estimate", description=__doc__)
    parser.add_argument(
        "--price", action="append", default=[], metavar="NAME=USD", help="for an hour; repeatable"
    )
    return command.answered(lambda: _answer(parser.parse_args(argv)))


def _answer(args: argparse.Namespace) -> int:
    print(table(dict(map(price, args.price))), end="")
    return 0


def price(text: str) -> tuple[str, float]:
    """Of "NAME=USD". Raises UserError."""
    name, _, value = text.partition("=")
    names = [instance.name for instance in INSTANCES]
    try:
        dollars = float(value)
    except ValueError:
        dollars = -1.0
    if name not in names or not 0 <= dollars < 1e6:
        raise UserError(f"--price {text}: write NAME=USD with one of {', '.join(names)}")
    return name, dollars


if __name__ == "__main__":
    command.begin()
    command.leave(main)
