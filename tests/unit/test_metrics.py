"""Scores by hand and against torchmetrics; the colour rule on images of two colours."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as tm

from pipeline.data.store import Split
from pipeline.data.table import Entry
from pipeline.evaluation import metrics
from pipeline.evaluation.baseline import colour_rule
from pipeline.evaluation.metrics import (
    boundary_areas,
    confusion_matrix,
    iou,
    mean_iou,
    pixel_accuracy,
    summarize,
)

TARGET = np.array([[0, 0, 0, 1], [1, 1, 255, 255]], np.uint8)
PREDICTION = np.array([[0, 0, 1, 1], [1, 0, 0, 2]], np.uint8)


def test_the_confusion_matrix_counts_targets_in_rows_without_the_ignored():
    confusion = confusion_matrix(TARGET, PREDICTION, 3, ignore_index=255)
    assert confusion.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert confusion.dtype == np.int64


def test_an_ignore_index_between_the_classes_and_255_is_left_out_too():
    target = np.array([[0, 7, 1]], np.uint8)
    assert confusion_matrix(target, np.array([[0, 1, 1]], np.uint8), 2, 7).tolist() == [
        [1, 0],
        [0, 1],
    ]


def test_the_confusion_matrix_of_every_id_is_that_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    target, prediction = rng.integers(0, 255, (2, 60, 70)).astype(np.uint8)
    target[rng.random(target.shape) < 0.1] = 255
    expected = np.zeros((255, 255), np.int64)
    for label, found in zip(target.flat, prediction.flat, strict=True):
        if label != 255:
            expected[label, found] += 1
    assert np.array_equal(confusion_matrix(target, prediction, 255, 255), expected)
    monkeypatch.setattr(metrics, "EXACT", 7 * 70)  # counted in parts, the last one smaller
    assert np.array_equal(confusion_matrix(target, prediction, 255, 255), expected)
    parts = [target[:, ::2], prediction[:, ::2]]  # side by side in memory they needn't lie
    assert confusion_matrix(*parts, 255, 255).sum() == (parts[0] != 255).sum()


def test_more_pixels_than_fp32_can_count_are_counted():
    target = np.zeros((4097, 4097), np.uint8)
    assert confusion_matrix(target, target, 2, 255).tolist() == [[4097**2, 0], [0, 0]]
    assert int(np.float32(4097**2)) != 4097**2


def test_scores_by_hand():
    confusion = np.array([[6, 2, 0], [1, 3, 0], [0, 4, 4]])
    scores = summarize(confusion, ("a", "b", "c"))
    assert scores["iou"] == pytest.approx({"a": 6 / 9, "b": 3 / 10, "c": 4 / 8})
    assert scores["accuracy"] == pytest.approx({"a": 6 / 8, "b": 3 / 4, "c": 4 / 8})
    assert scores["precision"] == pytest.approx({"a": 6 / 7, "b": 3 / 9, "c": 1})
    assert scores["dice"] == pytest.approx({"a": 12 / 15, "b": 6 / 13, "c": 8 / 12})
    assert scores["mean_iou"] == pytest.approx((6 / 9 + 3 / 10 + 4 / 8) / 3)
    assert scores["mean_accuracy"] == pytest.approx((6 / 8 + 3 / 4 + 4 / 8) / 3)
    assert scores["mean_dice"] == pytest.approx((12 / 15 + 6 / 13 + 8 / 12) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(13 / 20)


def test_a_class_absent_from_both_is_left_out_of_the_mean():
    scores = summarize(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), ("a", "b", "c"))
    assert scores["iou"]["c"] is None
    assert scores["dice"]["c"] is None
    assert scores["accuracy"]["c"] is None
    assert scores["mean_iou"] == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_a_class_predicted_but_never_labelled_counts_as_zero_iou():
    scores = summarize(np.array([[3, 1], [0, 0]]), ("a", "b"))
    assert scores["iou"] == {"a": 0.75, "b": 0.0}
    assert scores["mean_iou"] == 0.375
    assert scores["dice"]["b"] == 0.0
    assert scores["accuracy"]["b"] is None
    assert scores["mean_accuracy"] == 0.75
    assert scores["precision"]["b"] == 0.0


def test_a_class_that_is_never_predicted_raises_no_mean_but_mmsegmentations():
    # a is right in part, b labelled and never found, c predicted and never labelled, d in neither.
    confusion = np.array([[3, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = summarize(confusion, ("a", "b", "c", "d"))
    assert scores["accuracy"] == {"a": 3 / 4, "b": 0.0, "c": None, "d": None}
    assert scores["precision"] == {"a": 3 / 5, "b": 0.0, "c": 0.0, "d": None}
    assert scores["dice"] == {"a": 6 / 9, "b": 0.0, "c": 0.0, "d": None}
    assert scores["mean_dice"] == pytest.approx((6 / 9 + 0 + 0) / 3)
    assert scores["mean_accuracy"] == pytest.approx((3 / 4 + 0) / 2)
    assert scores["mean_precision"] == pytest.approx((3 / 5 + 0 + 0) / 3)
    assert scores["mean_iou"] == pytest.approx((3 / 6 + 0 + 0) / 3)
    assert scores["pixel_accuracy"] == 3 / 6
    assert scores["mmseg"] == pytest.approx({"mFscore": 6 / 9, "mPrecision": (3 / 5 + 0) / 2})


def test_a_class_that_is_mistaken_everywhere_has_scores_of_0():
    scores = summarize(np.array([[5, 1, 0], [0, 0, 2], [0, 3, 1]]), ("a", "b", "c"))
    assert (scores["accuracy"]["b"], scores["precision"]["b"], scores["dice"]["b"]) == (0, 0, 0)
    assert scores["mean_dice"] == pytest.approx((10 / 11 + 0 + 2 / 7) / 3)
    assert scores["mmseg"]["mFscore"] == pytest.approx((10 / 11 + 2 / 7) / 2)


def test_without_a_labelled_pixel_every_score_is_none():
    scores = summarize(np.zeros((2, 2), np.int64), ("a", "b"))
    assert {scores[f"mean_{name}"] for name in ("iou", "accuracy", "dice", "precision")} == {None}
    assert scores["pixel_accuracy"] is None
    assert np.isnan(mean_iou(np.zeros((2, 2), np.int64)))
    assert np.isnan(pixel_accuracy(np.zeros((2, 2), np.int64)))


def test_scores_equal_those_of_torchmetrics():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 5, (40, 50)).astype(np.uint8)
    prediction = np.where(rng.random((40, 50)) < 0.6, target, rng.integers(0, 5, (40, 50)))
    target[rng.random((40, 50)) < 0.1] = 255
    names = ("a", "b", "c", "d", "e")
    scores = summarize(confusion_matrix(target, prediction.astype(np.uint8), 5, 255), names)
    pair = torch.from_numpy(prediction), torch.from_numpy(target.astype(np.int64))
    for name, function in (
        ("iou", tm.multiclass_jaccard_index),
        ("dice", tm.multiclass_f1_score),
        ("accuracy", tm.multiclass_accuracy),
        ("precision", tm.multiclass_precision),
    ):
        theirs = function(*pair, 5, average="none", ignore_index=255)
        assert list(scores[name].values()) == pytest.approx(theirs.tolist(), abs=1e-6)
        mean = function(*pair, 5, average="macro", ignore_index=255)
        assert scores[f"mean_{name}"] == pytest.approx(mean.item(), abs=1e-6)
    share = tm.multiclass_accuracy(*pair, 5, average="micro", ignore_index=255)
    assert scores["pixel_accuracy"] == pytest.approx(share.item(), abs=1e-6)


def square(top: int, left: int, side: int, size: int = 12) -> np.ndarray:
    """Class 1 on class 0."""
    labels = np.zeros((size, size), np.uint8)
    labels[top : top + side, left : left + side] = 1
    return labels


def test_the_boundary_areas_of_two_squares_by_hand():
    # 12 x 12 pixels: d is round(0.02 * 16.97), and at least 1. Squares of 5 x 5, one column apart:
    # class 1: rings of 16 each; both have 4 pixels of the top row, 4 of the bottom row, and of
    # the columns none: 8 of 16 + 16 - 8.
    areas = boundary_areas(square(3, 3, 5), square(3, 4, 5), 2, 255)
    assert areas.dtype == np.int64
    assert areas[:, 1].tolist() == [8, 24]
    # class 0: the edge of 44 and the ring of 7 x 7 around the square, 24; of the two rings around
    # the squares 12 pixels agree.
    assert areas[:, 0].tolist() == [44 + 12, 2 * (44 + 24) - (44 + 12)]
    same = boundary_areas(square(3, 3, 5), square(3, 3, 5), 2, 255)
    assert same.tolist() == [[68, 16], [68, 16]]


def test_the_boundary_is_two_percent_of_the_diagonal_wide():
    # The diagonal of 90 x 120 is 150: three pixels. 20 x 20 less 14 x 14.
    labels = np.zeros((90, 120), np.uint8)
    labels[30:50, 40:60] = 1
    assert boundary_areas(labels, labels, 2, 255)[:, 1].tolist() == [400 - 196] * 2
    # At the edge of the image a mask ends: 20 x 20 at the corner.
    labels = np.zeros((90, 120), np.uint8)
    labels[:20, :20] = 1
    assert boundary_areas(labels, labels, 2, 255)[:, 1].tolist() == [400 - 196] * 2


def test_the_inside_of_a_mask_does_not_count_for_its_boundary():
    target, prediction = square(2, 2, 8), square(2, 2, 8)
    prediction[5:7, 5:7] = 0  # a hole: 12 pixels around it turn into boundary
    areas = boundary_areas(target, prediction, 2, 255)
    assert areas[:, 1].tolist() == [28, 28 + 12]
    scores = summarize(confusion_matrix(target, prediction, 2, 255), ("a", "b"), areas)
    assert scores["boundary_iou"]["b"] == 28 / 40
    assert scores["iou"]["b"] == 60 / 64


def test_an_ignored_pixel_is_in_no_mask_whatever_is_predicted_there():
    target, prediction = square(3, 3, 6), square(3, 3, 6)
    target[3:9, 6:] = 255
    expected = [14, 14]  # the ring of 6 x 3, all but 4 inside
    for predicted in (0, 1):
        prediction[3:9, 6:] = predicted
        assert boundary_areas(target, prediction, 2, 255)[:, 1].tolist() == expected


def test_the_boundary_iou_divides_the_sums_of_all_images():
    sums = boundary_areas(square(3, 3, 5), square(3, 4, 5), 3, 255)
    sums += boundary_areas(square(3, 3, 5), square(3, 3, 5), 3, 255)
    scores = summarize(np.eye(3, dtype=np.int64), ("a", "b", "c"), sums)
    a, b = (56 + 68) / (80 + 68), (8 + 16) / (24 + 16)
    assert scores["boundary_iou"] == {"a": pytest.approx(a), "b": b, "c": None}
    assert scores["mean_boundary_iou"] == pytest.approx((a + b) / 2)
    assert "boundary_iou" not in summarize(np.eye(3, dtype=np.int64), ("a", "b", "c"))


def test_boundaries_are_those_of_the_papers_erosion():
    # https://github.com/bowenc0221/boundary-iou-api: pad by a background pixel, erode d times.
    rng = np.random.default_rng(0)
    small = rng.integers(0, 5, (2, 9, 14)).astype(np.uint8)
    target, prediction = np.repeat(np.repeat(small, 9, axis=1), 11, axis=2)
    prediction[40:60, 50:110] = 3
    target[rng.random(target.shape) < 0.001] = 255
    masks = {}
    for name, labels in (("target", target), ("prediction", prediction)):
        for number in range(5):
            mask = ((labels == number) & (target != 255)).astype(np.uint8)
            eroded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
            eroded = cv2.erode(eroded, np.ones((3, 3), np.uint8), iterations=3)[1:-1, 1:-1]
            masks[name, number] = (mask - eroded).astype(bool)
    assert round(0.02 * np.hypot(*target.shape)) == 3
    expected = [
        [(masks["target", n] & masks["prediction", n]).sum() for n in range(5)],
        [(masks["target", n] | masks["prediction", n]).sum() for n in range(5)],
    ]
    assert np.array_equal(boundary_areas(target, prediction, 5, 255), expected)


def two_colours(folder: Path, target: np.ndarray, colours: list[tuple[int, int, int]]) -> Split:
    """One image whose class i has colour i; ignored pixels are white."""
    image = np.array([*colours, (255, 255, 255)], np.uint8)[np.minimum(target, len(colours))]
    folder.mkdir()
    (folder / "a.bin").write_bytes(image.tobytes() + target.tobytes())
    return Split(folder, [Entry("a", "a", "a.bin", 0, *target.shape)])


@pytest.mark.parametrize("colours", [[(0, 0, 9), (9, 0, 0)], [(9, 0, 0), (0, 0, 9)]])
def test_the_colour_rule_tells_two_colours_apart_whichever_is_bluer(
    colours: list[tuple[int, int, int]], tmp_path: Path
):
    learned = np.array([[0, 0, 1, 255], [0, 1, 1, 255]], np.uint8)
    measured = np.array([[1, 0, 0], [255, 0, 0]], np.uint8)
    train = two_colours(tmp_path / "train", learned, colours)
    test = two_colours(tmp_path / "test", measured, colours)
    assert colour_rule(train, test, 2, 255).tolist() == [[4, 0], [0, 1]]


def test_the_colour_rule_never_predicts_the_rarest_class(tmp_path: Path):
    target = np.array([[0, 0, 0], [1, 1, 1], [2, 2, 0]], np.uint8)
    colours = [(0, 0, 200), (200, 0, 0), (0, 0, 100)]
    split = two_colours(tmp_path / "one", target, colours)
    confusion = colour_rule(split, split, 3, 255)
    assert confusion.tolist()[:2] == [[4, 0, 0], [0, 3, 0]]
    assert confusion[2, 2] == 0
    assert confusion[2].sum() == 2
    assert iou(confusion)[2] == 0
