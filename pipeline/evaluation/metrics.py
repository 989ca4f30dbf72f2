"""Scores from integer sums over a whole set: reduce sums, divide once.

Definitions: https://arxiv.org/abs/1411.4038 (IoU, accuracy), Dice 1945 (doi:10.2307/1932409),
https://arxiv.org/abs/2103.16562 (boundary IoU). What is undefined, and so left out of a mean, is
what MMSegmentation's IoUMetric leaves out: https://github.com/open-mmlab/mmsegmentation
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.store import Array

Matrix = NDArray[np.int64]
Scores = NDArray[np.float64]

EXACT = 2**24  # up to here fp32 holds every whole number


def confusion_matrix(
    target: Array, prediction: Array, num_classes: int, ignore_index: int
) -> Matrix:
    """Pixels by target class (row) and predicted class (column), (C,C) int64.

    target and prediction (H,W); pixels whose target is `ignore_index` are left out.
    """
    pairs = _pairs(target, prediction)
    pairs[ignore_index] = 0
    return pairs[:num_classes, :num_classes].astype(np.int64)


def _pairs(first: Array, second: Array) -> Scores:
    """How many pixels have which id in one map (row) and in the other (column), (256,256).

    OpenCV counts bytes as they are, where numpy and torch make 64-bit numbers of them first. Its
    results are fp32, exact to 2^24: larger maps are counted in parts.
    """
    total = np.zeros((256, 256))
    rows = max(EXACT // first.shape[1], 1)
    for top in range(0, len(first), rows):
        maps = [first[top : top + rows], second[top : top + rows]]
        total += cv2.calcHist(maps, [0, 1], None, [256, 256], [0, 256, 0, 256])
    return total


def boundary_areas(target: Array, prediction: Array, num_classes: int, ignore_index: int) -> Matrix:
    """Intersection and union of the boundaries of each class's two masks, in pixels, (2,C) int64.

    target and prediction (H,W). Pixels whose target is `ignore_index` belong to no mask, predicted
    or not: both masks end where they begin.
    """
    prediction = np.where(target == ignore_index, ignore_index, prediction).astype(np.uint8)
    maps = (
        np.where(_boundary(labels), labels, ignore_index).astype(np.uint8)
        for labels in (target, prediction)
    )
    pairs = _pairs(*maps)  # what is in no boundary counts as ignored
    intersect = np.diag(pairs)[:num_classes]
    own, found = pairs.sum(axis=1)[:num_classes], pairs.sum(axis=0)[:num_classes]
    return np.stack([intersect, own + found - intersect]).astype(np.int64)


def _boundary(labels: Array) -> NDArray[np.bool_]:
    """Where erosion takes a pixel (H,W) from the mask of its own class.

    The paper erodes with 3x3 ones, d times, d being 2% of the diagonal, and takes what is outside
    of the image for background. That is: where the square of d pixels around holds another class,
    or reaches over the edge.
    """
    distance = max(round(0.02 * math.hypot(*labels.shape)), 1)
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    boundary = np.ones(labels.shape, np.bool_)
    inner = np.s_[distance:-distance, distance:-distance]
    boundary[inner] = (cv2.erode(labels, square) != cv2.dilate(labels, square))[inner]
    return boundary


def iou(confusion: Matrix) -> Scores:
    """Intersection over union of each class, (C,); nan where a class is in neither map."""
    intersect, union = _areas(confusion)
    return _ratio(intersect, union)


def mean_iou(confusion: Matrix) -> float:
    """The mean over the classes that are in the targets or the predictions; nan if none is."""
    return _mean(iou(confusion))


def pixel_accuracy(confusion: Matrix) -> float:
    """The share of the labelled pixels that are right; nan without any."""
    return float(_ratio(np.trace(confusion)[None], confusion.sum()[None])[0])


def summarize(
    confusion: Matrix, classes: Sequence[str], boundary: Matrix | None = None
) -> dict[str, Any]:
    """All scores by name, those of a class under `<score>.<class>`; None where undefined.

    The accuracy of a class is its recall. `dice` and `fscore` are one number but for a class
    without a right pixel: its Dice is 0, its F-score, of no precision and no recall, is undefined.
    `boundary` is the sum of `boundary_areas`.
    """
    intersect, union = _areas(confusion)
    labelled, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    per_class = {
        "iou": _ratio(intersect, union),
        "accuracy": _ratio(intersect, labelled),
        "precision": _ratio(intersect, predicted),
        "dice": _ratio(2 * intersect, labelled + predicted),
        "fscore": _ratio(2 * intersect, (labelled + predicted) * (intersect > 0)),
    }
    if boundary is not None:
        per_class["boundary_iou"] = _ratio(*boundary)
    scores: dict[str, Any] = {
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
    }
    scores |= {f"mean_{name}": _mean(values) for name, values in per_class.items()}
    for name, values in per_class.items():
        scores[name] = dict(zip(classes, values.tolist(), strict=True))
    return _without_nan(scores)


def _areas(confusion: Matrix) -> tuple[Matrix, Matrix]:
    intersect = np.diag(confusion)
    return intersect, confusion.sum(axis=1) + confusion.sum(axis=0) - intersect


def _ratio(part: Matrix, whole: Matrix) -> Scores:
    ratio = np.full(part.shape, np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _mean(scores: Scores) -> float:
    """The mean of the defined scores; nan without any, where numpy's nanmean would warn."""
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if known.size else float("nan")


def _without_nan(scores: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: an undefined score is null."""
    return {
        name: _without_nan(value)
        if isinstance(value, dict)
        else (None if np.isnan(value) else value)
        for name, value in scores.items()
    }
