"""How far a score would vary, had other images been measured: bootstrap over groups of images.

A draw takes as many groups as there are, some of them several times, and the score of what it holds
is one that other images might have given. Source: Efron 1979, doi:10.1214/aos/1176344552.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics import Matrix, Scores, iou_of, mean_of

DRAWS = 2000
OUTSIDE = 0.05  # of the draws: an interval is one of 95%
SEED = 0
CHUNK = 2**22  # so many numbers are drawn at once

Interval = dict[str, float | None]


def intervals(areas: Matrix, groups: NDArray[Any], classes: Sequence[str]) -> dict[str, Any]:
    """The 95% intervals of mean IoU and of each class's, {"low": ..., "high": ...}.

    By the areas (N,3,C) of images, see `iou_of`, and their groups (N,). Both ends are None where
    fewer than two groups have anything to measure.
    """
    areas = by_group(areas, groups)
    drawn = bootstrap(areas, iou_of)
    each = sureness(areas)
    ends = [_ends(*column) for column in zip(drawn.T, each, strict=True)]
    return {
        "mean_iou": _ends(mean_of(drawn), joint_sureness(drawn, each)),
        "iou": dict(zip(classes, ends, strict=True)),
    }


def by_group(areas: Matrix, groups: NDArray[Any]) -> Matrix:
    """The areas (N,...) of images, added up for each of their groups, in the groups' order."""
    names, owners = np.unique(groups, return_inverse=True)
    total = np.zeros((len(names), *areas.shape[1:]), np.int64)
    np.add.at(total, owners, areas)
    return total


def bootstrap(areas: Matrix, score: Callable[[NDArray[Any]], Scores]) -> Scores:
    """What `score` makes of the summed areas (...) of each draw, from those of G groups (G,...).

    Equal numbers of groups are drawn alike: scores of two networks on the same images are paired.
    """
    rows = areas.reshape(len(areas), -1).astype(np.float64)  # which holds sums below 2^53 exactly
    return np.concatenate(
        [score((weights @ rows).reshape(-1, *areas.shape[1:])) for weights in _weights(len(areas))]
    )


def _weights(groups: int) -> Iterator[Scores]:
    """How often each draw (B,G) holds each group; DRAWS of them, in chunks."""
    rng = np.random.default_rng(SEED)
    size = max(CHUNK // groups, 1)
    for start in range(0, DRAWS, size):
        draws = min(size, DRAWS - start)
        held = rng.integers(groups, size=(draws, groups)) + groups * np.arange(draws)[:, None]
        counts = np.bincount(held.ravel(), minlength=draws * groups)
        yield counts.reshape(draws, groups).astype(np.float64)


class Sureness(NamedTuple):
    """How sure the spread of draws is, by which an interval is wider than they are.

    `freedom` are its degrees of freedom, and the true variance is `times` that of the draws: a
    bootstrap of n groups shows (n - 1) / n of it.
    """

    freedom: float
    times: float


def sureness(areas: Matrix) -> list[Sureness]:
    """That of the draws of each class's score, by the groups (G,...,3,C) that show the class."""
    shown = (areas[..., 1:, :].reshape(len(areas), -1, areas.shape[-1]) > 0).any(axis=1)
    counts = shown.sum(axis=0).tolist()
    return [Sureness(count - 1, count / max(count - 1, 1)) for count in counts]


def joint_sureness(drawn: Scores, each: Sequence[Sureness]) -> Sureness:
    """That of the mean of classes whose draws (B,C) are as sure as `each`.

    A mean of which most variance comes from a class in few groups is as unsure as that class.
    Source: Satterthwaite 1946, doi:10.2307/3002019
    """
    columns = [(column[~np.isnan(column)], own) for column, own in zip(drawn.T, each)]
    spread = [(float(column.var()), own) for column, own in columns if own.freedom > 0]
    shown = sum(one for one, _ in spread)
    if not shown:
        return max(each)
    true = [(one * own.times, own.freedom) for one, own in spread]
    total = sum(one for one, _ in true)
    return Sureness(total**2 / sum(one**2 / freedom for one, freedom in true), total / shown)


def _ends(drawn: Scores, sure: Sureness) -> Interval:
    """The interval of draws (B,).

    Its ends are further out than the draws' own quantiles, which is what few groups need: the
    expanded percentile interval of Hesterberg, https://arxiv.org/abs/1411.5279.
    """
    from scipy.special import ndtr, stdtrit  # here, as importing it takes half a second

    known = drawn[~np.isnan(drawn)]
    if sure.freedom <= 0 or not known.size:
        return {"low": None, "high": None}
    outside = ndtr(np.sqrt(sure.times) * stdtrit(sure.freedom, OUTSIDE / 2))
    low, high = np.quantile(known, [outside, 1 - outside]).tolist()
    return {"low": low, "high": high}
