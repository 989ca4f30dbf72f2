"""What the heads are made of, and what a network gives back in training."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.keyed import KeyedDropout


class Output(NamedTuple):
    """Logits to learn from, (N,C,H,W), or (N,C,P) at `points`, (N,P,2) x and y in [0,1)."""

    logits: Tensor
    points: Tensor | None = None
    weight: float = 1.0  # of its loss


class Head(nn.Module):
    """Features -> logits: what a head computes goes through dropout and a 1x1 convolution.

    Attributes carry the names of MMSegmentation's modules, so that its checkpoints fit; so does
    what weights start from: https://github.com/open-mmlab/mmsegmentation
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = KeyedDropout(dropout, axes=1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor]) -> list[Output]:
        """The image and features from fine to coarse, (N,K,H,W) -> one output, of any size."""
        return [Output(self.conv_seg(self.dropout(self.decode(features))))]

    def decode(self, features: list[Tensor]) -> Tensor:
        """The same features -> what the classes are read from, (N,channels,h,w)."""
        raise NotImplementedError


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


class SeparableConvModule(nn.Sequential):
    """A convolution of each channel, then one across them: https://arxiv.org/abs/1610.02357."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(in_channels, in_channels, 3, dilation, in_channels)
        self.pointwise_conv = ConvModule(in_channels, out_channels, 1)


class AveragePool(nn.Module):
    """Adaptive average pooling to bins x bins."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C,bins,bins)."""
        return average_pool(x, self.bins)


class PyramidPooling(nn.ModuleList):
    """The features, and beside them what they average to at several scales.

    Source: https://arxiv.org/abs/1612.01105
    """

    def __init__(self, in_channels: int, channels: int, scales: tuple[int, ...]) -> None:
        super().__init__(
            nn.Sequential(AveragePool(scale), ConvModule(in_channels, channels, 1))
            for scale in scales
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N,K,H,W) -> (N, K + channels * len(scales), H, W)."""
        return torch.cat([x, *(resize(pool(x), x.shape[2:]) for pool in self)], dim=1)


def whole(logits: Tensor, size: torch.Size) -> Tensor:
    """Logits at the size of the image, at least fp32: rounded to bf16, classes would tie."""
    return resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), size)


def resize(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned: (N,C,h,w) -> (N,C,H,W)."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def average_pool(x: Tensor, bins: int) -> Tensor:
    """Adaptive average pooling, (N,C,H,W) -> (N,C,bins,bins).

    As two matrix products: torch's own has no deterministic backward on CUDA.
    """
    rows, columns = (_bin_weights(side, bins, x.dtype, x.device) for side in x.shape[2:])
    return rows @ x @ columns.T


@lru_cache(maxsize=64)
def _bin_weights(side: int, bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(bins, side): row i averages the positions from floor(i*side/bins) to ceil of the next."""
    with torch.inference_mode(mode=False):  # what is kept must serve in training too
        weights = torch.zeros(bins, side, dtype=torch.float64)
        for i in range(bins):
            start, stop = i * side // bins, -(-(i + 1) * side // bins)
            weights[i, start:stop] = 1 / (stop - start)
        return weights.to(device, dtype)
