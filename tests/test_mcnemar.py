"""The paired comparison against arithmetic by hand and against every possible outcome."""

import math
from itertools import product

import numpy as np
import pytest

from training.registry.mcnemar import compare, exact_p, interval


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple:
    counts = [both, only_first, only_second, neither]
    rows = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], counts, axis=0).astype(bool)
    rows = np.random.default_rng(0).permutation(rows)
    return rows[:, 0], rows[:, 1]


def test_counts_of_the_four_kinds_of_pictures():
    found = compare(*answers(50, 7, 3, 11))
    assert (found.images, found.both, found.neither) == (71, 50, 11)
    assert (found.only_first, found.only_second) == (7, 3)
    assert found.difference == pytest.approx(57 / 71 - 53 / 71)


@pytest.mark.parametrize(("b", "c"), [(0, 1), (1, 7), (3, 7), (10, 4), (30, 30), (0, 20)])
def test_p_is_the_two_sided_sum_of_binomial_probabilities(b, c):
    n, chances = b + c, [math.comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
    by_hand = sum(p for p in chances if p <= chances[b] * (1 + 1e-7))
    assert exact_p(b, c) == pytest.approx(by_hand, abs=1e-12)
    assert exact_p(b, c) == exact_p(c, b) and n > 0


def test_no_disagreement_says_nothing_against_equality():
    found = compare(*answers(9, 0, 0, 4))
    assert (found.p, found.difference) == (1.0, 0.0)
    assert found.low == -found.high and found.high > 0


def test_interval_is_the_adjusted_one_of_a_worked_example():
    # 21 pairs, 1 and 7 of which disagree: shares 2/23 and 8/23, difference -6/23,
    # variance (10/23 - 36/529) / 23 = 194/12167.
    half = 1.959964 * math.sqrt(194 / 12167)
    found = compare(*answers(1, 1, 7, 12))
    assert found.low == pytest.approx(-6 / 23 - half, abs=1e-6)
    assert found.high == pytest.approx(-6 / 23 + half, abs=1e-6)


@pytest.mark.parametrize("images", [12, 25, 60])
@pytest.mark.parametrize(("first", "second"), [(0.05, 0.05), (0.15, 0.05), (0.3, 0.1), (0.02, 0.2)])
def test_interval_covers_the_true_difference_in_95_of_100_cases(images, first, second):
    covered = 0.0
    for b, c in product(range(images + 1), repeat=2):
        if b + c > images:
            continue
        low, high = interval(b, c, images)
        if low <= first - second <= high:
            ways = math.comb(images, b) * math.comb(images - b, c)
            covered += ways * first**b * second**c * (1 - first - second) ** (images - b - c)
    assert covered >= 0.94


def test_interval_stays_within_what_a_difference_can_be():
    assert interval(0, 3, 3)[0] >= -1 and interval(3, 0, 3)[1] <= 1
    assert interval(0, 1, 1, 0.9999) == (-1.0, pytest.approx(interval(0, 1, 1, 0.9999)[1]))


def test_answers_to_different_pictures_are_a_defect():
    with pytest.raises(ValueError, match="not answers to the same"):
        compare(np.ones(3, dtype=bool), np.ones(4, dtype=bool))
    with pytest.raises(ValueError, match="not answers to the same"):
        compare(np.ones(0, dtype=bool), np.ones(0, dtype=bool))
