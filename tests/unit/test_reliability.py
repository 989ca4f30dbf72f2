"""Confidence against what is right, counted by hand."""

import json

import numpy as np
import pytest

from pipeline.evaluation.reliability import BINS, Reliability, calibration_of, read_calibration

# Of two classes: two sure and right, one sure and wrong, one unsure and right.
PROBABILITIES = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.4, 0.6]])
LABELS = np.array([0, 0, 0, 1], np.uint8)


def counted() -> Reliability:
    table = Reliability.empty(2)
    table.add(PROBABILITIES, LABELS)
    return table


def test_the_error_is_the_mean_distance_of_the_bins():
    table = counted()
    # All: three of 0.9, of which two are right, and one of 0.6. Class 1: one of 0.9, one of 0.6.
    assert table.error() == pytest.approx((abs(2 - 2.7) + abs(1 - 0.6)) / 4)
    assert table.errors() == [pytest.approx(0.1), pytest.approx((0.9 + 0.4) / 2)]
    assert table.curve() == pytest.approx(np.array([[0.6, 1, 1], [0.9, 2 / 3, 3]]))
    assert table.curve(0) == pytest.approx(np.array([[0.9, 1, 2]]))


def test_a_bin_holds_its_upper_end():
    table = Reliability.empty(2)
    table.add(np.array([[0.6, 0.4], [0.601, 0.399], [1.0, 0.0]]), np.zeros(3, np.uint8))
    pixels = table.counts[0, :, 0]
    assert (pixels[8], pixels[9], pixels[BINS - 1]) == (1, 1, 1)  # 0.6 is 9/15
    assert pixels.sum() == 3


def test_parts_add_up_exactly_in_any_order():
    rng = np.random.default_rng(0)
    given = rng.dirichlet([1, 1, 1], 500).astype(np.float32)
    labels = rng.integers(3, size=500).astype(np.uint8)
    whole, parts = Reliability.empty(3), Reliability.empty(3)
    whole.add(given, labels)
    for part in np.array_split(np.arange(500)[::-1], 7):
        parts.add(given[part], labels[part])
    assert np.array_equal(whole.counts, parts.counts)
    assert whole.counts[..., 0].sum() == 500


def test_nothing_has_no_error():
    table = Reliability.empty(2)
    table.add(np.zeros((0, 2)), np.zeros(0, np.uint8))
    assert table.error() is None
    assert table.errors() == [None, None]
    assert table.curve().shape == (0, 3)


def test_the_file_holds_what_was_counted():
    content = json.loads(json.dumps(calibration_of({"raw": counted()}, None, ["sea", "<script>"])))
    assert content["expected_calibration_error"] == {"raw": pytest.approx(0.275)}
    assert content["bins"]["raw"]["<script>"]["right"][8] == 1
    (table,) = read_calibration(content).values()
    assert np.array_equal(table.counts, counted().counts)
