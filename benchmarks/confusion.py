"""Confusion of 200 maps of 512x683 with 150 classes, on one thread: images a second.

Each side has the maps in the type that its own evaluation gives it: ours uint8, theirs int64.
The results are the summed areas of every class, and must be equal to the pixel.
"""

import time
from collections.abc import Iterator

import numpy as np

from benchmarks.images import Array, blobs
from benchmarks.protocol import Case, Metrics, Round

CLASSES, IGNORED, MAPS = 150, 255, 200
CASES = [Case("200 maps of 512x683")]


def maps() -> list[tuple[Array, Array]]:
    """Targets and predictions: half of the regions agree, and 5% of the target is ignored."""
    pairs = []
    for number in range(MAPS):
        rng = np.random.default_rng(number)
        target = blobs(rng, 512, 683, CLASSES)
        prediction = np.where(rng.random(683) < 0.5, target, blobs(rng, 512, 683, CLASSES))
        target[:, :34] = IGNORED
        pairs.append((target, prediction.astype(np.uint8)))
    return pairs


def ours(case: str) -> Round:
    """`confusion_matrix`, added up; areas are its sums."""
    from pipeline.evaluation.metrics import confusion_matrix

    pairs = maps()

    def measure() -> tuple[Metrics, list[list[int]]]:
        total = np.zeros((CLASSES, CLASSES), np.int64)
        begin = time.perf_counter()
        for target, prediction in pairs:
            total += confusion_matrix(target, prediction, CLASSES, IGNORED)
        seconds = time.perf_counter() - begin
        labelled, predicted, both = total.sum(axis=1), total.sum(axis=0), np.diag(total)
        areas = [both, labelled + predicted - both, predicted, labelled]
        return {"images/s": MAPS / seconds}, [area.tolist() for area in areas]

    return measure


def theirs(case: str) -> Round:
    """`IoUMetric.intersect_and_union`, added up in float64, which holds such sums exactly."""
    import torch

    from benchmarks import theirs

    theirs.config("pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py")
    from mmseg.evaluation import IoUMetric

    pairs = maps()

    def typed() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for target, prediction in pairs:
            yield torch.from_numpy(prediction).long(), torch.from_numpy(target).long()

    def measure() -> tuple[Metrics, list[list[int]]]:
        totals = [torch.zeros(CLASSES, dtype=torch.float64) for _ in range(4)]
        seconds = 0.0
        for prediction, target in typed():  # whose conversion isn't timed
            begin = time.perf_counter()
            areas = IoUMetric.intersect_and_union(prediction, target, CLASSES, IGNORED)
            for total, area in zip(totals, areas, strict=True):
                total += area
            seconds += time.perf_counter() - begin
        return {"images/s": MAPS / seconds}, [total.long().tolist() for total in totals]

    return measure
