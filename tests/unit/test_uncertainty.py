"""Confidence intervals of an evaluation: by hand, and whether they hold what they promise."""

from typing import Any

import numpy as np
import pytest

from pipeline.evaluation import uncertainty
from pipeline.evaluation.metrics import iou_of, mean_of
from pipeline.evaluation.uncertainty import Sureness, bootstrap, by_group, intervals, joint_sureness


def found_in(matrices: list[np.ndarray], groups: list[str] | None = None) -> dict[str, Any]:
    """The intervals of confusion matrices (C,C), one an image."""
    classes = [f"class {number}" for number in range(len(matrices[0]))]
    owners = np.array(groups or [f"{number:03}" for number in range(len(matrices))])
    return intervals(areas_of(matrices), owners, classes)


def areas_of(matrices: list[np.ndarray]) -> np.ndarray:
    return np.stack([[np.diag(one), one.sum(axis=1), one.sum(axis=0)] for one in matrices])


def right(pixels: int, of: int) -> np.ndarray:
    """So many of class 1's pixels are right, and nothing else is wrong."""
    return np.array([[100, 0], [of - pixels, pixels]])


def test_images_that_are_all_alike_leave_no_doubt():
    found = found_in([right(30, 40)] * 10)
    assert found["iou"]["class 1"] == {"low": 0.75, "high": 0.75}
    mean = (100 / 110 + 0.75) / 2
    assert found["mean_iou"] == pytest.approx({"low": mean, "high": mean})


def test_the_ends_are_those_of_the_draws_further_out_for_few_groups():
    matrices = [right(pixels, 100) for pixels in range(0, 100, 5)]
    found = found_in(matrices)
    drawn = bootstrap(areas_of(matrices), iou_of)[:, 1]
    # t of 19 degrees of freedom is -2.0930; times sqrt(20/19), and that as a normal quantile:
    outside = 0.015887
    ends = np.quantile(drawn, [outside, 1 - outside])
    assert [*found["iou"]["class 1"].values()] == pytest.approx(ends.tolist(), abs=1e-4)


def test_a_draw_takes_as_many_groups_as_there_are():
    weights = np.concatenate([*uncertainty._weights(7)])
    assert weights.shape == (uncertainty.DRAWS, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean() == 1
    assert weights.var() == pytest.approx(6 / 7, abs=0.03)  # of a multinomial distribution
    assert np.array_equal(weights, np.concatenate([*uncertainty._weights(7)]))


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch):
    at_once = np.concatenate([*uncertainty._weights(7)])
    monkeypatch.setattr(uncertainty, "CHUNK", 70)
    assert np.array_equal(at_once, np.concatenate([*uncertainty._weights(7)]))


def test_the_images_of_a_group_are_drawn_together():
    matrices = [right(pixels, 100) for pixels in (10, 10, 90, 90, 50, 50)]
    alone = found_in(matrices)["iou"]["class 1"]
    patients = [*"aabbcc"]
    together = found_in(matrices, patients)["iou"]["class 1"]
    assert together["low"] < alone["low"]
    assert together["high"] > alone["high"]
    areas = by_group(areas_of(matrices), np.array([*"baabbb"]))
    expected = [sum(matrices[1:3]), matrices[0] + sum(matrices[3:])]
    assert np.array_equal(areas[:, 0], [np.diag(one) for one in expected])


def test_one_group_says_nothing_of_others():
    nothing = {"low": None, "high": None}
    matrices = [right(pixels, 100) for pixels in (10, 90)]
    found = found_in(matrices, ["one", "one"])
    assert found == {"mean_iou": nothing, "iou": {"class 0": nothing, "class 1": nothing}}


def test_a_class_in_one_image_has_no_interval_and_the_mean_has():
    matrices = [np.diag([9, 8, 0])] * 3 + [np.array([[9, 1, 0], [2, 5, 0], [1, 0, 4]])]
    found = found_in(matrices)
    assert found["iou"]["class 2"] == {"low": None, "high": None}
    assert found["mean_iou"]["low"] < found["mean_iou"]["high"]


def test_the_freedom_of_a_mean_is_that_of_what_varies():
    rng = np.random.default_rng(0)
    drawn = rng.normal(0, 1, (4000, 2))
    ten, five, many = Sureness(10, 1.1), Sureness(5, 1.2), Sureness(100, 1.01)
    assert joint_sureness(drawn, [ten, ten]) == pytest.approx((20, 1.1), rel=0.02)
    assert joint_sureness(drawn * [1, 0.01], [five, many]) == pytest.approx((5, 1.2), rel=0.02)


def drawn_images(rng: np.random.Generator, patients: int) -> tuple[np.ndarray, np.ndarray]:
    """Areas of three classes, of which every second patient shows the third, and the patients.

    A patient has one to three photographs, which are as hard as each other.
    """
    count = rng.integers(1, 4, patients)
    owners = np.repeat(np.arange(patients), count)
    skill = rng.beta(12, 3, (patients, 3))[owners]
    shown = np.array([True, True, False]) | (rng.random((patients, 1)) < 0.5)[owners]
    target = rng.integers(2000, 8000, (len(owners), 3)) * shown
    both = np.rint(target * np.clip(skill + rng.normal(0, 0.05, skill.shape), 0, 1))
    more = np.rint(target * rng.beta(2, 12, skill.shape))
    return np.stack([both, target, both + more], axis=1).astype(np.int64), owners


@pytest.mark.slow
@pytest.mark.parametrize("patients", [20, 60])
def test_intervals_hold_the_true_score_95_times_in_100(
    patients: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(uncertainty, "DRAWS", 1000)
    rng = np.random.default_rng(1)
    all_of_them, _ = drawn_images(rng, 200_000)
    classes = iou_of(all_of_them.sum(axis=0))
    truth = [*classes, mean_of(classes)]
    held = np.zeros(4)
    for _ in range(2000):
        areas, owners = drawn_images(rng, patients)
        found = intervals(areas, owners, ["a", "b", "c"])
        ends = [*found["iou"].values(), found["mean_iou"]]
        held += [end["low"] <= true <= end["high"] for true, end in zip(truth, ends, strict=True)]
    assert (held / 2000 > 0.93).all(), held / 2000
    assert (held / 2000 < 0.97).all(), held / 2000
