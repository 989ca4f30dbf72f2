"""Scores from integer sums over a whole set: reduce sums, divide once.

Definitions: https://arxiv.org/abs/1411.4038 (IoU, accuracy), Dice 1945 (doi:10.2307/1932409),
https://arxiv.org/abs/2103.16562 (boundary IoU). What is undefined, and so left out of a mean, is
what MMSegmentation's IoUMetric leaves out, but for precision, see `summarize`:
https://github.com/open-mmlab/mmsegmentation
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.table import Array

Matrix = NDArray[np.int64]
Scores = NDArray[np.float64]
HistoryEntry = dict[str, Any]  # a point of all curves: {"iteration": i, <metric>: value, ...}

EXACT = 2**24  # up to here fp32 holds every whole number


class ImageAreas(NamedTuple):
    """What was found in the image of this number in a split.

    `cells` (K,) are the places, target * C + prediction, of the confusion matrix's `pixels` (K,)
    that are not zero; `boundary` (2,C) are its `boundary_areas`. All are int64.
    """

    image: int
    cells: Matrix
    pixels: Matrix
    boundary: Matrix


def confusion_matrix(
    target: Array, prediction: Array, num_classes: int, ignore_index: int
) -> Matrix:
    """Pixels by target class (row) and predicted class (column), (C,C) int64.

    target and prediction (H,W); pixels whose target is `ignore_index` are left out.
    """
    pairs = _pairs(target, prediction)
    pairs[ignore_index] = 0
    return pairs[:num_classes, :num_classes].astype(np.int64)


def image_areas(
    image: int, target: Array, prediction: Array, num_classes: int, ignore_index: int
) -> ImageAreas:
    """The areas of an image, by its target and prediction (H,W)."""
    confusion = confusion_matrix(target, prediction, num_classes, ignore_index)
    cells = np.flatnonzero(confusion)
    boundary = boundary_areas(target, prediction, num_classes, ignore_index)
    return ImageAreas(image, cells, pixels=confusion.ravel()[cells], boundary=boundary)


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


def boundary_width(shape: tuple[int, ...]) -> int:
    """How far a boundary reaches into a mask (H,W), in pixels: 2% of the image's diagonal."""
    return max(round(0.02 * math.hypot(*shape)), 1)


def _boundary(labels: Array) -> NDArray[np.bool_]:
    """Where erosion takes a pixel (H,W) from the mask of its own class.

    The paper erodes with 3x3 ones, d times, d being 2% of the diagonal, and takes what is outside
    of the image for background. That is: where the square of d pixels around holds another class,
    or reaches over the edge.
    """
    distance = boundary_width(labels.shape)
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    boundary = np.ones(labels.shape, np.bool_)
    inner = np.s_[distance:-distance, distance:-distance]
    boundary[inner] = (cv2.erode(labels, square) != cv2.dilate(labels, square))[inner]
    return boundary


def iou(confusion: Matrix) -> Scores:
    """Intersection over union of each class, (C,); nan where a class is in neither map."""
    return iou_of(_areas(confusion))


def iou_of(areas: NDArray[Any]) -> Scores:
    """The same of (...,3,C), the pixels in both maps, in the target and in the prediction."""
    both, target, prediction = np.moveaxis(areas, -2, 0)
    return _ratio(both, target + prediction - both)


def mean_iou(confusion: Matrix) -> float:
    """The mean over the classes that are in the targets or the predictions; nan if none is."""
    return float(mean_of(iou(confusion)))


def pixel_accuracy(confusion: Matrix) -> float:
    """The share of the labelled pixels that are right; nan without any."""
    return float(_ratio(np.trace(confusion)[None], confusion.sum()[None])[0])


def summarize(
    confusion: Matrix, classes: Sequence[str], boundary: Matrix | None = None
) -> dict[str, Any]:
    """All scores by name, those of a class under `<score>.<class>`; None where undefined.

    The accuracy of a class is its recall, and Dice is the F-score. A class that is labelled and
    never predicted has a precision of 0: left out, as by MMSegmentation's mPrecision and mFscore,
    it would raise the mean. `boundary` is the sum of `boundary_areas`.
    """
    areas = _areas(confusion)
    intersect, labelled, predicted = areas
    precision = _ratio(intersect, predicted)
    per_class = {
        "iou": iou_of(areas),
        "accuracy": _ratio(intersect, labelled),
        "precision": np.where((labelled > 0) & (predicted == 0), 0, precision),
        "dice": _ratio(2 * intersect, labelled + predicted),
    }
    if boundary is not None:
        per_class["boundary_iou"] = _ratio(*boundary)
    scores: dict[str, Any] = {
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
    }
    scores |= {f"mean_{name}": float(mean_of(values)) for name, values in per_class.items()}
    found = _ratio(2 * intersect, (labelled + predicted) * (intersect > 0))
    scores["mmseg"] = {"mFscore": float(mean_of(found)), "mPrecision": float(mean_of(precision))}
    for name, values in per_class.items():
        scores[name] = dict(zip(classes, values.tolist(), strict=True))
    return _without_nan(scores)


def _areas(confusion: Matrix) -> Matrix:
    """(3,C), see `iou_of`."""
    return np.stack([np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)])


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Scores:
    """A part of nothing is nan."""
    ratio = np.full(part.shape, np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def mean_of(scores: Scores) -> Scores:
    """The mean of the classes (...,C) whose score is defined; nan without any."""
    known = ~np.isnan(scores)
    return _ratio(np.where(known, scores, 0).sum(axis=-1), known.sum(axis=-1))


def _without_nan(scores: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: an undefined score is null."""
    return {
        name: _without_nan(value)
        if isinstance(value, dict)
        else (None if np.isnan(value) else value)
        for name, value in scores.items()
    }
