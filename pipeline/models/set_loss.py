"""The loss of a set of masks: each class in an image is matched to one query, which learns it.

Source: Mask2Former, https://arxiv.org/abs/2112.01527, after https://arxiv.org/abs/2005.12872
"""

import zlib
from typing import NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.models.keyed import uniform
from pipeline.models.network import Labels
from pipeline.models.pointrend import corners, sample
from pipeline.params import Above0, AtLeast0, Named, Points, Probability

NOTHING = -100  # the label of a query that learns no class, not even that there is none


class SetLossParams(Named):
    """Weights of the terms, in the loss as in the cost of a match, and where masks are compared.

    A query without a match learns, by `no_object_weight`, that there is no object. Masks are
    compared at `train_points` of an image; of `oversample_ratio` times as many candidates the share
    `importance_ratio` of them is chosen for being uncertain.
    """

    class_weight: AtLeast0 = 2.0
    mask_weight: AtLeast0 = 5.0
    dice_weight: AtLeast0 = 5.0
    no_object_weight: Above0 = 0.1
    train_points: Points = 12544
    oversample_ratio: float = Field(ge=1, le=100, default=3.0)
    importance_ratio: Probability = 0.75

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if self.class_weight == self.mask_weight == self.dice_weight == 0:
            raise InputError("class_weight, mask_weight and dice_weight are 0; give one of them")
        return self


class Prediction(NamedTuple):
    """What the queries say: classes (N,Q,C+1), the last is no object, and masks (N,Q,h,w)."""

    classes: Tensor
    masks: Tensor


class Labelled(NamedTuple):
    """What the target says of points: the share of a class in each, and of all but ignored pixels.

    A point lies between four pixels, which count by their distance.
    """

    inside: Tensor
    valid: Tensor


