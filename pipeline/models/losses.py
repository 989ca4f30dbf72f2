"""The loss of a map of logits: terms over pixels and terms over images, each a sum divided once."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.models.layers import bilinear_weights, parts, resize, taps
from pipeline.params import Above0, AtLeast0, Positive, Probability, Section

# Logits, target, ignore_index and the weights of the classes -> a sum.
Term = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
ImageLoss = Callable[[Tensor, Tensor], Tensor]
# The terms, and which of the three counts divides each: pixels as their classes weigh, pixels,
# images.
DIVISORS = {"cross_entropy": 0, "ohem": 0, "focal": 1, "dice": 2, "lovasz": 2, "tversky": 2}
WEIGHED = ("cross_entropy", "ohem")  # by class_weights
# How many logits of a map are made at a time. On the CPU as many as its caches hold: of 150 classes
# 2**18 to 2**20 take about the same time, 2**17 twice as long. On a GPU so many that a kernel takes
# longer than its launch; that is an estimate.
TILE_ON_CPU, TILE_ON_GPU = 2**19, 2**23


class LossParams(Section):
    """The section `model.loss`: the weight of each term, 0 for none, and what some of them need.

    `ohem` is the cross entropy of each image's hard pixels: those whose own class has less than
    `ohem_threshold` probability, and the `ohem_min_kept` least probable in any case. With
    `avg_non_ignore` cross_entropy, ohem and focal are divided by the valid pixels, else by all.
    `class_weights` are those of cross_entropy and ohem: a number for each class, or balanced: by
    the frequencies in train.
    """

    cross_entropy: AtLeast0 = 0.0
    ohem: AtLeast0 = 0.0
    dice: AtLeast0 = 0.0
    focal: AtLeast0 = 0.0
    lovasz: AtLeast0 = 0.0
    tversky: AtLeast0 = 0.0
    avg_non_ignore: bool = True
    class_weights: (
        Annotated[tuple[Above0, ...], Field(strict=False)] | Literal["balanced"] | None
    ) = None
    ohem_threshold: Probability = 0.7
    ohem_min_kept: Positive = 100000

    @property
    def terms(self) -> dict[str, float]:
        """The weights of the terms that are on."""
        return {name: getattr(self, name) for name in DIVISORS if getattr(self, name) > 0}

    @field_validator("class_weights", mode="wrap")
    @classmethod
    def _are_weights(cls, given: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(given)
        except ValidationError:
            raise InputError(
                "must be null, balanced, or a list with a number above 0 for each class"
            ) from None

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if not self.terms:
            raise InputError("every term has weight 0; give one of them, as cross_entropy, 1")
        if self.class_weights and not self.terms.keys() & set(WEIGHED):
            raise InputError(
                "class_weights weigh cross_entropy and ohem, and both are 0; set class_weights null"
            )
        return self


class Criterion(nn.Module):
    """The terms that are on, by their weights.

    A term is a sum over pixels or over images, divided by their number in the whole global batch:
    so neither ranks nor microbatches weigh differently when their valid pixels differ.
    """

    def __init__(self, params: LossParams, frequency: Sequence[float], ignore_index: int) -> None:
        """`frequency`: of each class in train, see `median_frequency_weights`."""
        super().__init__()
        given = params.class_weights
        weights = median_frequency_weights(frequency) if given == "balanced" else given
        counts = torch.ones(2, 256, dtype=torch.float64)
        counts[:, ignore_index] = 0 if params.avg_non_ignore else 1
        class_weights = None
        if weights is not None:
            class_weights = torch.tensor(weights, dtype=torch.float64)
            counts[0, : len(weights)] = class_weights
        self.counts: Tensor
        self.class_weights: Tensor | None
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self._ignore_index = ignore_index
        self._terms = {name: (weight, _term(name, params)) for name, weight in params.terms.items()}

    def count(self, target: Tensor) -> Tensor:
        """A target's part in the divisors: (N,H,W) uint8 -> (3,) fp64, see DIVISORS.

        Counted are the valid pixels (avg_non_ignore) or all of them; where classes weigh, each
        pixel as its class, an ignored one as 1: MMSegmentation's avg_factor.
        Source: https://github.com/open-mmlab/mmsegmentation
        """
        pixels = self.counts[:, target.long()].double().flatten(1).sum(dim=1)
        return torch.cat([pixels, pixels.new_full((1,), len(target))])

    @staticmethod
    def divisors_of_points(divisors: Tensor, points: int) -> Tensor:
        """The divisors where `points` of each image are learned from, labelled or not."""
        images = divisors[2]
        return torch.stack([images * points, images * points, images])

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        divisors: Tensor,
        size: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """This batch's part in each term of the global one, whose counts are `divisors`.

        logits of any precision, target of class ids -> fp64 scalars. A map (N,C,h,w) is resized to
        `size`, None for its own, and cut at the bottom and the right to the target (N,H,W); logits
        at points (N,C,P) have a target (N,P). The resized map is made once for all terms that need
        it. The cross entropy does not.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        is_map = logits.dim() == 4
        whole = logits
        if is_map and self._terms.keys() != {"cross_entropy"}:
            height, width = target.shape[1:]
            whole = (logits if size is None else resize(logits, size))[:, :, :height, :width]
        terms = {}
        for name, (weight, term) in self._terms.items():
            if is_map and name == "cross_entropy":
                total = map_cross_entropy_sum(
                    logits, target, self._ignore_index, self.class_weights, size=size
                )
            else:
                total = term(whole, target, self._ignore_index, self.class_weights)
            terms[name] = weight * total.double() / divisors[DIVISORS[name]]
        return terms


