"""Scores by hand and against torchmetrics; the colour rule on images of two colours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as tm

from pipeline.data.store import Entry, Split
from pipeline.evaluation.baseline import colour_rule
from pipeline.evaluation.metrics import (
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


def test_without_a_labelled_pixel_every_score_is_none():
    scores = summarize(np.zeros((2, 2), np.int64), ("a", "b"))
    assert {scores[f"mean_{name}"] for name in ("iou", "accuracy", "dice")} == {None}
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
        if name != "precision":
            assert scores[f"mean_{name}"] == pytest.approx(mean.item(), abs=1e-6)
    share = tm.multiclass_accuracy(*pair, 5, average="micro", ignore_index=255)
    assert scores["pixel_accuracy"] == pytest.approx(share.item(), abs=1e-6)


def two_colours(folder: Path, target: np.ndarray, colours: list[tuple[int, int, int]]) -> Split:
    """One image whose class i has colour i; ignored pixels are white."""
    image = np.array([*colours, (255, 255, 255)], np.uint8)[np.minimum(target, len(colours))]
    folder.mkdir()
    (folder / "a.bin").write_bytes(image.tobytes() + target.tobytes())
    return Split(folder, [Entry("a", "a.bin", 0, *target.shape)])


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
