"""The policy file, the checks that follow it and the paired comparison, without MLflow."""

import itertools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn import jpeg

from alexnet.classifier import decode, top_k
from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.preprocess import InputSpec, resize_and_crop
from training.accuracy import Metrics, Scored
from training.recipes import RECIPES
from training.registry import checks
from training.registry.checks import SHIPPED, Policy, read_policy

WHOLE = """
[default]
top1 = 0.5
top5 = 0.7
above_chance = 0.25
worst_class = 0.02
margin = 0.02
latency_ms = 500
size_mb = 260
"""


@pytest.fixture
def policy(tmp_path) -> Policy:
    (tmp_path / "policy.toml").write_text(WHOLE)
    return read_policy(tmp_path / "policy.toml", "baseline")


def scored(labels: list[int], predicted: list[int], classes: int) -> Scored:
    right = np.equal(labels, predicted)
    return Scored(
        keys=tuple(f"image {i}" for i in range(len(labels))),
        num_classes=classes,
        labels=np.array(labels, dtype=np.int32),
        place=np.where(right, 0, 1).astype(np.int32),
        loss=np.zeros(len(labels)),
        top=np.array(predicted, dtype=np.int32)[:, None],
        probabilities=np.ones((len(labels), 1), dtype=np.float32),
    )


def metrics(top1: float, top5: float) -> Metrics:
    return Metrics(1000, top1, top5, 1.0, round(top1 * 1000), round(top5 * 1000))


# The file


def test_shipped_policy_holds_for_every_recipe_and_lets_published_accuracies_pass():
    published = {"baseline": (0.565, 0.791), "paper": (0.578, 0.805), "fast": (0.585, 0.81)}
    for recipe in [*RECIPES, "of a student"]:
        policy = read_policy(SHIPPED, recipe)
        found = metrics(*published.get(recipe, (0.565, 0.791)))
        assert all(check.passed for check in checks.accuracy(found, 1000, policy)), recipe
        assert not any(c.passed for c in checks.accuracy(metrics(0.4, 0.6), 1000, policy)), recipe


def test_recipe_takes_what_it_does_not_say_from_default(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(WHOLE + "[paper]\ntop1 = 0.55\n")
    paper, baseline = read_policy(path, "paper"), read_policy(path, "baseline")
    assert (paper.top1, paper.top5, baseline.top1) == (0.55, 0.7, 0.5)
    assert paper.best_champion, "policies of earlier releases do not say it"
    path.write_text(WHOLE + "[deck]\ntop1 = 0.6\n")  # as earlier releases called it
    assert read_policy(path, "baseline").top1 == 0.6


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (WHOLE + "[paper]\ntop_1 = 0.5\n", r"\[paper\] top_1 is 0.5: Unexpected keyword"),
        (WHOLE + "[paper]\ntop1 = 56.5\n", r"\[paper\] top1 is 56.5: .* less than or equal to 1"),
        (WHOLE + "[paper]\nlatency_ms = -1\n", "latency_ms is -1: .* greater than or equal to 0"),
        (WHOLE + "[paper]\nmargin = true\n", "margin is True"),
        (WHOLE + "[paper]\nmargin = nan\n", "margin is nan"),
        (WHOLE + "[paper]\nbest_champion = 1\n", "best_champion is 1"),
        ("top1 = 0.5\n" + WHOLE, "top1 stands outside of a table"),
        (WHOLE.replace("margin = 0.02\n", ""), r"\[default\] margin: Field required"),
        ("[default", "is not TOML"),
        (None, "No such file or directory; pass a file with --policy"),
    ],
)
def test_policy_that_means_nothing_is_refused_in_one_line(tmp_path, text, told):
    path = tmp_path / "policy.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=told) as error:
        read_policy(path, "baseline")
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# The checks


@pytest.mark.parametrize(("classes", "floor"), [(2, 0.625), (10, 0.325), (100, 0.2575)])
def test_floor_of_a_small_set_lies_above_chance(policy, classes, floor):
    below, at = metrics(floor - 0.001, 1.0), metrics(floor + 1e-9, 1.0)
    assert [c.passed for c in checks.accuracy(below, classes, policy)] == [False]
    assert [c.passed for c in checks.accuracy(at, classes, policy)] == [True]


def test_class_that_is_never_recognised_is_named(policy):
    labels = [0] * 10 + [1] * 10 + [2] * 9  # of which nine are too few to be held to the floor
    for predicted, passed, value in (
        ([0] * 29, False, "0.0000, b (0 of 10)"),
        ([0] * 10 + [1] + [0] * 18, True, "0.1000, b (1 of 10)"),
    ):
        found = checks.worst_class(scored(labels, predicted, 3), "abc", policy)
        assert (found.passed, found.value) == (passed, value)
    found = checks.worst_class(scored([0, 1, 2], [1, 2, 0], 3), "abc", policy)
    assert (found.passed, found.value) == (True, "none has 10 images")