def labels_at(target: Tensor, points: Tensor) -> Tensor:
    """Labels of the pixels nearest to points (N,P,2), x and y in [0,1): (N,H,W) -> (N,P)."""
    height, width = target.shape[1:]
    size = points.new_tensor([width, height])
    column, row = (points * size - 0.5).round().long().unbind(dim=2)  # as torch's grid_sample
    places = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return target.flatten(1).gather(1, places)


def median_frequency_weights(frequency: Sequence[float]) -> list[float]:
    """The median of the classes' frequencies by each; 0 for a class that train does not show.

    A class's frequency is its share of the labelled pixels of the images that show it.
    Source: https://arxiv.org/abs/1411.4734
    """
    median = float(np.median([one for one in frequency if one > 0]))
    return [median / one if one > 0 else 0.0 for one in frequency]


def _term(name: str, params: LossParams) -> Term:
    match name:
        case "cross_entropy":
            return cross_entropy_sum
        case "ohem":
            return partial(ohem_sum, threshold=params.ohem_threshold, min_kept=params.ohem_min_kept)
        case _:
            return partial(sum_over_images, library_loss(name))


def cross_entropy_sum(
    logits: Tensor, target: Tensor, ignore_index: int, class_weights: Tensor | None = None
) -> Tensor:
    """Cross entropy summed over the valid pixels, each by the weight of its class.

    logits (N,C,...), target (N,...) uint8 -> scalar. Pixels as rows, because torch's
    two-dimensional form has no deterministic CUDA kernel.
    """
    rows = logits.movedim(1, -1).flatten(0, -2)
    return F.cross_entropy(
        rows,
        target.flatten().long(),
        None if class_weights is None else class_weights.to(rows.dtype),
        ignore_index=ignore_index,
        reduction="sum",
    )


