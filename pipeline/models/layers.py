"""What the heads are made of, and how maps are resized.

While torch.export traces a network, sizes are symbols: what is made of them must be arithmetic of
tensors, and nothing is kept or cut into bands. Such places ask `torch.compiler.is_exporting`; what
they compute then is the same but for its last digits.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BAND = 2**22  # elements of a large map that are made at once: 16 MiB of fp32, which caches like


class ConvModule(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU; the size stays.

    Weights start as https://arxiv.org/abs/1502.01852 has it, by the outgoing channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 * dilation
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, 1, padding, dilation, groups, bias=False
        )
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)


class JoiningConv(ConvModule):
    """A `ConvModule` of several maps, resized to one size and joined along their channels.

    The joined map is never made. What a kernel makes of a resized map is the sum, over its k x k
    taps, of small maps that are resized and shifted: each of them a 1x1 convolution of the map as
    it came. So a map costs k x k times its own size, not that of the joined one; the sum is the
    same, in another order.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size)

    def forward(  # type: ignore[override] # a sequence is called with one thing
        self, maps: Sequence[Tensor], size: torch.Size | tuple[int, int]
    ) -> Tensor:
        """Maps (N,K,h,w), in the order of the weight's channels -> (N,C,H,W), with `size` (H,W)."""
        if torch.compiler.is_exporting():
            whole = torch.cat([resize(x, size) for x in maps], dim=1)
            exported: Tensor = self.relu(self.bn(self.conv(whole)))
            return exported
        weight = self.conv.weight.permute(0, 2, 3, 1)  # as it lies in memory, and so its gradient
        weights = torch.split(weight, [x.shape[1] for x in maps], dim=3)
        sums, lines, along = [], [], []
        for x, part in zip(maps, weights, strict=True):
            if x.shape[2:] == size:
                own = part.contiguous().permute(0, 3, 1, 2)
                sums.append(F.conv2d(x, own, padding=self.conv.padding))
                continue
            lines.append(_convolved_lines(x, part, size[0]))
            kind = {"dtype": lines[-1].dtype, "device": x.device}
            along.append(tap_weights(x.shape[3], size[1], part.shape[1], **kind))
        if lines:
            across = torch.cat(along, dim=1).expand(len(lines[0]), -1, -1)
            resized = across.bmm(torch.cat(lines, dim=1))  # (N x H, W, C)
            sums.append(resized.reshape(-1, *size, resized.shape[2]).permute(0, 3, 1, 2))
        joined: Tensor = self.relu(self.bn(sum(sums[1:], start=sums[0])))
        return joined


def _convolved_lines(x: Tensor, weight: Tensor, height: int) -> Tensor:
    """A map (N,K,h,w) and a kernel (C,k,k,K) -> (N x height, k x w, C), not yet resized along.

    In each new row, what the kernel's columns make of each old column.
    """
    number, _, h, w = x.shape
    channels, kernel, *_ = weight.shape
    small = F.linear(x.permute(0, 2, 3, 1), weight.flatten(0, 2))
    small = small.reshape(number, h, w, channels, kernel, kernel)
    small = small.permute(0, 4, 1, 5, 2, 3).reshape(number, kernel * h, -1)
    down = tap_weights(h, height, kernel, dtype=small.dtype, device=small.device)
    return down.expand(number, -1, -1).bmm(small).reshape(number * height, kernel * w, channels)


class SeparableConvModule(nn.Sequential):
    """A convolution of each channel, then one across them: https://arxiv.org/abs/1610.02357."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(
            in_channels, in_channels, 3, dilation=dilation, groups=in_channels
        )
        self.pointwise_conv = ConvModule(in_channels, out_channels, 1)


class AveragePool(nn.Module):
    """Adaptive average pooling to bins x bins."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C,bins,bins)."""
        return average_pools(x, [self.bins])[0]


