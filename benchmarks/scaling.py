"""How far AlexNet scales, by the cost model: the tables of docs/scaling.md.

python -m benchmarks.scaling [--images-per-second 50000] [--batch 32768]
"""

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alexnet.errors import UserError
from benchmarks.cost_model import (
    CONSTANTS,
    CONV_PARAMETERS,
    DECODE_PER_CORE,
    FC_PARAMETERS,
    H200,
    NETWORKS,
    TRAIN_IMAGES,
    Cluster,
    all_reduce,
    minutes,
    smallest_batch,
    step,
)
from pipelines import command

_GPUS = tuple(2**power for power in range(11))
_EPOCHS = 90
_PARAMETERS = CONV_PARAMETERS + FC_PARAMETERS


@dataclass(frozen=True)
class Published:
    """A run from the literature. connection: how its devices were coupled; `recalled` names what
    was not read again for this table."""

    paper: str
    devices: int
    device: str
    epochs: int
    minutes: float
    batch: int
    bytes_per_gradient: int
    connection: Cluster
    recalled: str

    @property
    def step_seconds(self) -> float:
        return 60 * self.minutes * self.batch / (self.epochs * TRAIN_IMAGES)


_SHARE_OF_LINE = 46 / 50
PUBLISHED = (
    Published(
        "You et al., arXiv 1709.05011v1",
        512,
        "Xeon Phi",
        100,
        24,
        32_768,
        4,
        Cluster(gpus_per_node=1, network=12.5e9 * _SHARE_OF_LINE),
        "kind of device, 100 Gb/s network",
    ),
    Published(
        "Jia et al., arXiv 1807.11205",
        1024,
        "P40",
        95,
        4,
        65_536,
        2,
        Cluster(inside=10e9, network=12.5e9 * _SHARE_OF_LINE),
        "8 in a node on PCIe (10 GB/s), 100 Gb/s network",
    ),
    Published(
        "Sun et al., arXiv 1902.06855",
        512,
        "V100",
        95,
        1.5,
        65_536,
        2,
        Cluster(inside=130e9, network=7e9 * _SHARE_OF_LINE),
        "batch, 8 in a node on NVLink (130 GB/s)",
    ),
)
# Sun et al., abstract: 512 GPUs were 410.2 times as fast as one.
SUN_SPEED_UP = 410.2


def tables(cluster: Cluster = H200, batch: int = 32_768) -> str:
    """All of them, as Markdown."""
    parts = [
        ("Constants", _constants()),
        (f"One to 1,024 GPUs at a global batch of {batch:,} (modelled)", _by_gpus(cluster, batch)),
        ("Smallest batch for an efficiency of 90 % (modelled)", _by_network(cluster)),
        ("Slowest network of a node for an efficiency of 90 % (modelled)", _networks(cluster)),
        ("Data (modelled from the measured rate)", _data(cluster)),
        ("Published runs (published, derived, modelled)", _published(cluster)),
    ]
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _constants() -> str:
    rows = [(c.what, c.value, f"**{c.kind}**", c.source) for c in CONSTANTS]
    return _table(("what", "value", "kind", "source"), rows)


def _by_gpus(cluster: Cluster, batch: int) -> str:
    rows = []
    for gpus in (n for n in _GPUS if n <= batch):
        main = step(cluster, gpus, batch / gpus, 2)
        others = [step(cluster, gpus, batch / gpus, 4)]
        for name in ("400 Gb/s", "100 Gb/s"):
            slower = dataclasses.replace(cluster, network=NETWORKS[name])
            others.append(step(slower, gpus, batch / gpus, 2))
        rows.append(
            (
                f"{gpus:,}",
                f"{batch / gpus:,.0f}",
                f"{1e3 * main.computing:.2f}",
                f"{1e3 * main.all_reduce:.2f}",
                f"{1e3 * main.exposed:.2f}",
                f"**{main.efficiency:.1%}**",
                main.bound_by,
                f"{minutes(cluster, gpus, batch, 2, _EPOCHS):,.2f}",
                *(f"{other.efficiency:.0%}" for other in others),
            )
        )
    head = ("GPUs", "batch each", "computing, ms", "all-reduce, ms", "not hidden, ms", "efficiency")
    rest = ("bound by", f"{_EPOCHS} epochs, min", "fp32", "400 Gb/s", "100 Gb/s")
    return _table((*head, *rest), rows)


def _by_network(cluster: Cluster) -> str:
    rows = []
    for name, network in NETWORKS.items():
        for wire, label in ((2, "bf16"), (4, "fp32")):
            other = dataclasses.replace(cluster, network=network)
            cells = [_batch_cell(other, gpus, wire) for gpus in (8, 16, 64, 256, 1024)]
            rows.append((name, label, *cells))
    return _table(("network of a node", "gradients", "8 GPUs", "16", "64", "256", "1,024"), rows)


