"""Predictions of whole images: at once or by a sliding window, in one view or in several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from pipeline import distributed
from pipeline.data.store import Split, spread
from pipeline.data.table import Array
from pipeline.data.transforms import resized
from pipeline.errors import InputError
from pipeline.evaluation.metrics import ImageAreas, Matrix, confusion_matrix, image_areas
from pipeline.models.layers import bands, resized_band, taps
from pipeline.models.network import Network
from pipeline.params import Batch, Positive, Ratio, Section, Size
from pipeline.precision import Normalization, Precision

PIXELS = 4096  # of an image, at most, at which it is asked how sure a network is
NOWHERE = np.zeros(0, np.intp)


class EvaluationParams(Section):
    """The section `evaluation`; every key is explained beside it in params.yaml."""

    interval: Positive
    mode: Literal["whole", "slide"]
    crop: Size
    stride: Size
    split: Literal["val", "test"]
    scales: tuple[Ratio, ...] = Field(min_length=1, max_length=64)
    flip: bool
    batch_size: Batch
    baseline: Literal["colour_rule"] | None

    @property
    def window(self) -> tuple[Size, Size] | None:
        """Crop and stride of the sliding window, None for whole images."""
        return (self.crop, self.stride) if self.mode == "slide" else None

    @model_validator(mode="after")
    def _windows_meet(self) -> Self:
        if any(step > side for step, side in zip(self.stride, self.crop, strict=True)):
            raise InputError(
                f"stride {list(self.stride)} leaves pixels between windows of {list(self.crop)}; "
                "it must not exceed crop"
            )
        return self


class View:
    """What a predictor's network makes of images at one scale, as they are or mirrored.

    `images` are (N,H,W,3) uint8, already of this scale. Windows are computed when the first of
    their rows is asked for and let go after the last: rows are asked for from top to bottom. What
    belongs to pixels is made band by band, too, and never whole: of many classes it would be the
    largest thing of all.
    """

    def __init__(self, predictor: "Predictor", images: Tensor, *, mirrored: bool = False) -> None:
        self.size = (images.shape[1], images.shape[2])
        self._predictor = predictor
        self._images = images.flip(2) if mirrored else images
        self._mirrored = mirrored
        crop, stride = predictor.window or (self.size, self.size)
        self._crop = (min(crop[0], self.size[0]), min(crop[1], self.size[1]))
        self._tops = _starts(self.size[0], self._crop[0], stride[0])
        self._lefts = _starts(self.size[1], self._crop[1], stride[1])
        self._windows: list[tuple[int, int, Any]] = []  # top, left and outputs of each

    def scores(self, shape: tuple[int, int], rows: slice) -> Tensor:
        """The scores (N,C,rows,W) of these rows of the unmirrored images at their own `shape`.

        A view's scores are resized to the image before anything is made of them, as in
        MMSegmentation's test-time augmentation: https://github.com/open-mmlab/mmsegmentation
        """
        own = self._scores(taps(self.size[0], shape[0], rows))
        own = own.flip(3) if self._mirrored else own
        return resized_band(own, self.size[0], shape, rows)

    def _scores(self, rows: slice) -> Tensor:
        """The scores of these rows of the view, averaged where windows overlap."""
        self._compute(rows)
        network = self._predictor.network
        if self._crop == self.size:
            return network.scores(self._windows[0][2], self.size, rows)
        parts = []
        for top, left, outputs in self._windows:
            start, stop = max(rows.start, top), min(rows.stop, top + self._crop[0])
            if start < stop:
                scores = network.scores(outputs, self._crop, slice(start - top, stop - top))
                inside = slice(start - rows.start, stop - rows.start)
                parts.append((np.s_[..., inside, left : left + self._crop[1]], scores))
        first = parts[0][1]
        shape = (len(first), rows.stop - rows.start, self.size[1], first.shape[1])
        total = first.new_zeros(shape).permute(0, 3, 1, 2)  # classes side by side: resized_band
        count = first.new_zeros(shape[1:3])
        for area, scores in parts:
            total[area] += scores
            count[area] += 1
        return total.div_(count)

    def _compute(self, rows: slice) -> None:
        """Have the windows of these rows, and none that ends above them."""
        height, width = self._crop
        self._windows = [one for one in self._windows if one[0] + height > rows.start]
        predictor = self._predictor
        while self._tops and self._tops[0] < rows.stop:
            top = self._tops.pop(0)
            for left in self._lefts:
                window = self._images[:, top : top + height, left : left + width]
                inputs = predictor.normalize(window.to(predictor.device))
                with predictor.precision.autocast(predictor.device):
                    self._windows.append((top, left, predictor.network(inputs)))


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
        return self.predict_at(images, [NOWHERE] * len(images))[0]

    @torch.no_grad()
    def predict_at(
        self, images: list[Array], pixels: Sequence[NDArray[np.intp]]
    ) -> tuple[list[Array], list[Tensor]]:
        """What `predict` gives, and the probabilities (P,C) at some pixels (P,) of each image.

        A pixel is its place in the image, row by row; those of an image are in ascending order.
        Both come from one pass of the network.
        """
        ids: list[Tensor] = []
        chosen: list[list[Tensor]] = [[] for _ in images]
        start, width = 0, images[0].shape[1]
        for scores in self.scores(images):
            ids.append(scores.argmax(dim=1).to(torch.uint8))
            stop = start + scores.shape[2] * width
            for parts, own, places in zip(chosen, scores, pixels, strict=True):
                first, last = np.searchsorted(places, (start, stop))
                inside = torch.from_numpy(places[first:last] - start).to(scores.device)
                parts.append(own[:, inside // width, inside % width])
            start = stop
        found = [torch.cat(parts, dim=1) for parts in chosen]  # (C,P)
        if self.views == 1:
            found = [self.network.probabilities(one[None, :, None])[0, :, 0] for one in found]
        return list(torch.cat(ids, dim=1).cpu().numpy()), [one.T for one in found]

    def probabilities(self, images: list[Array]) -> Iterator[Tensor]:
        """Bands of rows, (N,C,rows,W) from top to bottom, of which each goes before the next comes.

        They hold the mean of all views' probabilities.
        """
        for band in self.scores(images):
            yield self.network.probabilities(band) if self.views == 1 else band

    @property
    def views(self) -> int:
        """As how many images the network sees one."""
        return len(self.scales) * (1 + self.flip)

    @torch.no_grad()
    def scores(self, images: list[Array]) -> Iterator[Tensor]:
        """Bands as of `probabilities`, but of the only view's scores, where there is one alone."""
        shape = (images[0].shape[0], images[0].shape[1])
        views = self._views(images)
        first = views[0].scores(shape, slice(0, 1))  # tells how many classes there are
        for rows in bands(slice(0, shape[0]), first.numel()):
            distributed.alive()
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
            size = resized(shape, self.scale, ratio)
            stacked = torch.from_numpy(_at(images, size))
            views.extend(View(self, stacked, mirrored=mirrored) for mirrored in mirrors)
        return views


