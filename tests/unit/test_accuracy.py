"""Intervals against SciPy, and what is read off a network's answers against loops over them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest

from training.accuracy import Metrics, Scored, document, wilson

MANIFEST = SimpleNamespace(
    wnids=("n0", "n1", "n2"), class_names=("tench", "shark", "ray"), digest="0" * 64
)


def answers(*rows: tuple[int, int, float]) -> Scored:
    """Of (label, predicted, probability), with three classes."""
    labels, predicted, sure = (np.array(column) for column in zip(*rows, strict=True))
    order = [[p, *(c for c in range(3) if c != p)] for p in predicted.tolist()]
    place = [row.index(label) for row, label in zip(order, labels.tolist(), strict=True)]
    rest = [[p, (1 - p) * 0.6, (1 - p) * 0.4] for p in sure.tolist()]
    own = [row[at] for row, at in zip(rest, place, strict=True)]
    return Scored(
        keys=tuple(f"val_{i}" for i in range(len(rows))),
        num_classes=3,
        labels=labels.astype(np.int32),
        place=np.array(place, np.int32),
        loss=-np.log(own),
        top=np.array(order, np.int32),
        probabilities=np.array(rest, np.float32),
    )


@pytest.mark.parametrize("images", [1, 20, 3925, 50_000])
def test_intervals_equal_scipys(images):
    for correct in {0, 1, images // 2, images - 1, images}:
        expected = binomtest(correct, images).proportion_ci(0.95, method="wilson")
        assert wilson(correct, images) == pytest.approx(tuple(expected), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0), "no images, nothing known"


def test_metrics_are_shares_of_their_counts_with_intervals():
    found = Metrics.of(8, [2, 6], 4.0)
    assert found == Metrics(8, 0.25, 0.75, 0.5, 2, 6)
    assert (found.top1_interval, found.top5_interval) == (wilson(2, 8), wilson(6, 8))


def test_confusion_classes_and_pairs_count_every_image_at_its_label_and_prediction():
    confusion = np.array([[5, 2, 0], [0, 0, 0], [1, 2, 4]])
    cells = [(a, b, 0.9) for a in range(3) for b in range(3) for _ in range(confusion[a, b])]
    scored = answers(*cells)
    np.testing.assert_array_equal(scored.confusion, confusion)
    assert scored.metrics.correct1 == 9 == scored.correct.sum()
    found = document(scored, MANIFEST)
    zero, absent, two = found["classes"]
    assert (zero["images"], zero["correct"], zero["top1"]) == (7, 5, 5 / 7)
    assert (zero["low"], zero["high"]) == pytest.approx((0.3589, 0.9178), abs=5e-5)
    assert (absent["images"], absent["top1"], absent["taken_for"]) == (0, None, None)
    assert (zero["taken_for"], two["taken_for"]) == ("shark", "shark")
    assert found["confusion"] == [[0, 1, 2], [2, 1, 2], [2, 0, 1]]
    assert found["confused_pairs"][2] == {"true": "ray", "predicted": "tench", "images": 1}


def test_the_most_confident_errors_come_first_and_ties_by_sample_id():
    scored = answers(
        (0, 0, 0.99), (0, 1, 0.6), (1, 2, 0.8), (2, 1, 0.6 + 1e-8), (2, 2, 0.7), (1, 0, 0.8)
    )
    assert scored.most_confident_errors(9).tolist() == [2, 5, 1, 3]
    assert scored.most_confident_errors(2).tolist() == [2, 5]
    first, *_ = document(scored, MANIFEST)["mistakes"]
    assert (first["key"], first["true"], first["predicted"]) == ("val_2", "shark", "ray")
    right = dataclasses.replace(scored, labels=scored.predicted)
    assert right.most_confident_errors(9).tolist() == []


def test_the_table_has_a_row_for_each_image_and_says_what_it_is_of():
    table = answers((0, 1, 0.6), (2, 2, 0.7)).table("a model", MANIFEST)
    assert table.schema.metadata == {b"model": b"a model", b"manifest_sha256": b"0" * 64}
    one, two = table.to_pylist()
    assert (one["key"], one["label"], one["wnid"], one["predicted"]) == ("val_0", 0, "n0", 1)
    assert (one["top5"], one["correct"], one["place"]) == ([1, 0, 2], False, 1)
    assert one["probabilities"] == pytest.approx([0.6, 0.24, 0.16])
    assert one["loss"] == pytest.approx(-np.log(0.24))
    assert (two["wnid"], two["correct"], two["place"]) == ("n2", True, 0)
