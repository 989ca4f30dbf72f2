"""Predictions of whole images: at once or by a sliding window, in one view or in several."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import distributed
from pipeline.data.store import Split
from pipeline.data.transforms import DTYPES, autocast, normalize, resized
from pipeline.evaluation.metrics import Matrix, boundary_areas, confusion_matrix, mean_iou
from pipeline.params import EvaluationParams, ModelParams

Array = NDArray[np.uint8]


@dataclass(frozen=True)
class Predictor:
    """A model with all that turns stored images into predictions.

    `window` is crop and stride of the sliding window, None for whole images; `scale` is that of
    the augmentation, and `scales` are ratios to it, or to the image where it is None.
    """

    model: nn.Module
    device: torch.device
    precision: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: tuple[int, int] | None
    window: tuple[tuple[int, int], tuple[int, int]] | None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @torch.no_grad()
    def predict(self, images: list[Array]) -> list[Array]:
        """Images (H,W,3) uint8 of one size -> their class ids (H,W) uint8, in eval mode."""
        return list(self.scores(images).argmax(dim=1).to("cpu", torch.uint8).numpy())

    @torch.no_grad()
    def scores(self, images: list[Array]) -> Tensor:
        """The logits (N,C,H,W) of the only view, or the mean of all views' probabilities.

        A view's logits are resized to the image before the softmax, as in MMSegmentation's
        test-time augmentation: https://github.com/open-mmlab/mmsegmentation
        """
        views = self._views(images)
        count = len(self.scales) * (1 + self.flip)
        if count == 1:
            return next(views)
        total = torch.zeros(())
        for logits in views:
            total = total + logits.softmax(dim=1)
        return total / count

    def _views(self, images: list[Array]) -> Iterator[Tensor]:
        """Logits (N,C,H,W) at each scale, as it is and mirrored."""
        shape = images[0].shape[:2]
        for ratio in self.scales:
            size = resized(shape, self.scale, ratio)
            inputs = self._inputs(images, size)
            for mirrored in (False, True) if self.flip else (False,):
                with autocast(self.device, self.precision):
                    logits = self._logits(inputs.flip(3) if mirrored else inputs)
                logits = logits.flip(3) if mirrored else logits
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                if size != shape:
                    logits = F.interpolate(logits, shape, mode="bilinear", align_corners=False)
                yield logits

    def _inputs(self, images: list[Array], size: tuple[int, int]) -> Tensor:
        if size != images[0].shape[:2]:
            images = [np.asarray(cv2.resize(image, size[::-1]), np.uint8) for image in images]
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device)
        return normalize(stacked, self.mean, self.std, DTYPES[self.precision])

    def _logits(self, inputs: Tensor) -> Tensor:
        if self.window is None:
            logits: Tensor = self.model(inputs)
            return logits
        return slide(self.model, inputs, *self.window)


def slide(
    model: nn.Module, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Logits (N,C,H,W) of windows of `crop` every `stride` pixels, averaged where they overlap.

    The last window of a row or column is moved back to end at the edge.
    """
    tops, lefts = (
        _starts(side, window, step)
        for side, window, step in zip(images.shape[2:], crop, stride, strict=True)
    )
    total, count = None, images.new_zeros(images.shape[2:])
    for top in tops:
        for left in lefts:
            area = np.s_[..., top : top + crop[0], left : left + crop[1]]
            logits = model(images[area])
            if total is None:
                total = images.new_zeros((*logits.shape[:2], *images.shape[2:]))
            total[area] += logits
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
    predictor.model.eval()
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


def build_predictor(
    model: nn.Module,
    device: torch.device,
    precision: str,
    trained: ModelParams,
    scale: tuple[int, int] | None,
    evaluation: EvaluationParams,
) -> Predictor:
    """A model with the preprocessing it knows, at one scale, unflipped."""
    window = (evaluation.crop, evaluation.stride) if evaluation.mode == "slide" else None
    return Predictor(model, device, precision, trained.mean, trained.std, scale, window)


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
