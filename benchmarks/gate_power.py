"""How often a candidate that is worse passes the gate's paired comparison.

python -m benchmarks.gate_power [--disagree 0.167]

Exact for the interval of training/registry/checks.py and the margins of the shipped policy. Of
every image either both models are right or wrong alike, or only one is right: the share of such
images is `--disagree`, and the true loss is how much oftener that one is the champion.
"""

import argparse
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alexnet.errors import UserError
from pipelines import command
from training.registry.checks import SHIPPED, interval, read_policy

IMAGES = (1_000, 10_000, 50_000)
LOSSES = (0.0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02)
DISAGREE = 1 / 6  # of two trainings of one recipe, as policy.toml has it
_PROMOTIONS = 5
_TAIL = 8  # standard deviations, beyond which nothing is added up: 1e-15


def power(loss: float, images: int, margin: float, disagree: float) -> float:
    """Probability that a candidate whose true top-1 is `loss` below the other's passes.

    loss, margin, disagree: shares in 0..1, with loss at most disagree. The images on which one
    alone is right are binomial of all, and of these the candidate's binomial again.
    """
    from scipy.stats import binom  # takes a second

    mean, spread = images * disagree, _TAIL * math.sqrt(images * disagree * (1 - disagree)) + 1
    counts = np.arange(max(0, int(mean - spread)), min(images, int(mean + spread)) + 1)
    fewest = _fewest_right(counts, images, margin)
    own = (disagree - loss) / 2 / disagree if disagree else 0.0
    passing = binom.sf(fewest - 1, counts, own)
    return float(np.sum(binom.pmf(counts, images, disagree) * passing))


def _fewest_right(counts: NDArray[np.int64], images: int, margin: float) -> NDArray[np.int64]:
    """Of each number of images on which one alone is right: how many must be the candidate's so
    that it passes; one more than there are where even all do not suffice."""
    found = []
    fewest = 0
    for count in counts.tolist():
        # One image more on which they disagree raises it by one at most, or not at all.
        while fewest <= count and interval(fewest, count - fewest, images)[0] < -margin:
            fewest += 1
        found.append(fewest)
    return np.array(found)


def tables(disagree: float) -> str:
    """Both of them, as Markdown."""
    margins = sorted({read_policy(SHIPPED, recipe).margin for recipe in ("baseline", "default")})
    head = ["true loss of top-1", *(f"{n:,} images, margin {m:g}" for m in margins for n in IMAGES)]
    rows = [
        [_points(loss), *(f"{power(loss, n, m, disagree):.1%}" for m in margins for n in IMAGES)]
        for loss in LOSSES
        if loss <= disagree
    ]
    return f"{_table(head, rows)}\n\n{_table(*_added_up(margins[0], disagree))}\n"


def _added_up(margin: float, disagree: float) -> tuple[list[str], list[list[str]]]:
    """Promotions one after the other, each a loss, at the most images."""
    head = ["each promotion loses", "1 passes", f"all of {_PROMOTIONS} pass, champion alone"]
    head.append(f"all of {_PROMOTIONS} pass, best champion too: at most")
    rows = []
    for loss in (each for each in LOSSES if 0 < each * _PROMOTIONS <= disagree):
        once = power(loss, IMAGES[-1], margin, disagree)
        # All pass only if the last one does, whose loss against the best is that of all.
        last = power(loss * _PROMOTIONS, IMAGES[-1], margin, disagree)
        shown = (once, once**_PROMOTIONS, min(last, once**_PROMOTIONS))
        rows.append([_points(loss), *(f"{each:.1%}" for each in shown)])
    return head, rows


def _points(loss: float) -> str:
    return f"{100 * loss:.2f} points"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("python -m benchmarks.gate_power", description=__doc__)
    parser.add_argument(
        "--disagree", type=float, default=DISAGREE, help="share of images that one alone gets right"
    )
    return command.answered(lambda: _answer(parser.parse_args(argv)))


def _answer(args: argparse.Namespace) -> int:
    if not 0 < args.disagree < 1:
        raise UserError(f"--disagree {args.disagree} is not a share; pass one between 0 and 1")
    print(tables(args.disagree), end="")
    return 0


if __name__ == "__main__":
    command.begin()
    command.leave(main)