def test_no_worse_needs_enough_images_unless_the_answers_are_the_same(policy):
    labels = [0] * 40
    one, other = [0] * 38 + [1, 0], [0] * 38 + [0, 1]
    check, paired = checks.no_worse(scored(labels, one, 2), scored(labels, other, 2), policy)
    assert not check.passed and (paired.only_first, paired.only_second) == (1, 1)
    check, _ = checks.no_worse(scored(labels, one, 2), scored(labels, one, 2), policy)
    assert check.passed
    one, other = scored(labels * 200, one * 200, 2), scored(labels * 200, other * 200, 2)
    check, paired = checks.no_worse(one, other, policy)
    assert check.passed and paired.difference == 0
    worse, right = [1] * 200 + [0] * 9_800, [0] * 10_000  # at the margin, and so one hair below it
    check, paired = checks.no_worse(scored(right, worse, 2), scored(right, right, 2), policy)
    assert paired.difference == -0.02 and not check.passed


def test_size_is_that_of_the_weights_and_latency_that_of_one_image(policy, monkeypatch):
    network = AlexNet(num_classes=4, width=1 / 32).eval()
    assert checks.size(torch.nn.Linear(8_000, 8_000, device="meta"), policy).value == "256.0 MB"
    assert checks.size(network, policy).passed
    for seconds, passed in ((0.4999, True), (0.5001, False)):  # of each image, by this clock
        clock = SimpleNamespace(perf_counter=itertools.count(step=seconds).__next__)
        monkeypatch.setattr(checks, "time", clock)
        assert checks.latency(network, policy).passed is passed
    assert not checks.size(torch.nn.Linear(10_000, 6_500, device="meta"), policy).passed


@pytest.mark.parametrize("wrong", [0, 1, 7])
def test_a_model_that_answers_otherwise_to_a_single_image_is_not_as_used(monkeypatch, wrong):
    model = SimpleNamespace(
        network=AlexNet(num_classes=4, width=1 / 32).eval(),
        input_spec=InputSpec(256, 227, (120.0,) * 3, (60.0,) * 3, ((1.0, 0.0, 0.0),) * 3),
        class_names=("a", "b", "c", "d"),
    )
    files = [jpeg(seed) for seed in range(8)]
    images = torch.stack([resize_and_crop(decode(file), 256, 227) for file in files])
    own = top_k(model.network, images, model.input_spec, model.class_names, k=5)
    rows = [([name for name, _ in row], [share for _, share in row]) for row in own]
    for names, shares in rows[:wrong]:
        names[0], shares[0] = names[-1], 0.9
    monkeypatch.setattr(checks, "verified", nullcontext)
    monkeypatch.setattr(checks, "in_fresh_process", lambda *_: rows)
    found = checks.as_used("models:/alexnet/1", "", model, files)
    assert (found.value, found.passed) == (f"{8 - wrong} of 8 images alike", wrong == 0)


# The paired comparison, against arithmetic by hand and against every possible outcome


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple:
    counts = [both, only_first, only_second, neither]
    rows = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], counts, axis=0).astype(bool)
    rows = np.random.default_rng(0).permutation(rows)
    return rows[:, 0], rows[:, 1]


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 7), (10, 4), (30, 30), (0, 20)])
def test_p_is_the_two_sided_sum_of_binomial_probabilities(b, c):
    chances = [math.comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
    by_hand = sum(p for p in chances if p <= chances[b] * (1 + 1e-7))
    found, mirrored = (checks.compare(*answers(9, *pair, 2)) for pair in ((b, c), (c, b)))
    assert found.p == mirrored.p == pytest.approx(by_hand, abs=1e-12)
    assert (found.both, found.only_first, found.only_second) == (9, b, c)
    assert found.difference == pytest.approx((b - c) / (b + c + 11))


def test_interval_is_the_adjusted_one_of_a_worked_example():
    # 21 pairs, 1 and 7 of which disagree: shares 2/23 and 8/23, difference -6/23,
    # variance (10/23 - 36/529) / 23 = 194/12167.
    half = 1.959964 * math.sqrt(194 / 12167)
    assert checks.interval(1, 7, 21) == pytest.approx((-6 / 23 - half, -6 / 23 + half), abs=1e-6)


@pytest.mark.parametrize("images", [12, 25, 60])
@pytest.mark.parametrize(("first", "second"), [(0.05, 0.05), (0.15, 0.05), (0.3, 0.1), (0.02, 0.2)])
def test_interval_covers_the_true_difference_in_95_of_100_cases(images, first, second):
    covered = 0.0
    for b, c in itertools.product(range(images + 1), repeat=2):
        low, high = checks.interval(b, c, images)
        if b + c <= images and low <= first - second <= high:
            ways = math.comb(images, b) * math.comb(images - b, c)
            covered += ways * first**b * second**c * (1 - first - second) ** (images - b - c)
    assert covered >= 0.94


def test_interval_stays_within_what_a_difference_can_be():
    half = 1.959964 * math.sqrt((1 - 1 / 9) / 3)  # 1.07: beyond -1 from -1/3, were it not cut
    assert checks.interval(0, 1, 1) == (-1.0, pytest.approx(-1 / 3 + half, abs=1e-6))
    assert checks.interval(1, 0, 1) == (pytest.approx(1 / 3 - half, abs=1e-6), 1.0)


def test_answers_to_different_images_are_a_defect():
    for first, second in ((3, 4), (0, 0)):
        with pytest.raises(ValueError, match="not answers to the same"):
            checks.compare(np.ones(first, dtype=bool), np.ones(second, dtype=bool))
