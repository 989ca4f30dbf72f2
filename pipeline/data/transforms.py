"""From a stored image to a training sample, the window first: only what is kept is resized.

Every function takes and returns image (H,W,3) uint8 and target (H,W) uint8 together. The law of
the draws is that of MMSegmentation's RandomResize, RandomCrop, RandomFlip and
PhotoMetricDistortion: https://github.com/open-mmlab/mmsegmentation
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from pipeline.data.table import Array
from pipeline.errors import InputError
from pipeline.params import Probability, Ratio, Section, Size

Crop = Annotated[int, Field(ge=4, le=16384)]  # the side of a sample, in pixels


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

    crop_size: tuple[Crop, Crop]
    scale: Size | None = None
    ratio_range: tuple[Ratio, Ratio] = (0.5, 2.0)
    cat_max_ratio: float = Field(gt=0, le=1, default=0.75)
    flip: FlipParams = FlipParams()
    photometric: bool = True

    @field_validator("ratio_range")
    @classmethod
    def _is_a_range(cls, ratios: tuple[float, float]) -> tuple[float, float]:
        if not ratios[0] <= ratios[1]:
            raise InputError(f"must be [low, high] with low <= high, not {list(ratios)}")
        return ratios


class Window(NamedTuple):
    """A rectangle of the resized image, whose place is a whole pixel of the stored one.

    `top` and `left` count pixels of the stored image, `height` and `width` those of the sample. The
    rectangle begins at its place or, in a magnified image, less than a pixel of the sample before.
    """

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
    window, target = draw_window(target, size, params, ignore_index=ignore_index, rng=rng)
    image = resize_window(image, size, window)
    for axis, chance in ((1, params.flip.horizontal), (0, params.flip.vertical)):
        if rng.random() < chance:
            image, target = (np.asarray(cv2.flip(x, axis), np.uint8) for x in (image, target))
    if params.photometric:
        image = distort(image, rng)
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
) -> tuple[Window, Array]:
    """A crop of the resized image, redrawn up to 10 times while one class fills too much of it.

    With the target that it cuts out.

    A place is a whole pixel of the stored image, where MMSegmentation takes one of the resized
    image: as even a spread over the same range, which one plain resize cuts out.
    """
    height, width = (min(crop, side) for crop, side in zip(params.crop_size, size, strict=True))
    rows, columns = (
        source * (side - window) // side + 1  # places from which the window stays inside
        for source, side, window in zip(target.shape, size, (height, width), strict=True)
    )
    for _ in range(11):
        window = Window(int(rng.integers(rows)), int(rng.integers(columns)), height, width)
        seen = nearest_window(target, size, window)
        ratio = params.cat_max_ratio
        if ratio == 1 or not one_class_fills(seen, ratio, ignore_index):
            break
    return window, seen


def one_class_fills(labels: Array, share: float, ignore_index: int) -> bool:
    """Whether one class has this share of the labelled pixels, below 1, or none is labelled.

    Of labels (H,W) uint8. To count one class is ten times cheaper than to count each: so they are
    counted one by one, the most frequent of a few pixels first, until the others can't have it.
    """
    labelled = left = labels.size - _count(labels, ignore_index)
    few = _counts(np.ascontiguousarray(labels[::8, ::8]), ignore_index)
    for one in np.argsort(-few, kind="stable")[: np.count_nonzero(few)].tolist():
        count = _count(labels, one)
        left -= count
        if count >= share * labelled:
            return True
        if left < share * labelled:
            return False
    return bool(_counts(labels, ignore_index).max() >= share * labelled)


def _counts(labels: Array, ignore_index: int) -> NDArray[np.float32]:
    """The pixels of each id, (256,), without the ignored ones."""
    counts = np.asarray(cv2.calcHist([labels], [0], None, [256], [0, 256]), np.float32).ravel()
    counts[ignore_index] = 0
    return counts


def _count(labels: Array, one: int) -> int:
    return cv2.countNonZero(cv2.inRange(labels, (one,), (one,)))


def nearest_window(target: Array, size: tuple[int, int], window: Window) -> Array:
    """The window of the target resized to `size` by nearest neighbour, as OpenCV takes it."""
    return _cut(target, size, window, cv2.INTER_NEAREST)


def resize_window(image: Array, size: tuple[int, int], window: Window) -> Array:
    """The window of the image resized to `size` bilinearly, as OpenCV resizes the whole."""
    return _cut(image, size, window, cv2.INTER_LINEAR)


def _cut(source: Array, size: tuple[int, int], window: Window, interpolation: int) -> Array:
    """Resize no more than the window needs, by the factors of the whole."""
    if size == source.shape[:2]:
        return source[window.top :, window.left :][: window.height, : window.width]
    (rows, top), (columns, left) = (
        _span(stored, side, start, count)
        for stored, side, start, count in zip(
            source.shape, size, window[:2], window[2:], strict=False
        )
    )
    part = cv2.resize(
        source[rows, columns],
        None,
        fx=size[1] / source.shape[1],
        fy=size[0] / source.shape[0],
        interpolation=interpolation,
    )
    return np.asarray(part, np.uint8)[top:, left:][: window.height, : window.width]


def _span(stored: int, side: int, start: int, count: int) -> tuple[slice, int]:
    """The stored pixels that `count` pixels of a window need, and the resized ones to drop first.

    They are a pixel more than the window covers, at its beginning where it magnifies and at its
    end, so that no value is made of a pixel at the edge of the part instead of its neighbour.
    """
    before = 1 if start and side > stored else 0
    dropped = before * (side // stored)
    first = start - before
    return slice(first, first - (-(count + dropped) * stored // side) + 2), dropped


def distort(image: Array, rng: np.random.Generator) -> Array:
    """Brightness, contrast, saturation and hue, each with probability one half, by look-up tables.

    Contrast comes before saturation and hue or after them, a half each.
    """
    brighten, contrast, contrast_first, saturate, turn = rng.random(5) < 0.5
    levels = np.arange(256, dtype=np.float32)
    shift, gain = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
    saturation, hue = rng.uniform(0.5, 1.5), rng.integers(-18, 18)
    tables = []  # of the three colours, one after another
    if brighten:
        tables.append(_to_uint8(levels + shift))
    if contrast and contrast_first:
        tables.append(_to_uint8(levels * gain))
    image = _looked_up(image, tables)
    if saturate or turn:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if turn:
            _look_up_channel(hsv, 0, ((levels + hue) % 180).astype(np.uint8))
        if saturate:
            _look_up_channel(hsv, 1, _to_uint8(levels * saturation))
        image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
    if contrast and not contrast_first:
        image = _looked_up(image, [_to_uint8(levels * gain)])
    return image


def _looked_up(image: Array, tables: list[Array]) -> Array:
    """Every grey level as the tables, one after another, have it."""
    if not tables:
        return image
    first, *others = tables
    for table in others:
        first = table[first]
    return np.asarray(cv2.LUT(image, first), np.uint8)


def _look_up_channel(image: cv2.typing.MatLike, channel: int, table: Array) -> None:
    """Change one channel in place: faster than a table for each of the three."""
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(image, channel), table), image, channel)


def _to_uint8(levels: NDArray[np.float32]) -> Array:
    return np.clip(levels, 0, 255).astype(np.uint8)


def pad(
    image: Array, target: Array, size: tuple[int, int], fill: tuple[int, ...], ignore_index: int
) -> tuple[Array, Array]:
    """Fill up to `size` at the bottom and the right; the target with `ignore_index`."""
    height, width = target.shape
    if (height, width) == size:
        return image, target
    edges = (0, size[0] - height, 0, size[1] - width, cv2.BORDER_CONSTANT)
    return (
        np.asarray(cv2.copyMakeBorder(image, *edges, value=fill), np.uint8),
        np.asarray(cv2.copyMakeBorder(target, *edges, value=(ignore_index,)), np.uint8),
    )


def fill_of(mean: Sequence[float]) -> tuple[int, ...]:
    """The uint8 colour that normalises to nearly 0: the mean that is subtracted, rounded."""
    return tuple(min(max(round(level), 0), 255) for level in mean)
