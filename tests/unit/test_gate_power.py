"""The power of the gate against every possible outcome, and against the gate on drawn answers."""

import math
from itertools import product

import numpy as np
import pytest

from benchmarks.gate_power import main, power
from training.registry.checks import compare, interval


@pytest.mark.parametrize("images", [1, 12, 40])
@pytest.mark.parametrize(
    ("loss", "margin", "disagree"),
    [(0.0, 0.2, 0.3), (0.1, 0.3, 0.2), (0.2, 0.3, 0.2), (-0.1, 0.1, 0.5)],
)
def test_power_is_the_probability_of_all_outcomes_that_pass(images, loss, margin, disagree):
    own, other = (disagree - loss) / 2, (disagree + loss) / 2
    expected = 0.0
    for b, c in product(range(images + 1), repeat=2):
        if b + c <= images and interval(b, c, images)[0] >= -margin:
            ways = math.comb(images, b) * math.comb(images - b, c)
            expected += ways * own**b * other**c * (1 - disagree) ** (images - b - c)
    assert power(loss, images, margin, disagree) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", [0.0, 0.01])
def test_power_is_the_share_of_drawn_candidates_that_the_comparison_lets_pass(loss):
    images, margin, disagree, draws = 1000, 0.02, 1 / 6, 1200
    rng, passed = np.random.default_rng(0), 0
    for _ in range(draws):
        kind = rng.random(images)
        own = (disagree - loss) / 2
        first, second = kind < own, (kind >= own) & (kind < disagree)
        both = kind > 0.5
        passed += compare(first | both, second | both).low >= -margin
    expected = power(loss, images, margin, disagree)
    assert abs(passed / draws - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_a_share_that_is_none_is_refused(capsys):
    for share in ("0", "1", "-0.1", "nan"):
        assert main(["--disagree", share]) == 2
        assert f"--disagree {float(share)}" in capsys.readouterr().err
