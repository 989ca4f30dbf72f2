"""From a stored image to a training sample, the window first: only what is kept is resized.

Every function takes and returns image (H,W,3) uint8 and target (H,W) uint8 together. The law of
the draws is that of MMSegmentation's RandomResize, RandomCrop, RandomFlip and
PhotoMetricDistortion: https://github.com/open-mmlab/mmsegmentation
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from pipeline.data.store import Array
from pipeline.params import Probability, Section, Size


class FlipParams(Section):
    """The probabilities of mirroring an image."""

    horizontal: Probability = 0.5
    vertical: Probability = 0.0


class AugmentationParams(Section):
    """The section `augmentation`: how a training sample is drawn from an image.

    `scale` (long side, short side) is what images are fitted into first, also in evaluation; null
    leaves them as they are. `ratio_range` is that of a random resize on top. A crop that one class
    fills more than `cat_max_ratio` is drawn again.
    """

    crop_size: Size
    scale: Size | None = None
    ratio_range: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = Field(gt=0, le=1, default=0.75)
    flip: FlipParams = FlipParams()
    photometric: bool = True

    @field_validator("ratio_range")
    @classmethod
    def _is_a_range(cls, ratios: tuple[float, float]) -> tuple[float, float]:
        if not 0 < ratios[0] <= ratios[1]:
            raise ValueError(f"must be [low, high] with 0 < low <= high, not {list(ratios)}")
        return ratios


class Window(NamedTuple):
    """A rectangle of the resized image."""

    top: int
    left: int
    height: int
    width: int


def augment(
    image: Array,
    target: Array,
    params: AugmentationParams,
    fill: tuple[int, ...],
    ignore_index: int,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """One random training sample of `crop_size`; `fill` is the grey that pads a small image."""
    size = resized(target.shape, params.scale, rng.uniform(*params.ratio_range))
    window = draw_window(target, size, params, ignore_index=ignore_index, rng=rng)
    image, target = resize_window(image, size, window), nearest_window(target, size, window)
    if rng.random() < params.flip.horizontal:
        image, target = image[:, ::-1], target[:, ::-1]
    if rng.random() < params.flip.vertical:
        image, target = image[::-1], target[::-1]
    if params.photometric:
        image = distort(np.ascontiguousarray(image), rng)
    return pad(image, target, params.crop_size, fill=fill, ignore_index=ignore_index)


def resized(
    shape: tuple[int, ...], scale: tuple[int, int] | None, ratio: float = 1.0
) -> tuple[int, int]:
    """Height and width that fit into `scale` (long side, short side) times `ratio`.

    Without a scale the image's own size times the ratio. The aspect is kept.
    """
    height, width = shape
    if scale is None:
        factor = ratio
    else:
        factor = min(
            int(max(scale) * ratio) / max(height, width),
            int(min(scale) * ratio) / min(height, width),
        )
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def draw_window(
    target: Array,
    size: tuple[int, int],
    params: AugmentationParams,
    ignore_index: int,
    rng: np.random.Generator,
) -> Window:
    """A crop of the resized image; redrawn up to 10 times while one class fills too much of it."""
    height, width = (min(crop, side) for crop, side in zip(params.crop_size, size, strict=True))
    for _ in range(11):
        top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
        window = Window(int(top), int(left), height, width)
        if params.cat_max_ratio == 1:
            break
        counts = np.bincount(nearest_window(target, size, window).ravel(), minlength=256)
        counts[ignore_index] = 0
        if np.count_nonzero(counts) > 1 and counts.max() < params.cat_max_ratio * counts.sum():
            break
    return window


def nearest_window(target: Array, size: tuple[int, int], window: Window) -> Array:
    """The window of the target resized to `size` by nearest neighbour, as OpenCV takes it."""
    if size == target.shape:
        return target[window.top :, window.left :][: window.height, : window.width]
    rows, columns = (
        # The inverse of the inverse: OpenCV's rounding.
        np.minimum(np.arange(start, start + count) * (1 / (side / source)), source - 1).astype(
            np.intp
        )
        for start, count, source, side in zip(
            window[:2], window[2:], target.shape, size, strict=True
        )
    )
    return target[np.ix_(rows, columns)]


def resize_window(image: Array, size: tuple[int, int], window: Window) -> Array:
    """The window of the image resized to `size` bilinearly, within one grey level of OpenCV.

    Both taps of every pixel are those of the whole image: clipped at its edge, not the window's.
    """
    if size == image.shape[:2]:
        return image[window.top :, window.left :][: window.height, : window.width]
    low, high, weight = _taps(image.shape[0], size[0], window.top, window.height)
    left, right, across = _taps(image.shape[1], size[1], window.left, window.width)
    columns = image[:, left[0] : right[-1] + 1]
    upper = columns[low].astype(np.float32)
    upper += (columns[high] - upper) * weight[:, None, None]
    left, right = left - left[0], right - left[0]
    result = upper[:, left]
    result += (upper[:, right] - result) * across[:, None]
    return np.rint(result).astype(np.uint8)


def _taps(
    source: int, side: int, start: int, count: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Lower and upper source index and the upper's weight, of `count` pixels from `start`."""
    position = (np.arange(start, start + count) + 0.5) * (source / side) - 0.5
    lower = np.floor(position)
    weight = (position - lower).astype(np.float32)
    low = np.clip(lower, 0, source - 1).astype(np.intp)
    high = np.clip(lower + 1, 0, source - 1).astype(np.intp)
    return low, high, weight


def distort(image: Array, rng: np.random.Generator) -> Array:
    """Brightness, contrast, saturation and hue, each with probability one half, by look-up tables.

    Contrast comes before saturation and hue or after them, a half each.
    """
    brighten, contrast, contrast_first, saturate, turn = rng.random(5) < 0.5
    levels = np.arange(256, dtype=np.float32)
    shift, gain = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
    saturation, hue = rng.uniform(0.5, 1.5), rng.integers(-18, 18)
    brightness_table = _to_uint8(levels + shift) if brighten else levels.astype(np.uint8)
    contrast_table = _to_uint8(levels * gain) if contrast else levels.astype(np.uint8)
    first = contrast_table[brightness_table] if contrast_first else brightness_table
    image = np.asarray(cv2.LUT(image, first), np.uint8)
    if saturate or turn:
        tables = np.stack([levels.astype(np.uint8)] * 3, axis=-1)
        if turn:
            tables[:, 0] = (levels + hue) % 180
        if saturate:
            tables[:, 1] = _to_uint8(levels * saturation)
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), tables[None])
        image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
    if not contrast_first:
        image = np.asarray(cv2.LUT(image, contrast_table), np.uint8)
    return image


def _to_uint8(levels: NDArray[np.float32]) -> Array:
    return np.clip(levels, 0, 255).astype(np.uint8)


def pad(
    image: Array, target: Array, size: tuple[int, int], fill: tuple[int, ...], ignore_index: int
) -> tuple[Array, Array]:
    """Fill up to `size` at the bottom and the right; the target with `ignore_index`."""
    height, width = target.shape
    if (height, width) == size:
        return image, target
    padded = np.empty((*size, 3), np.uint8)
    padded[:] = fill
    padded[:height, :width] = image
    labels = np.full(size, ignore_index, np.uint8)
    labels[:height, :width] = target
    return padded, labels


def fill_of(mean: Sequence[float]) -> tuple[int, ...]:
    """The uint8 colour that normalises to nearly 0: the mean that is subtracted, rounded."""
    return tuple(min(max(round(level), 0), 255) for level in mean)