def _at(images: list[Array], size: tuple[int, int]) -> Array:
    """Images of one size, stacked, at another: (N,H,W,3)."""
    if size != images[0].shape[:2]:
        images = [np.asarray(cv2.resize(image, size[::-1]), np.uint8) for image in images]
    one = images[0]
    if len(images) == 1 and one.flags.c_contiguous and one.flags.writeable:  # as torch wants them
        return one[None]
    return np.stack(images)


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


def evaluate(
    predictor: Predictor,
    split: Split,
    num_classes: int,
    ignore_index: int,
    asked: Callable[[], bool] = lambda: False,
) -> Matrix | None:
    """The confusion matrix of a split, (C,C) int64.

    Every image is measured on exactly one rank, and the result is the same on each: None where any
    of them was `asked`, between two images, to stop.
    """
    total = np.zeros((num_classes, num_classes), np.int64)
    stopped = False
    for _, target, prediction in predictions(predictor, split, _own(split)):
        total += confusion_matrix(target, prediction, num_classes, ignore_index)
        if stopped := asked():
            break
    on_device = torch.from_numpy(np.append(total, stopped)).to(predictor.device)
    summed: Matrix = distributed.sum_over_ranks(on_device).cpu().numpy()
    return None if summed[-1] else summed[:-1].reshape(total.shape)


def evaluate_images(
    predictor: Predictor,
    split: Split,
    num_classes: int,
    ignore_index: int,
    keep: Callable[[int, Array], None],
    look: Callable[[Tensor, Array], None],
) -> list[ImageAreas]:
    """What is found in each image of a split, by the same rules.

    On the rank that has measured an image, `keep` gets its index and prediction (H,W), and `look`
    the probabilities (P,C) and the labels (P,) of its labelled pixels, or of PIXELS of them.
    """
    predictor.network.eval()
    found = []
    for batch in _batches(split, _own(split), predictor.batch_size):
        images, targets = zip(*(split[index] for index in batch), strict=True)
        pixels = [some_labelled(target, ignore_index) for target in targets]
        predicted, probabilities = predictor.predict_at(list(images), pixels)
        for index, target, places, prediction, sure in zip(
            batch, targets, pixels, predicted, probabilities, strict=True
        ):
            keep(index, prediction)
            look(sure, target.ravel()[places])
            areas = image_areas(
                index, target, prediction, num_classes=num_classes, ignore_index=ignore_index
            )
            found.append(areas)
    distributed.at("the gathering of all images' areas")
    return [one for part in distributed.gather_objects(found) for one in part]


def some_labelled(target: Array, ignore_index: int) -> NDArray[np.intp]:
    """The places of a target's labelled pixels, row by row: PIXELS of them, or all."""
    places = np.flatnonzero(target != ignore_index)
    return places[spread(len(places), PIXELS)]


def _own(split: Split) -> list[int]:
    """The images that this rank measures."""
    return list(range(distributed.rank(), len(split), distributed.world_size()))
