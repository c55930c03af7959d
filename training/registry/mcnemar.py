"""Two models on the same pictures: how sure one can be of the difference of their accuracies."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Paired:
    """only_first, only_second: pictures that one model alone gets right; difference: top-1 of the
    first less that of the second, with its 95 % interval; p: of McNemar's exact test, two-sided,
    that both are equally accurate."""

    images: int
    both: int
    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p: float

    @property
    def neither(self) -> int:
        return self.images - self.both - self.only_first - self.only_second


def compare(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
    """first, second: bool (N,), whether each model is right about picture i; N is 1 or more."""
    if first.shape != second.shape or not len(first):
        raise ValueError(f"{first.shape} and {second.shape} are not answers to the same pictures")
    images = len(first)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    low, high = interval(only_first, only_second, images)
    return Paired(
        images=images,
        both=int((first & second).sum()),
        only_first=only_first,
        only_second=only_second,
        difference=(only_first - only_second) / images,
        low=low,
        high=high,
        p=exact_p(only_first, only_second),
    )


def interval(
    only_first: int, only_second: int, images: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Of the difference of two paired shares, as Bonett and Price (2012, J. Educ. Behav. Stat. 37,
    479-488) adjust Wald's: one picture is added to each kind of disagreement, so that it covers
    what it says also for a dozen pictures, and is not of length 0 where none disagreed."""
    first, second = (only_first + 1) / (images + 2), (only_second + 1) / (images + 2)
    difference = first - second
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = z * ((first + second - difference**2) / (images + 2)) ** 0.5
    return max(-1.0, difference - half), min(1.0, difference + half)


def exact_p(only_first: int, only_second: int) -> float:
    """How likely at least so uneven a split of the disagreements is, if each is a coin's toss."""
    from scipy.stats import binomtest  # takes a second

    disagreements = only_first + only_second
    found: Any = binomtest(only_first, disagreements).pvalue if disagreements else 1.0
    return float(found)
