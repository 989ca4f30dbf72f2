"""Labels that look wrong: where a network that has not learned from an image is sure of others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.table import Array
from pipeline.prediction.model import Model, Sink

SOFTNESS = 0.1  # of the minimum over an image's pixels, as published
UNLIKELY = 0.1  # the probability of a label below which a pixel is one to look at


class Doubt(NamedTuple):
    """How good an image's labels look, 0 to 1, and where they look worst.

    `share` is that of the labelled pixels whose label is unlikely. The largest connected region of
    those has `pixels` within `box` (left, top, width, height), most of them with one `label` in
    place of one `prediction`; 0 pixels where no label is unlikely.
    """

    quality: float
    share: float
    pixels: int
    box: tuple[int, int, int, int]
    label: str
    prediction: str


def judge(model: Model, image: Array, target: Array) -> tuple[Doubt, Array, Array]:
    """The doubt about an image's target (H,W), the prediction (H,W), and where a label is unlikely.

    An image is as good as the soft minimum of its labels' probabilities, the score that finds
    wrong labels of segmentations best: https://arxiv.org/abs/2307.05080
    """
    probabilities = np.zeros(target.shape, np.float32)
    sink = _Judge(np.zeros(target.shape, np.uint8), probabilities, None, target)
    model.fill([(image, 1)], [sink])
    labelled = target < len(model.classes)
    likely = probabilities[labelled].astype(np.float64)
    weights = np.exp((1 - likely) / SOFTNESS - 1 / SOFTNESS)
    quality = float((likely * weights).sum() / weights.sum()) if likely.size else 1.0
    unlikely = labelled & (probabilities < UNLIKELY) & (sink.ids != target)
    share = float(unlikely.sum() / max(int(labelled.sum()), 1))
    region, box = _largest(unlikely)
    label = prediction = ""
    if region.any():
        pairs = target[region].astype(np.int64) * len(model.classes) + sink.ids[region]
        most = int(np.bincount(pairs).argmax())
        label, prediction = (model.classes[place] for place in divmod(most, len(model.classes)))
    pixels = int(np.count_nonzero(region))
    doubt = Doubt(quality, share, pixels, box=box, label=label, prediction=prediction)
    return doubt, sink.ids, unlikely.astype(np.uint8)


@dataclass(frozen=True)
class _Judge(Sink):
    """Takes the class of each pixel, and the probability of its label in place of a confidence."""

    target: Array

    def turned(self, orientation: int) -> "_Judge":
        return self  # a prepared image lies as the network sees it

    def take(self, rows: slice, scores: Tensor) -> None:
        assert self.confidence is not None
        found, target = scores.cpu().numpy(), self.target[rows]
        self.ids[rows] = found.argmax(axis=0)
        known = target < len(found)
        places = np.where(known, target, 0)[None].astype(np.int64)
        self.confidence[rows] = np.take_along_axis(found, places, axis=0)[0] * known


def _largest(mask: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], tuple[int, int, int, int]]:
    """The largest connected region of a mask (H,W), and its box: left, top, width, height."""
    count, regions, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 2:
        return np.zeros_like(mask), (0, 0, 0, 0)
    largest = 1 + int(boxes[1:, cv2.CC_STAT_AREA].argmax())
    left, top, width, height = (int(side) for side in boxes[largest, :4])
    return regions == largest, (left, top, width, height)


def ranked(doubts: Sequence[tuple[str, Doubt]]) -> list[tuple[str, Doubt]]:
    """By quality, the worst first; of equal ones the names decide."""
    return sorted(doubts, key=lambda one: (one[1].quality, one[0]))