class PyramidPooling(nn.ModuleList):
    """The features, and beside them what they average to at several scales.

    Source: https://arxiv.org/abs/1612.01105
    """

    def __init__(self, in_channels: int, channels: int, scales: tuple[int, ...]) -> None:
        # The first layer is the pooling in MMSegmentation, and counts in the names of weights.
        super().__init__(
            nn.Sequential(nn.Identity(), ConvModule(in_channels, channels, 1)) for _ in scales
        )
        self.scales = scales

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N,K,H,W) -> the same, and (N,channels,s,s) for each scale s."""
        pooled = average_pools(x, self.scales)
        return [x, *(layers(one) for layers, one in zip(self, pooled, strict=True))]


def resize(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned: (N,C,h,w) -> (N,C,H,W)."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def bands(rows: slice, elements: int) -> list[slice]:
    """The rows, of so many elements each, cut into bands of about `BAND` elements."""
    return parts(rows, max(BAND // elements, 1))


def parts(whole: slice, length: int) -> list[slice]:
    """A slice cut into parts of a length, of which the last may be shorter."""
    if torch.compiler.is_exporting():
        return [whole]
    return [
        slice(start, min(start + length, whole.stop))
        for start in range(whole.start, whole.stop, length)
    ]


def taps(old: int, new: int, rows: slice) -> slice:
    """Which of the old rows `rows` of the new ones lie between.

    The centre of the new row i is at (i + 1/2) * old / new - 1/2 among the old ones.
    """
    if torch.compiler.is_exporting():
        return slice(0, old)
    if old == new:
        return rows
    first = ((2 * rows.start + 1) * old - new) // (2 * new)
    last = ((2 * rows.stop - 1) * old - new) // (2 * new) + 1
    return slice(max(first, 0), min(last + 1, old))


def resized_band(x: Tensor, old: int, size: tuple[int, int], rows: slice) -> Tensor:
    """Those `rows` of what `resize` makes of a map (N,C,old,w): (N,C,rows,W), with `size` (H,W).

    x (N,C,taps,w) has of the map only `taps(old, H, rows)`, and is at least fp32. Down, a product
    with the weights makes just these rows; along, torch's own is the faster. The classes of a pixel
    lie side by side in memory, where an argmax or a softmax finds them several times faster.
    """
    height, width = size
    if torch.compiler.is_exporting():
        return resize(x, size)[:, :, rows]
    if old != height:
        weights = bilinear_weights(old, height, x.dtype, x.device)[rows, taps(old, height, rows)]
        number, classes, _, along = x.shape
        lines = x.permute(0, 2, 3, 1).flatten(2)  # (N, taps, w x C)
        with torch.autocast(x.device.type, enabled=False):
            made = weights.expand(number, -1, -1).bmm(lines)
        x = made.view(number, -1, along, classes).permute(0, 3, 1, 2)
    return x if x.shape[3] == width else resize(x, (x.shape[2], width))


def padded(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and the right, until `multiple` divides both sides: (N,C,H,W)."""
    height, width = x.shape[2:]
    if not torch.compiler.is_exporting() and height % multiple == width % multiple == 0:
        return x
    down, along = ((side + multiple - 1) // multiple * multiple - side for side in (height, width))
    return F.pad(x, (0, along, 0, down))


def average_pools(x: Tensor, bins: Sequence[int]) -> list[Tensor]:
    """Adaptive average pooling to several sizes, (N,C,H,W) -> (N,C,bins,bins) each.

    As one matrix product, so that x has one gradient: torch's own has no deterministic backward on
    CUDA, and each would bring a map as large as x. The results are at least fp32.
    """
    height, width = x.shape[2:]
    make = _pool_weights.__wrapped__ if torch.compiler.is_exporting() else _pool_weights
    weights, rest = make(height, width, tuple(bins), dtype=x.dtype, device=x.device)
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    pooled = weights.expand(x.shape[0], -1, -1).bmm(pixels) * rest
    squares = torch.split(pooled, [one**2 for one in bins], dim=1)
    shaped = (
        part.reshape(x.shape[0], one, one, -1) for one, part in zip(bins, squares, strict=True)
    )
    return [part.permute(0, 3, 1, 2) for part in shaped]


@lru_cache(maxsize=64)
def bilinear_weights(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(new, old): row i holds the weights of the old places in the new one, as `resize` has them.

    So `rows @ x @ columns.T` resizes (N,C,h,w), and a part of the rows gives a part of the result.
    """
    with torch.inference_mode(mode=False):  # what is kept must serve in training too
        lines = torch.eye(old, dtype=torch.float64).view(1, old, 1, old)
        return resize(lines, (1, new))[0, :, 0].T.contiguous().to(device, dtype)


@lru_cache(maxsize=64)
def tap_weights(
    old: int, new: int, kernel: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(new, kernel * old): for each tap of a kernel, `bilinear_weights` of the rows it meets.

    With zeros where it lies outside, as a convolution that keeps the size pads.
    """
    with torch.inference_mode(mode=False):  # what is kept must serve in training too
        rows = F.pad(bilinear_weights(old, new, dtype, device), (0, 0, kernel // 2, kernel // 2))
        return torch.cat([rows[tap : tap + new] for tap in range(kernel)], dim=1)


@lru_cache(maxsize=8)
def _pool_weights(
    height: int, width: int, bins: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two factors of the weights by which pixels are averaged: powers of two, and the rest.

    Every type holds powers of two exactly, and the rest, at least fp32, is for after the sum:
    rounded weights would make all of a bin larger or smaller. (bins, height x width) and (bins, 1),
    the bins of all sizes below each other. A bin goes from floor(i*side/bins) to ceil of the next.
    """
    with torch.inference_mode(mode=False):  # what is kept must serve in training too
        masks = [
            (_bins(height, one)[:, None, :, None] * _bins(width, one)[:, None]).flatten(2)
            for one in bins
        ]
        mask = torch.cat([one.flatten(0, 1) for one in masks])
        counts = mask.sum(dim=1, keepdim=True)
        powers = torch.exp2(-counts.log2().round())
        exact = torch.promote_types(dtype, torch.float32)
        return (mask * powers).to(device, dtype), (1 / counts / powers).to(device, exact)


def _bins(side: int, bins: int) -> Tensor:
    """(bins, side): row i is 1 where the bin i is."""
    places, numbers = torch.arange(side), torch.arange(bins)[:, None]
    begun = places >= torch.div(numbers * side, bins, rounding_mode="floor")
    ended = places * bins >= (numbers + 1) * side
    return (begun & ~ended).double()
