"""The page of labels that look wrong: images in the order in which to look at them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from pipeline.data.table import Array
from pipeline.evaluation.report import blend, shrunk
from pipeline.pages import embedded, render
from pipeline.prediction.labels import Doubt

LONGEST = 480  # pixels of a picture's longer side: a page shows it no larger
MARK = (255, 0, 144)


class Suspect(NamedTuple):
    """An image that is shown, and its pictures by what they show."""

    name: str
    doubt: Doubt
    pictures: Mapping[str, str]


def pictures(
    layers: Sequence[Array], doubt: Doubt, palette: Sequence[Sequence[int]]
) -> dict[str, str]:
    """Addresses for <img> of an image, its target, its prediction and its unlikely pixels (H,W)."""
    image, target, prediction, unlikely = layers
    small = shrunk(image, LONGEST, cv2.INTER_AREA)
    maps = {"target": target, "prediction": prediction}
    shown = {
        name: blend(small, shrunk(labels, LONGEST, cv2.INTER_NEAREST), palette)
        for name, labels in maps.items()
    }
    marked = small // 2 + 64
    marked[shrunk(unlikely, LONGEST, cv2.INTER_NEAREST) > 0] = MARK
    if doubt.pixels:
        factor = small.shape[1] / image.shape[1]
        left, top, width, height = (round(side * factor) for side in doubt.box)
        marked = np.ascontiguousarray(marked)
        cv2.rectangle(marked, (left - 2, top - 2), (left + width + 1, top + height + 1), MARK, 1)
    layers_shown = {"image": small, **shown, "unlikely labels": marked}
    return {name: embedded(layer) for name, layer in layers_shown.items()}


def labels_page(
    suspects: Sequence[Suspect], total: int, legend: Sequence[tuple[str, Sequence[int]]]
) -> str:
    """HTML."""
    return render("labels.html", suspects=suspects, total=total, legend=legend)