def _batch_cell(cluster: Cluster, gpus: int, wire: int) -> str:
    each = smallest_batch(cluster, gpus, wire)
    return "none" if each is None else f"{each:,} ({each * gpus:,})"


def _networks(cluster: Cluster) -> str:
    rows = []
    for gpus in (16, 32, 64, 128, 256, 512, 1024):
        cells = [_network_cell(cluster, gpus, batch) for batch in (8_192, 32_768, 65_536, 262_144)]
        rows.append((f"{gpus:,}", *cells))
    return _table(("GPUs", "batch 8,192", "32,768", "65,536", "262,144"), rows)


def _network_cell(cluster: Cluster, gpus: int, batch: int) -> str:
    """Gb/s of line rate, by bisection of its logarithm; bf16 gradients."""

    def enough(gigabits: float) -> bool:
        network = gigabits / 8 * 1e9 * _SHARE_OF_LINE
        other = dataclasses.replace(cluster, network=network)
        return step(other, gpus, batch / gpus, 2).efficiency >= 0.9

    low, high = 1.0, 1e6
    if not enough(high):
        return "no network"
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return f"{high:,.0f} Gb/s"


def _data(cluster: Cluster) -> str:
    rows = []
    for cores in (8, 12, 16, 24):
        rate = min(cores * DECODE_PER_CORE, cluster.images_per_second)
        share = rate / cluster.images_per_second
        rows.append((f"{cores} cores a GPU decode", f"{rate:,.0f} img/s", f"{share:.0%}"))
    return _table(("images come from", "per GPU", "of its rate"), rows)


def _published(cluster: Cluster) -> str:
    rows = []
    for run in PUBLISHED:
        own = all_reduce(run.connection, run.devices, _PARAMETERS * run.bytes_per_gradient, 4)
        rate = run.batch / run.step_seconds
        ours = minutes(cluster, run.devices, run.batch, 2, run.epochs)
        rows.append(
            (
                run.paper,
                f"{run.devices:,} {run.device}",
                f"{run.epochs} epochs in {run.minutes:g} min",
                f"{run.batch:,}",
                f"{1e3 * run.step_seconds:.0f} ms",
                f"{rate / run.devices:,.0f}",
                f"{1e3 * own:.0f} ms",
                f"{ours:.2f} min",
                run.recalled,
            )
        )
    head = ("run", "devices", "published", "batch", "derived: step", "derived: img/s each")
    rest = ("modelled: its all-reduce", "modelled: as many H200", "recalled, not read again")
    return f"{_table((*head, *rest), rows)}\n\n{_check()}"


def _check() -> str:
    """The one run whose single-GPU rate is published."""
    run = PUBLISHED[-1]
    alone = run.batch / run.step_seconds / SUN_SPEED_UP
    own = dataclasses.replace(run.connection, images_per_second=alone)
    found = minutes(own, run.devices, run.batch, run.bytes_per_gradient, run.epochs)
    return (
        f"Check: given that run's own rate of one GPU ({alone:,.0f} img/s, its speed divided by "
        f"its speed-up of {SUN_SPEED_UP}), the model says {found:.1f} min for dense gradients. The "
        f"paper sent a part of them only and took {run.minutes:g} min."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("python -m benchmarks.scaling", description=__doc__)
    rate = H200.images_per_second
    parser.add_argument("--images-per-second", type=float, default=rate, help="of one GPU, alone")
    parser.add_argument("--batch", type=int, default=32_768, help="global batch of the first table")
    parser.add_argument(
        "--cores",
        type=float,
        default=math.inf,
        help="that decode for each GPU; by default, decoding is no limit",
    )
    return command.answered(lambda: _answer(parser.parse_args(argv)))


def _answer(args: argparse.Namespace) -> int:
    if not 0 < args.images_per_second < math.inf:
        raise UserError(
            f"--images-per-second {args.images_per_second} is not positive; measure one"
        )
    if args.batch < 1:
        raise UserError(f"--batch {args.batch} is below 1; pass 1 or more")
    if not args.cores > 0:
        raise UserError(f"--cores {args.cores} is not positive; pass cores for each GPU")
    cluster = dataclasses.replace(
        H200, images_per_second=args.images_per_second, decode=args.cores * DECODE_PER_CORE
    )
    print(tables(cluster, args.batch), end="")
    return 0


if __name__ == "__main__":
    command.begin()
    command.leave(main)
