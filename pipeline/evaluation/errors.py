"""Where the wrong pixels are: near a boundary or inside, in small regions or in large ones."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.store import Split
from pipeline.data.table import Array
from pipeline.evaluation.metrics import Matrix, boundary_width

SIZES = ("small", "medium", "large")


class Part(NamedTuple):
    """Labelled pixels, and how many of them are wrong."""

    pixels: int
    wrong: int

    @property
    def rate(self) -> float:
        """The share of its pixels that is wrong; nan without any."""
        return self.wrong / self.pixels if self.pixels else float("nan")


class Regions(NamedTuple):
    """The connected regions of the targets that have from `smallest` to `largest` pixels.

    There are `number` of them; of `missed` ones no pixel is right.
    """

    size: str
    number: int
    missed: int
    smallest: int
    largest: int
    part: Part


class Places(NamedTuple):
    """Where a split's errors are.

    `near` are the pixels near a boundary, see `near_boundary`, by widths from `widths[0]` to
    `widths[1]`; `inside` are the others. `regions` are a third of all each, by their size.
    """

    near: Part
    inside: Part
    widths: tuple[int, int]
    regions: list[Regions]

    @property
    def wrong(self) -> int:
        """All wrong pixels."""
        return self.near.wrong + self.inside.wrong


def places(split: Split, read: Callable[[int], Array], ignore_index: int) -> Places:
    """Where the wrong pixels of a split are, by the prediction (H,W) that `read` has of an index.

    A region is what is connected in a target, over corners too.
    """
    near, inside = np.zeros(2, np.int64), np.zeros(2, np.int64)
    widths, regions = [], [np.zeros((0, 2), np.int64)]
    for index, entry in enumerate(split.entries):
        _, target = split[index]
        labelled = target != ignore_index
        wrong = labelled & (read(index) != target)
        width = boundary_width(target.shape)
        close = labelled & near_boundary(target, width, ignore_index)
        near += (close.sum(), (close & wrong).sum())
        inside += ((labelled & ~close).sum(), (~close & wrong).sum())
        widths.append(width)
        regions += [_regions(target == label, wrong) for label in entry.classes]
    return Places(
        Part(*near.tolist()),
        Part(*inside.tolist()),
        (min(widths), max(widths)),
        by_size(np.concatenate(regions)),
    )


def near_boundary(target: Array, width: int, ignore_index: int) -> NDArray[np.bool_]:
    """Where the square of `width` pixels around a labelled pixel (H,W) shows another class.

    That is the boundary of boundary IoU, https://arxiv.org/abs/2103.16562, without the edges of the
    image and of what is not labelled: nothing is mistaken for another class there.
    """
    labelled = target != ignore_index
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    highest = cv2.dilate(np.where(labelled, target, 0).astype(np.uint8), square)
    lowest = cv2.erode(np.where(labelled, target, 255).astype(np.uint8), square)
    return np.asarray(labelled & (highest != lowest))


def _regions(mask: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> Matrix:
    """The pixels of each connected region of a mask (H,W), and its wrong ones: (R,2)."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8))
    flat = labels.ravel()
    pixels = np.bincount(flat, minlength=count)
    lost = np.bincount(flat[wrong.ravel()], minlength=count)
    return np.stack([pixels, lost], axis=1)[1:].astype(np.int64)  # the first is what is not in it


def by_size(regions: Matrix) -> list[Regions]:
    """Regions (R,2) by their pixels: the smallest third, the next and the largest.

    Regions of one size stay together, so a third may be empty, and is left out then.
    """
    if not len(regions):
        return []
    ends = np.quantile(regions[:, 0], (1 / 3, 2 / 3), method="inverted_cdf")
    third = np.searchsorted(ends, regions[:, 0])
    found = [(size, regions[third == number]) for number, size in enumerate(SIZES)]
    return [
        Regions(
            size,
            len(own),
            missed=int((own[:, 0] == own[:, 1]).sum()),
            smallest=int(own[:, 0].min()),
            largest=int(own[:, 0].max()),
            part=Part(*own.sum(axis=0).tolist()),
        )
        for size, own in found
        if len(own)
    ]


class Pair(NamedTuple):
    """How many pixels of one class were taken for another, and their share of all wrong ones."""

    target: str
    prediction: str
    pixels: int
    share: float


def confused(confusion: Matrix, classes: Sequence[str], count: int) -> list[Pair]:
    """The pairs of classes that are confused most, most first; none without a wrong pixel."""
    wrong: NDArray[Any] = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    total = wrong.sum()
    return [
        Pair(classes[row], classes[column], int(wrong[row, column]), wrong[row, column] / total)
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]
