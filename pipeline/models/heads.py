"""Heads: backbone features -> logits at the size of the features they end on."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.params import ModelParams


class PSPHead(nn.Module):
    """Pyramid scene parsing: the coarsest features pooled at several scales.

    Source: https://arxiv.org/abs/1612.01105
    """

    def __init__(self, channels: list[int], num_classes: int, params: ModelParams) -> None:
        super().__init__()
        scales, width = params.pspnet.pool_scales, params.pspnet.channels
        self.scales = scales
        self.pyramid = nn.ModuleList(ConvBNReLU(channels[-1], width, 1) for _ in scales)
        self.bottleneck = ConvBNReLU(channels[-1] + len(scales) * width, width, 3)
        self.classifier = Classifier(width, num_classes, params.dropout)

    def forward(self, features: list[Tensor], keys: Tensor | None) -> Tensor:
        """The image and features from fine to coarse, (N,K,H,W) -> logits at the coarsest."""
        x = features[-1]
        pooled = [
            resize(conv(average_pool(x, scale)), x.shape[2:])
            for scale, conv in zip(self.scales, self.pyramid, strict=True)
        ]
        logits: Tensor = self.classifier(self.bottleneck(torch.cat([x, *pooled], dim=1)), keys)
        return logits


class UNetHead(nn.Module):
    """The U-Net decoder: up by two, beside the finer features, through two convolutions, again.

    It ends at the full size: the image itself passes one convolution to be the last skip.
    Source: https://arxiv.org/abs/1505.04597
    """

    def __init__(self, channels: list[int], num_classes: int, params: ModelParams) -> None:
        super().__init__()
        widths = params.unet.channels
        skips = [widths[-1], *channels[1:-1]]
        self.stem = ConvBNReLU(channels[0], skips[0], 3)
        incoming = [channels[-1], *widths[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(ConvBNReLU(below + skip, width, 3), ConvBNReLU(width, width, 3))
            for below, skip, width in zip(incoming, skips[::-1], widths, strict=True)
        )
        self.classifier = Classifier(widths[-1], num_classes, params.dropout)

    def forward(self, features: list[Tensor], keys: Tensor | None) -> Tensor:
        """The image and five features from fine to coarse, (N,K,H,W) -> logits (N,C,H,W)."""
        skips = [self.stem(features[0]), *features[1:-1]]
        x = features[-1]
        for stage, skip in zip(self.stages, skips[::-1], strict=True):
            x = stage(torch.cat([F.interpolate(x, skip.shape[2:], mode="nearest"), skip], dim=1))
        logits: Tensor = self.classifier(x, keys)
        return logits


class FCNHead(nn.Module):
    """One 3x3 convolution on the second coarsest features: PSPNet's auxiliary head.

    Source: https://arxiv.org/abs/1411.4038
    """

    def __init__(self, channels: list[int], num_classes: int, params: ModelParams) -> None:
        super().__init__()
        self.conv = ConvBNReLU(channels[-2], 256, 3)
        self.classifier = Classifier(256, num_classes, params.dropout)

    def forward(self, features: list[Tensor], keys: Tensor | None) -> Tensor:
        """The image and features from fine to coarse, (N,K,H,W) -> logits at the second last."""
        logits: Tensor = self.classifier(self.conv(features[-2]), keys)
        return logits


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class Classifier(nn.Module):
    """Dropout of whole channels, then a 1x1 convolution to the classes."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = KeyedDropout2d(dropout)
        self.conv = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """(N,K,H,W) -> logits (N,C,H,W)."""
        logits: Tensor = self.conv(self.dropout(x, keys))
        return logits


class KeyedDropout2d(nn.Module):
    """Dropout2d whose mask depends on the sample's key and the layer's name alone.

    So a sample meets the same mask on any rank, in any microbatch, after any restart, and again in
    the second forward of activation checkpointing. Law: https://arxiv.org/abs/1411.4280
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.salt = 0  # set by `salt_layers` from the layer's name

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Features (N,C,H,W), keys (N,) int64; eval mode needs no keys."""
        if not self.training or self.p == 0:
            return x
        assert keys is not None, "training draws need the keys of the samples"
        kept = [
            np.random.default_rng((self.salt, key)).random(x.shape[1]) >= self.p
            for key in keys.tolist()
        ]
        mask = torch.from_numpy(np.stack(kept)).to(x.device, x.dtype)
        return x * (mask / (1 - self.p))[:, :, None, None]


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
