"""Predictions of whole images: at once or by a sliding window, in one view or in several."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import cv2
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from pipeline import distributed
from pipeline.data.store import Array, Split
from pipeline.data.transforms import resized
from pipeline.evaluation.metrics import Matrix, boundary_areas, confusion_matrix, mean_iou
from pipeline.models.network import Network
from pipeline.params import Above0, Positive, Section, Size
from pipeline.precision import Normalization, Precision


class EvaluationParams(Section):
    """The section `evaluation`; every key is explained beside it in params.yaml."""

    interval: Positive
    mode: Literal["whole", "slide"]
    crop: Size
    stride: Size
    split: Literal["val", "test"]
    scales: tuple[Above0, ...] = Field(min_length=1)
    flip: bool
    batch_size: Positive
    baseline: Literal["colour_rule"] | None

    @property
    def window(self) -> tuple[Size, Size] | None:
        """Crop and stride of the sliding window, None for whole images."""
        return (self.crop, self.stride) if self.mode == "slide" else None

    @model_validator(mode="after")
    def _windows_meet(self) -> Self:
        if any(step > side for step, side in zip(self.stride, self.crop, strict=True)):
            raise ValueError(
                f"stride {list(self.stride)} leaves pixels between windows of {list(self.crop)}; "
                "it must not exceed crop"
            )
        return self


@dataclass(frozen=True)
class Predictor:
    """A network with all that turns stored images into predictions.

    `window` is crop and stride of the sliding window, None for whole images; `scale` is that of
    the augmentation, and `scales` are ratios to it, or to the image where it is None.
    """

    network: Network
    normalize: Normalization
    precision: Precision
    scale: tuple[int, int] | None
    window: tuple[Size, Size] | None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.normalize.mean.device

    @torch.no_grad()
    def predict(self, images: list[Array]) -> list[Array]:
        """Images (H,W,3) uint8 of one size -> their class ids (H,W) uint8, in eval mode."""
        return list(self.scores(images).argmax(dim=1).to("cpu", torch.uint8).numpy())

    @torch.no_grad()
    def scores(self, images: list[Array]) -> Tensor:
        """The scores (N,C,H,W) of the only view, or the mean of all views' probabilities.

        A view's scores are resized to the image first, as in MMSegmentation's test-time
        augmentation: https://github.com/open-mmlab/mmsegmentation
        """
        views = self._views(images)
        count = len(self.scales) * (1 + self.flip)
        if count == 1:
            return next(views)
        total = self.network.probabilities(next(views))
        for scores in views:
            total = total + self.network.probabilities(scores)
        return total / count

    def _views(self, images: list[Array]) -> Iterator[Tensor]:
        """Scores (N,C,H,W) at each scale, as it is and mirrored."""
        shape = images[0].shape[:2]
        for ratio in self.scales:
            size = resized(shape, self.scale, ratio)
            inputs = self._inputs(images, size)
            for mirrored in (False, True) if self.flip else (False,):
                scores = self._score(inputs.flip(3) if mirrored else inputs)
                scores = scores.flip(3) if mirrored else scores
                if size != shape:
                    scores = F.interpolate(scores, shape, mode="bilinear", align_corners=False)
                yield scores

    def _inputs(self, images: list[Array], size: tuple[int, int]) -> Tensor:
        if size != images[0].shape[:2]:
            images = [np.asarray(cv2.resize(image, size[::-1]), np.uint8) for image in images]
        stacked = torch.from_numpy(np.stack(images)).to(self.device)
        normalised: Tensor = self.normalize(stacked)
        return normalised

    def _score(self, inputs: Tensor) -> Tensor:
        """Scores (N,C,H,W) of normalised images."""
        if self.window is None:
            return self._whole(inputs)
        return slide(self._whole, inputs, *self.window)

    def _whole(self, inputs: Tensor) -> Tensor:
        with self.precision.autocast(self.device):
            outputs = self.network(inputs)
        height, width = inputs.shape[2:]
        return self.network.scores(outputs, (height, width))


def slide(score: Callable[[Tensor], Tensor], images: Tensor, crop: Size, stride: Size) -> Tensor:
    """Scores (N,C,H,W) of windows of `crop` every `stride` pixels, averaged where they overlap.

    The last window of a row or column is moved back to end at the edge.
    """
    tops, lefts = (
        _starts(side, window, step)
        for side, window, step in zip(images.shape[2:], crop, stride, strict=True)
    )
    total, count = None, images.new_zeros(images.shape[2:], dtype=torch.int64)
    for top in tops:
        for left in lefts:
            area = np.s_[..., top : top + crop[0], left : left + crop[1]]
            scores = score(images[area])
            if total is None:
                total = scores.new_zeros((*scores.shape[:2], *images.shape[2:]))
            total[area] += scores
            count[area] += 1
    assert total is not None
    averaged: Tensor = total / count
    return averaged


def _starts(side: int, window: int, step: int) -> list[int]:
    last = max(side - window, 0)
    return [*range(0, last, step), last]


def predictions(
    predictor: Predictor, split: Split, indices: list[int], batch_size: int = 1
) -> Iterator[tuple[int, Array, Array]]:
    """Index, target and prediction of each of `indices`; up to batch_size of one size at a time."""
    predictor.network.eval()
    for batch in _batches(split, indices, batch_size):
        pairs = [split[index] for index in batch]
        predicted = predictor.predict([image for image, _ in pairs])
        for index, (_, target), prediction in zip(batch, pairs, predicted, strict=True):
            yield index, target, prediction


def _batches(split: Split, indices: list[int], batch_size: int) -> Iterator[list[int]]:
    """Neighbours of equal size together: images of several sizes don't stack."""
    batch: list[int] = []
    for index in indices:
        entry = split.entries[index]
        if batch:
            first = split.entries[batch[0]]
            same = (first.height, first.width) == (entry.height, entry.width)
            if len(batch) == batch_size or not same:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def evaluate(
    predictor: Predictor,
    split: Split,
    num_classes: int,
    ignore_index: int,
    batch_size: int = 1,
    boundaries: bool = False,
) -> tuple[Matrix, Matrix, list[tuple[int, float]]]:
    """Sums over a split, and the mean IoU of every image by its index.

    The sums are the confusion matrix, (C,C) int64, and the `boundary_areas`, (2,C) int64, which
    are zero unless asked for. Every image is measured on exactly one rank, and the result is the
    same on each.
    """
    own = list(range(distributed.rank(), len(split), distributed.world_size()))
    total, boundary = (np.zeros((rows, num_classes), np.int64) for rows in (num_classes, 2))
    scores = []
    for index, target, prediction in predictions(predictor, split, own, batch_size):
        confusion = confusion_matrix(target, prediction, num_classes, ignore_index)
        scores.append((index, mean_iou(confusion)))
        total += confusion
        if boundaries:
            boundary += boundary_areas(target, prediction, num_classes, ignore_index)
    total, boundary = (
        distributed.sum_over_ranks(torch.from_numpy(sums).to(predictor.device)).cpu().numpy()
        for sums in (total, boundary)
    )
    gathered = distributed.gather_objects(scores)
    return total, boundary, sorted(score for part in gathered for score in part)
