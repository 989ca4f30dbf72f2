"""Whether a network is as often right as it is sure: reliability, in integers, and its error.

Confidence is the probability of the predicted class. Pixels are sorted into bins by it; in each bin
the share that is right should be the mean confidence. Source: Guo et al. 2017,
https://arxiv.org/abs/1706.04599, whose 15 bins are taken; a class's own error, over the pixels that
are predicted as it: Gupta and Ramdas 2021, https://arxiv.org/abs/2107.08353.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.table import Array
from pipeline.disk import FORMAT
from pipeline.evaluation.metrics import Matrix, Scores

CALIBRATION = Path("evaluation/calibration.json")  # below work_dir
BINS = 15
# Confidences are rounded to so many levels: their sums are then integers, and the same in whichever
# order, and by however many processes, they are added up.
LEVELS = 1000
COUNTED = ("pixels", "right", "confidence")


class Reliability:
    """What C classes' predictions are worth: `counts` (C,BINS,3) int64, by predicted class and bin.

    The last axis holds the pixels, how many of them are right, and the sum of their confidences in
    LEVELS.
    """

    def __init__(self, counts: Matrix) -> None:
        self.counts = counts

    @classmethod
    def empty(cls, num_classes: int) -> "Reliability":
        """Nothing counted yet."""
        return cls(np.zeros((num_classes, BINS, len(COUNTED)), np.int64))

    def add(self, probabilities: NDArray[np.floating[Any]], labels: Array) -> None:
        """Count pixels by their probabilities (P,C) and their labels (P,), none of them ignored."""
        predicted = probabilities.argmax(axis=1)
        confidence = probabilities.max(axis=1, initial=0).astype(np.float64)
        levels = np.rint(confidence * LEVELS).astype(np.int64)
        bins = (-(-levels * BINS // LEVELS) - 1).clip(0, BINS - 1)  # a bin holds its upper end
        kinds = (np.ones_like(levels), predicted == labels, levels)
        for place, values in enumerate(kinds):
            np.add.at(self.counts[..., place], (predicted, bins), values)

    def error(self) -> float | None:
        """The expected calibration error of all pixels; None without any."""
        return _error(self.counts.sum(axis=0))

    def errors(self) -> list[float | None]:
        """That of the pixels predicted as each class; None where there are none."""
        return [_error(own) for own in self.counts]

    def curve(self, label: int | None = None) -> Scores:
        """Mean confidence, share that is right, and pixels of each bin that holds any, (B,3).

        Of the pixels predicted as the class `label`, or of all.
        """
        counts = self.counts.sum(axis=0) if label is None else self.counts[label]
        pixels, right, levels = counts[counts[:, 0] > 0].T
        return np.stack([levels / LEVELS / pixels, right / pixels, pixels], axis=1)


def _error(counts: Matrix) -> float | None:
    """Of bins (BINS,3): the mean over pixels of how far their bin is off."""
    pixels, right, levels = counts.T
    if not pixels.any():
        return None
    return float(np.abs(right * LEVELS - levels).sum() / LEVELS / pixels.sum())


def calibration_of(
    tables: Mapping[str, Reliability], temperature: float | None, classes: Sequence[str]
) -> dict[str, Any]:
    """The content of calibration.json: the counts of tables by name, and their errors."""
    return {
        "format": FORMAT,
        "temperature": temperature,
        "expected_calibration_error": {name: table.error() for name, table in tables.items()},
        "levels": LEVELS,
        "bins": {
            name: {
                one: {kind: own[:, place].tolist() for place, kind in enumerate(COUNTED)}
                for one, own in zip(classes, table.counts, strict=True)
            }
            for name, table in tables.items()
        },
    }


def read_calibration(content: Mapping[str, Any]) -> dict[str, Reliability]:
    """The tables by name, from the content of calibration.json."""
    return {
        name: Reliability(
            np.array([[own[kind] for kind in COUNTED] for own in by_class.values()]).swapaxes(1, 2)
        )
        for name, by_class in content["bins"].items()
    }