class SetLoss:
    """The loss of predictions against label maps, in which every class present is one mask.

    An ignored pixel belongs to no comparison of masks: where it takes part in a point, the point
    counts less. An image without a labelled pixel teaches nothing.
    """

    def __init__(self, params: SetLossParams, num_queries: int, labels: Labels) -> None:
        self.params = params
        self.num_queries = num_queries
        self.num_classes = labels.num_classes
        self.ignore_index = labels.ignore_index

    def count(self, target: Tensor) -> Tensor:
        """(N,H,W) uint8 -> the weights of all queries, summed, and the number of masks, (2,) fp64.

        Classes without a query of their own, where there are more classes than queries, don't
        count.
        """
        masks = self._present(target).sum(dim=1).clamp(max=self.num_queries).double()
        weights = masks + self.params.no_object_weight * (self.num_queries - masks)
        return torch.stack([torch.where(masks > 0, weights, 0).sum(), masks.sum()])

    def __call__(
        self,
        predictions: list[Prediction],
        extent: tuple[float, float],
        target: Tensor,
        keys: Tensor,
        divisors: Tensor,
    ) -> dict[str, Tensor]:
        """The three terms, each summed over the predictions, by its weight and its divisor.

        The masks cover more than the image, which takes the share `extent` of their height and
        width. keys (N,) name the samples; every point follows from them.
        """
        exact = [
            Prediction(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in prediction))
            for prediction in predictions
        ]
        with torch.autocast(target.device.type, enabled=False):
            present = self._present(target)
            matches = self._match(exact, extent, target, keys, present=present)
            known = present.any(dim=1)
            sums = torch.stack(
                [
                    self._sums(
                        prediction, match, extent, target, keys=keys, known=known, number=number
                    )
                    for number, (prediction, match) in enumerate(zip(exact, matches, strict=True))
                ]
            ).sum(dim=0)
        options = self.params
        return {
            "class": options.class_weight * sums[0] / divisors[0],
            "mask": options.mask_weight * sums[1] / divisors[1],
            "dice": options.dice_weight * sums[2] / divisors[1],
        }

    def _present(self, target: Tensor) -> Tensor:
        """(N,H,W) -> which classes are there, (N,C) bool."""
        found = torch.zeros(len(target), 256, dtype=torch.bool, device=target.device)
        return found.scatter_(1, target.flatten(1).long(), True)[:, : self.num_classes]

    @torch.no_grad()
    def _match(
        self,
        predictions: list[Prediction],
        extent: tuple[float, float],
        target: Tensor,
        keys: Tensor,
        present: Tensor,
    ) -> Tensor:
        """The cheapest matches, as rows of image, query and class, (predictions, matches, 3).

        All predictions are compared at the same points, each image's own.
        """
        points = uniform(keys, zlib.crc32(b"matching"), 2 * self.params.train_points)
        points = points.to(predictions[0].masks.dtype).view(len(target), -1, 2)
        images = torch.arange(len(target), device=target.device)
        classes = torch.arange(self.num_classes, device=target.device).expand(len(target), -1)
        labelled = self._labelled(target, images, points, classes)
        costs = torch.stack([self._cost(p, extent, points, labelled) for p in predictions])
        absent = ~present[None, :, None]
        costs = costs.nan_to_num(nan=1e9, posinf=1e9, neginf=-1e9).masked_fill(absent, torch.inf)
        return match(costs.cpu()).to(target.device)  # the only time that the device is waited for

    def _cost(
        self,
        prediction: Prediction,
        extent: tuple[float, float],
        points: Tensor,
        labelled: Labelled,
    ) -> Tensor:
        """What it costs to match a query to a class, (N,Q,C)."""
        logits = sample(prediction.masks, within(points, extent))  # (N,Q,P)
        inside, valid = labelled.inside.transpose(1, 2), labelled.valid[:, None]
        outside = valid.transpose(1, 2) - inside  # (N,P,C)
        counted = valid.sum(dim=2, keepdim=True).clamp(min=1)
        mask = (F.softplus(-logits) @ inside + F.softplus(logits) @ outside) / counted
        chance = logits.sigmoid()
        sizes = (chance * valid).sum(dim=2)[..., None] + inside.sum(dim=1)[:, None]
        dice = 1 - (2 * chance @ inside + 1) / (sizes + 1)
        wrong = -prediction.classes.softmax(dim=2)[..., :-1]
        options = self.params
        return (
            options.class_weight * wrong + options.mask_weight * mask + options.dice_weight * dice
        )

    def _sums(
        self,
        prediction: Prediction,
        match: Tensor,
        extent: tuple[float, float],
        target: Tensor,
        keys: Tensor,
        known: Tensor,
        number: int,
    ) -> Tensor:
        """Cross entropy of the classes, of the masks, and dice, each summed over queries, (3,)."""
        images, queries, classes = match.unbind(dim=1)
        labels = torch.where(known, self.num_classes, NOTHING)[:, None]
        labels = labels.repeat(1, self.num_queries)
        labels[images, queries] = classes
        weights = prediction.classes.new_ones(self.num_classes + 1)
        weights[-1] = self.params.no_object_weight
        wrong = F.cross_entropy(
            prediction.classes.flatten(0, 1),
            labels.flatten(),
            weights,
            ignore_index=NOTHING,
            reduction="sum",
        )
        masks = prediction.masks[images, queries][:, None]  # (M,1,h,w)
        points = self._points(masks, images, extent, target, keys=keys, number=number)
        inside, valid = self._labelled(target, images, points, classes[:, None])
        inside, logits = inside[:, 0], sample(masks, within(points, extent))[:, 0]  # (M,P)
        outside = valid - inside
        mask = (F.softplus(-logits) * inside + F.softplus(logits) * outside).sum(dim=1)
        mask = mask / valid.sum(dim=1).clamp(min=1)
        chance = logits.sigmoid()
        sizes = (chance * valid).sum(dim=1) + inside.sum(dim=1)
        dice = 1 - (2 * (chance * inside).sum(dim=1) + 1) / (sizes + 1)
        return torch.stack([wrong.double(), mask.double().sum(), dice.double().sum()])

    @torch.no_grad()
    def _points(
        self,
        masks: Tensor,
        images: Tensor,
        extent: tuple[float, float],
        target: Tensor,
        keys: Tensor,
        number: int,
    ) -> Tensor:
        """Where to compare each mask (M,1,h,w): (M,P,2), most where it is unsure.

        The rest is anywhere. The masks of an image choose among the same candidates.
        """
        count = self.params.train_points
        chosen = int(count * self.params.importance_ratio)
        candidates = int(count * self.params.oversample_ratio)
        salt = zlib.crc32(f"points.{number}".encode())
        drawn = uniform(keys, salt, 2 * (candidates + count - chosen))
        points = drawn.to(masks.dtype).view(len(keys), -1, 2)[images]
        some, rest = points[:, :candidates], points[:, candidates:]
        # Rounded, and the first of equals, as PointRend's are: the last digits, which vary with the
        # number of ranks, must not choose.
        doubt = (-sample(masks, within(some, extent))[:, 0].abs() * 1024).round()
        none = images.new_empty(len(images), 0)
        ignored = self._labelled(target, images, some, none).valid == 0
        doubt = doubt.masked_fill(ignored, -torch.inf)
        order = doubt.sort(dim=1, descending=True, stable=True).indices[:, :chosen]
        return torch.cat([some.gather(1, order[..., None].expand(-1, -1, 2)), rest], dim=1)

    def _labelled(
        self, target: Tensor, images: Tensor, points: Tensor, classes: Tensor
    ) -> Labelled:
        """Points (M,P,2) of images (M,), classes (M,K) -> shares (M,K,P) of classes, valid (M,P).

        As torch's grid_sample of a class's mask, with zeros outside and corners not aligned.
        """
        height, width = target.shape[1:]
        places, shares = corners(points, height, width)
        labels = target.flatten()[images[:, None, None] * (height * width) + places]
        inside = points.new_zeros(*classes.shape, points.shape[1])
        known, total = points.new_zeros(2, *points.shape[:2])
        for label, share in zip(labels.unbind(dim=2), shares.unbind(dim=2), strict=True):
            inside += (label[:, None] == classes[..., None]) * share[:, None]
            known += (label != self.ignore_index) * share
            total += share
        return Labelled(inside, known / total)


def within(points: Tensor, extent: tuple[float, float]) -> Tensor:
    """Points of an image -> of a map of which it takes the share `extent`, (height, width)."""
    height, width = extent
    if (height, width) == (1, 1):
        return points
    return torch.stack([points[..., 0] * width, points[..., 1] * height], dim=-1)


def match(costs: Tensor) -> Tensor:
    """The cheapest matches of queries to classes, by what each costs, infinite where absent.

    (predictions,N,Q,C) -> rows of image, query and class, (predictions, matches, 3): as many
    matches as there are classes, or queries where these are fewer.
    Source: https://doi.org/10.1002/nav.3800020109
    """
    from scipy.optimize import linear_sum_assignment  # 0.3 s, for this network alone

    table = costs.numpy()
    rows = []
    for prediction in table:
        matches = [np.empty((0, 3), np.int64)]
        for number, cost in enumerate(prediction):
            present = np.flatnonzero(np.isfinite(cost[0]))
            query, place = linear_sum_assignment(cost[:, present])
            image = np.full_like(query, number)
            matches.append(np.stack([image, query, present[place]], axis=1))
        rows.append(np.concatenate(matches))
    return torch.from_numpy(np.stack(rows))