def map_cross_entropy_sum(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    class_weights: Tensor | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """`cross_entropy_sum` of a map that is resized to `size`, None for its own, without making it.

    logits (N,C,h,w), target (N,H,W) uint8, which is the upper left part of `size` -> fp64 scalar.
    """
    known = target != ignore_index
    labels = torch.where(known, target, 0).long()
    weights = known.to(logits.dtype)
    if class_weights is not None:
        weights = weights * class_weights.to(logits.dtype)[labels]
    total: Tensor = _MapCrossEntropy.apply(logits, labels, weights, size or logits.shape[2:])
    return total


class _MapCrossEntropy(torch.autograd.Function):
    """The weighted sum over all pixels, from one tile of one image at a time.

    A tile's logits are made, added up, turned into their gradient, which is softmax minus one-hot,
    and taken back to the small logits, all at once: nothing as large as the map is ever there.
    Resizing and its gradient are products with the matrices of `bilinear_weights`, which, unlike
    the backward of torch's own, are deterministic on CUDA. How large a tile is follows from the
    number of classes alone, so that neither batch size nor ranks change an image's part.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Logits (N,C,h,w), labels (N,H,W) int64, weights (N,H,W), 0 for ignored pixels -> fp64."""
        classes, *old = logits.shape[1:]
        resized = tuple(old) != tuple(size)
        if resized:
            rows, columns = (
                bilinear_weights(before, after, logits.dtype, logits.device)
                for before, after in zip(old, size)
            )
        elements = TILE_ON_CPU if logits.device.type == "cpu" else TILE_ON_GPU
        side = max(16, math.isqrt(elements // classes) // 16 * 16)  # 16 numbers fill a register
        ys, xs = (
            [(part, taps(before, after, part)) for part in parts(slice(0, end), side)]
            for end, before, after in zip(labels.shape[1:], old, size)
        )
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        total = logits.new_zeros((), dtype=torch.float64)
        with torch.autocast(logits.device.type, enabled=False):
            for n, (y, small_y), (x, small_x) in product(range(len(logits)), ys, xs):
                if resized:
                    down, across = rows[y, small_y], columns[x, small_x]
                    small = logits[n, :, small_y, small_x]
                    lines = small.reshape(-1, across.shape[1]) @ across.T  # one product of them all
                    tile = down @ lines.view(classes, -1, across.shape[0])
                else:
                    tile = logits[n, :, y, x]
                tile = tile.log_softmax(dim=0)  # (C, rows, columns)
                label, weight = labels[n, None, y, x], weights[n, None, y, x]
                own = tile.gather(0, label)
                total -= (own * weight).sum(dtype=torch.float64)
                if gradient is None:
                    continue
                # 2 ** x takes half the time of exp, which torch leaves to MKL on a CPU.
                tile.mul_(1 / math.log(2)).exp2_().mul_(weight)
                tile.scatter_(0, label, own.expm1() * weight)
                if resized:
                    lines = (down.T @ tile).view(-1, across.shape[0]) @ across
                    gradient[n, :, small_y, small_x] += lines.view(small.shape)
                else:
                    gradient[n, :, y, x] = tile
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the sum, by that of the loss, a scalar."""
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None


def ohem_sum(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    class_weights: Tensor | None = None,
    *,
    threshold: float,
    min_kept: int,
) -> Tensor:
    """Cross entropy summed over each image's hard pixels.

    Hard are those whose own class has less than `threshold` probability, and the `min_kept` least
    probable in any case: the rule of MMSegmentation's OHEMPixelSampler, which chooses among all the
    images of a GPU and so makes the result depend on the number of GPUs.
    Source: https://arxiv.org/abs/1604.03540
    """
    hard = target.to(torch.long, copy=True)
    known = hard != ignore_index
    with torch.no_grad():
        labels = torch.where(known, hard, 0).unsqueeze(1)
        probability = logits.softmax(dim=1).gather(1, labels).squeeze(1)
        for image, valid, own in zip(hard, known, probability):
            ordered = own[valid].sort().values
            if len(ordered):
                limit = ordered[min(min_kept, len(ordered) - 1)].clamp(min=threshold)
                image[own >= limit] = ignore_index
    return cross_entropy_sum(logits, hard, ignore_index, class_weights)


def sum_over_images(
    loss: ImageLoss,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    class_weights: Tensor | None = None,
) -> Tensor:
    """A loss of each image's valid pixels, summed; an image without any adds 0.

    Classes weigh the same, whatever `class_weights` says. Image by image, because the library's
    losses of a batch are no sums over its images.
    """
    total = logits.sum() * 0  # keeps the graph where no image has a valid pixel
    for image, labels in zip(logits, target):
        valid = labels != ignore_index
        if valid.any():
            row = image[:, valid][None, :, None]  # (1,C,1,P)
            total = total + loss(row, labels[valid].long()[None, None])
    return total


def library_loss(name: str) -> ImageLoss:
    """A loss of one image, logits (1,C,1,P) and labels (1,1,P): focal's a sum over the pixels.

    Sources: dice https://arxiv.org/abs/1606.04797, focal (one class against the rest, averaged over
    the classes) https://arxiv.org/abs/1708.02002, lovasz https://arxiv.org/abs/1705.08790, tversky
    https://arxiv.org/abs/1706.05721
    """
    from segmentation_models_pytorch import losses  # only where it is needed: it is slow

    table: dict[str, ImageLoss] = {
        "dice": losses.DiceLoss("multiclass"),
        "focal": losses.FocalLoss("multiclass", gamma=2.0, reduction="sum"),
        "lovasz": losses.LovaszLoss("multiclass"),
        "tversky": losses.TverskyLoss("multiclass", alpha=0.3, beta=0.7),
    }
    if name == "lovasz":  # the library mixes fp32 into it
        return lambda logits, labels: table["lovasz"](logits.float(), labels)
    return table[name]
