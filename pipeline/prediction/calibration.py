"""How sure a network may be: the temperature that its probabilities are calibrated by."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.store import Split, spread
from pipeline.evaluation.inference import Predictor, some_labelled

IMAGES = 256  # at most, spread over the split
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
        labelled = some_labelled(target, ignore_index)
        _, (probabilities,) = predictor.predict_at([image], [labelled])
        logs = logarithms(probabilities)
        labels = torch.from_numpy(target.ravel()[labelled].astype(np.int64)).to(logs.device)
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


def calibrated(probabilities: Tensor, temperature: float | None) -> Tensor:
    """Probabilities (N,C,...) -> the same, less sure where the temperature is above 1.

    For a softmax of logits this is the softmax of logits / temperature.
    """
    if temperature is None:
        return probabilities
    return logarithms(probabilities).div_(temperature).movedim(1, -1).softmax(dim=-1).movedim(-1, 1)


def logarithms(probabilities: Tensor) -> Tensor:
    """Of probabilities, which may be 0: a new tensor, finite everywhere."""
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log_()


def _lowest(means: list[float], best: int) -> float:
    """The temperature at the lowest point of the parabola through the best one's neighbours."""
    if best in (0, len(means) - 1):
        return float(TEMPERATURES[best])
    before, here, after = means[best - 1 : best + 2]
    curvature = before - 2 * here + after
    shift = (before - after) / (2 * curvature) if curvature > 0 else 0.0
    return round(float(TEMPERATURES[best] * 2.0 ** (0.125 * shift)), 3)
