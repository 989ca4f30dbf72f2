"""How sure a network may be: the temperature that its probabilities are calibrated by."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.store import Array, Split, spread
from pipeline.evaluation.inference import Predictor

IMAGES = 256  # at most, spread over the split
PIXELS = 4096  # at most of each, spread over its labelled ones
TEMPERATURES = (2.0 ** np.arange(-4, 4.01, 0.125)).tolist()


@torch.no_grad()
def fit_temperature(
    predictor: Predictor, split: Split, ignore_index: int
) -> tuple[float, float, float] | None:
    """The temperature under which the labels of a split are likeliest.

    With it come the mean negative log-likelihood of a pixel's label without and with it. None where
    no pixel is labelled. Source: https://arxiv.org/abs/1706.04599
    """
    predictor.network.eval()
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    count = 0
    for index in spread(len(split), IMAGES).tolist():
        image, target = split[index]
        labelled = np.flatnonzero(target != ignore_index)
        labelled = labelled[spread(len(labelled), PIXELS)]
        for logs, labels in _chosen(predictor, image, target, labelled):
            losses += torch.stack(
                [F.cross_entropy(logs / t, labels, reduction="sum").double() for t in TEMPERATURES]
            ).cpu()
            count += len(labels)
    if not count:
        return None
    means = (losses / count).tolist()
    best = int(np.argmin(means))
    return (
        _lowest(means, best),
        means[TEMPERATURES.index(1.0)],
        means[best],
    )


def _chosen(
    predictor: Predictor, image: Array, target: Array, pixels: NDArray[Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logarithms of the probabilities (P,C) and labels (P,) of some pixels, in parts."""
    width, top = target.shape[1], 0
    for band in predictor.probabilities([image]):
        stop = top + band.shape[2]
        inside = pixels[(pixels >= top * width) & (pixels < stop * width)]
        places = torch.from_numpy(inside - top * width).to(band.device)
        logs = band[0].flatten(1)[:, places].T
        logs = logs.clamp(min=torch.finfo(logs.dtype).tiny).log()
        labels = torch.from_numpy(target.ravel()[inside].astype(np.int64)).to(band.device)
        yield logs, labels
        top = stop


def _lowest(means: list[float], best: int) -> float:
    """The temperature at the lowest point of the parabola through the best one's neighbours."""
    if best in (0, len(means) - 1):
        return float(TEMPERATURES[best])
    before, here, after = means[best - 1 : best + 2]
    curvature = before - 2 * here + after
    shift = (before - after) / (2 * curvature) if curvature > 0 else 0.0
    return round(float(TEMPERATURES[best] * 2.0 ** (0.125 * shift)), 3)
