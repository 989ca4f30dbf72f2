"""How sure a network may be: the temperature that its probabilities are calibrated by."""

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.data.store import Split, spread
from pipeline.evaluation.inference import PIXELS, Predictor

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
        labelled = np.flatnonzero(target != ignore_index)
        labelled = labelled[spread(len(labelled), PIXELS)]
        _, (probabilities,) = predictor.predict_at([image], [labelled])
        logs = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
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


def _lowest(means: list[float], best: int) -> float:
    """The temperature at the lowest point of the parabola through the best one's neighbours."""
    if best in (0, len(means) - 1):
        return float(TEMPERATURES[best])
    before, here, after = means[best - 1 : best + 2]
    curvature = before - 2 * here + after
    shift = (before - after) / (2 * curvature) if curvature > 0 else 0.0
    return round(float(TEMPERATURES[best] * 2.0 ** (0.125 * shift)), 3)
