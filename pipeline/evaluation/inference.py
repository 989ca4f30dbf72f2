"""Predictions of whole images: at once or by a sliding window, in one view or in several."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import cv2
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline import distributed
from pipeline.data.store import Array, Split
from pipeline.data.transforms import resized
from pipeline.evaluation.metrics import ImageAreas, Matrix, confusion_matrix, image_areas
from pipeline.models.layers import bands, resized_band, taps
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
class View:
    """What a network made of images of `size` (H,W), as they are or mirrored.

    `windows` are the top, the left and the outputs of each window of `crop`; one holds the whole.
    What belongs to pixels is made from that band by band, and never whole: of many classes it would
    be the largest thing of all.
    """

    network: Network
    size: tuple[int, int]
    crop: tuple[int, int]
    windows: list[tuple[int, int, Any]]
    mirrored: bool

    def scores(self, shape: tuple[int, int], rows: slice) -> Tensor:
        """The scores (N,C,rows,W) of these rows of the unmirrored images at their own `shape`.

        A view's scores are resized to the image before anything is made of them, as in
        MMSegmentation's test-time augmentation: https://github.com/open-mmlab/mmsegmentation
        """
        own = self._scores(taps(self.size[0], shape[0], rows))
        own = own.flip(3) if self.mirrored else own
        return resized_band(own, self.size[0], shape, rows)

    def _scores(self, rows: slice) -> Tensor:
        """The scores of these rows of the view, averaged where windows overlap."""
        if len(self.windows) == 1:
            return self.network.scores(self.windows[0][2], self.size, rows)
        parts = []
        for top, left, outputs in self.windows:
            start, stop = max(rows.start, top), min(rows.stop, top + self.crop[0])
            if start < stop:
                scores = self.network.scores(outputs, self.crop, slice(start - top, stop - top))
                inside = slice(start - rows.start, stop - rows.start)
                parts.append((np.s_[..., inside, left : left + self.crop[1]], scores))
        first = parts[0][1]
        shape = (len(first), rows.stop - rows.start, self.size[1], first.shape[1])
        total = first.new_zeros(shape).permute(0, 3, 1, 2)  # classes side by side: resized_band
        count = first.new_zeros(shape[1:3])
        for area, scores in parts:
            total[area] += scores
            count[area] += 1
        return total.div_(count)


@dataclass(frozen=True)
class Predictor:
    """A network with all that turns stored images into predictions.

    `window` is crop and stride of the sliding window, None for whole images; `scale` is that of
    the augmentation, and `scales` are ratios to it, or to the image where it is None. So many
    images of one size as `batch_size` are predicted at once.
    """

    network: Network
    normalize: Normalization
    precision: Precision
    scale: tuple[int, int] | None
    window: tuple[Size, Size] | None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 1

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.normalize.mean.device

    @torch.no_grad()
    def predict(self, images: list[Array]) -> list[Array]:
        """Images (H,W,3) uint8 of one size -> their class ids (H,W) uint8, in eval mode."""
        found = [scores.argmax(dim=1).to(torch.uint8) for scores in self.scores(images)]
        return list(torch.cat(found, dim=1).cpu().numpy())

    @torch.no_grad()
    def scores(self, images: list[Array]) -> Iterator[Tensor]:
        """Bands of rows, (N,C,rows,W) from top to bottom, of which each goes before the next comes.

        They hold the scores of the only view, or the mean of all views' probabilities.
        """
        shape = (images[0].shape[0], images[0].shape[1])
        views = self._views(images)
        first = views[0].scores(shape, slice(0, 1))  # tells how many classes there are
        for rows in bands(slice(0, shape[0]), first.numel()):
            if len(views) == 1:
                yield views[0].scores(shape, rows)
                continue
            total = self.network.probabilities(views[0].scores(shape, rows))
            for view in views[1:]:
                total += self.network.probabilities(view.scores(shape, rows))
            yield total.div_(len(views))

    def _views(self, images: list[Array]) -> list[View]:
        """At each scale the images as they are and, if that is wanted, mirrored."""
        shape = (images[0].shape[0], images[0].shape[1])
        mirrors = (False, True) if self.flip else (False,)
        views: list[View] = []
        for ratio in self.scales:
            inputs = self._inputs(images, resized(shape, self.scale, ratio))
            views.extend(self.view(inputs, mirrored=mirrored) for mirrored in mirrors)
        return views

    def _inputs(self, images: list[Array], size: tuple[int, int]) -> Tensor:
        if size != images[0].shape[:2]:
            images = [np.asarray(cv2.resize(image, size[::-1]), np.uint8) for image in images]
        stacked = torch.from_numpy(np.stack(images)).to(self.device)
        normalised: Tensor = self.normalize(stacked)
        return normalised

    def view(self, inputs: Tensor, *, mirrored: bool = False) -> View:
        """Normalised images (N,3,H,W), and what the network makes of them, window by window."""
        size = (inputs.shape[2], inputs.shape[3])
        crop, stride = self.window or (size, size)
        crop = (min(crop[0], size[0]), min(crop[1], size[1]))
        inputs = inputs.flip(3) if mirrored else inputs
        windows = []
        with self.precision.autocast(self.device):
            for top in _starts(size[0], crop[0], stride[0]):
                for left in _starts(size[1], crop[1], stride[1]):
                    window = inputs[..., top : top + crop[0], left : left + crop[1]]
                    windows.append((top, left, self.network(window)))
        return View(self.network, size, crop=crop, windows=windows, mirrored=mirrored)


def _starts(side: int, window: int, step: int) -> list[int]:
    """Where windows begin; the last one is moved back to end at the edge."""
    last = max(side - window, 0)
    return [*range(0, last, step), last]


def predictions(
    predictor: Predictor, split: Split, indices: list[int]
) -> Iterator[tuple[int, Array, Array]]:
    """Index, target and prediction of each of `indices`; a batch of one size at a time."""
    predictor.network.eval()
    for batch in _batches(split, indices, predictor.batch_size):
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


def evaluate(predictor: Predictor, split: Split, num_classes: int, ignore_index: int) -> Matrix:
    """The confusion matrix of a split, (C,C) int64.

    Every image is measured on exactly one rank, and the result is the same on each.
    """
    total = np.zeros((num_classes, num_classes), np.int64)
    for _, target, prediction in predictions(predictor, split, _own(split)):
        total += confusion_matrix(target, prediction, num_classes, ignore_index)
    on_device = torch.from_numpy(total).to(predictor.device)
    summed: Matrix = distributed.sum_over_ranks(on_device).cpu().numpy()
    return summed


def evaluate_images(
    predictor: Predictor,
    split: Split,
    num_classes: int,
    ignore_index: int,
    keep: Callable[[int, Array], None],
) -> list[ImageAreas]:
    """What is found in each image of a split, by the same rules.

    `keep` gets the index and the prediction (H,W) of each image on the rank that has measured it.
    """
    own = []
    for index, target, prediction in predictions(predictor, split, _own(split)):
        keep(index, prediction)
        areas = image_areas(
            index, target, prediction, num_classes=num_classes, ignore_index=ignore_index
        )
        own.append(areas)
    return [one for part in distributed.gather_objects(own) for one in part]


def _own(split: Split) -> list[int]:
    """The images that this rank measures."""
    return list(range(distributed.rank(), len(split), distributed.world_size()))
