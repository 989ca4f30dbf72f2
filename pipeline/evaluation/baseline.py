"""The colour rule: what one threshold on blue minus red reaches. A model has to beat it."""

import numpy as np
from numpy.typing import NDArray

from pipeline.data.store import Split
from pipeline.evaluation.metrics import Matrix, iou

LEVELS = 511  # blue minus red, -255 to 255
FITTED = 500  # train images at most, spread evenly: more would only take longer


def colour_rule(train: Split, measured: Split, num_classes: int, ignore_index: int) -> Matrix:
    """The confusion matrix of the rule on `measured`, (C,C) int64.

    The rule tells the two most frequent classes of `train` apart; the threshold, and the side of
    each class, are those with the highest sum of both IoUs on `train`.
    """
    fitted = np.linspace(0, len(train) - 1, min(len(train), FITTED)).astype(int)
    seen = _histogram(train, fitted.tolist(), num_classes, ignore_index)
    first, second = np.argsort(-seen.sum(axis=1), kind="stable")[:2]
    rules = [
        (above, below, threshold)
        for above, below in ((first, second), (second, first))
        for threshold in range(1, LEVELS)
    ]
    best = max(rules, key=lambda rule: np.nansum(iou(_apply(seen, *rule))[[first, second]]))
    every = list(range(len(measured)))
    return _apply(_histogram(measured, every, num_classes, ignore_index), *best)


def _histogram(split: Split, indices: list[int], num_classes: int, ignore_index: int) -> Matrix:
    """Pixels by class and blue minus red, (C,511)."""
    total = np.zeros(num_classes * LEVELS, np.int64)
    for index in indices:
        image, target = split[index]
        valid = target != ignore_index
        difference = image[..., 2][valid].astype(np.intp) - image[..., 0][valid] + 255
        cells = target[valid].astype(np.intp) * LEVELS + difference
        total += np.bincount(cells, minlength=total.size)
    return total.reshape(num_classes, LEVELS)


def _apply(pixels: NDArray[np.int64], above: int, below: int, threshold: int) -> Matrix:
    """Predict `above` from `threshold` up, `below` under it."""
    confusion = np.zeros((len(pixels), len(pixels)), np.int64)
    confusion[:, above] = pixels[:, threshold:].sum(axis=1)
    confusion[:, below] = pixels[:, :threshold].sum(axis=1)
    return confusion
