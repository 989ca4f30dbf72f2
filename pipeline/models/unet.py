"""The U-Net decoder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.keyed import KeyedDropout
from pipeline.models.segmenter import Head, HeadParams, Output
from pipeline.params import AtLeast0, Fraction, Width


class UNetParams(HeadParams):
    """`channels` go from the coarsest of the five stages to the finest."""

    dropout: Fraction = 0.0
    aux_weight: AtLeast0 = 0.0
    channels: tuple[Width, Width, Width, Width, Width] = (256, 128, 64, 32, 16)


class UNetHead(Head):
    """Up by two, beside the finer features, through two convolutions, again.

    It ends at the full size: the image itself passes one convolution to be the last skip.
    Source: https://arxiv.org/abs/1505.04597
    """

    Params = UNetParams
    levels = 5

    def __init__(self, widths: list[int], num_classes: int, params: UNetParams) -> None:
        super().__init__()
        channels = params.channels
        skips = [channels[-1], *widths[1:-1]]
        self.stem = conv_bn_relu(widths[0], skips[0])
        incoming = [widths[-1], *channels[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(conv_bn_relu(below + skip, width), conv_bn_relu(width, width))
            for below, skip, width in zip(incoming, skips[::-1], channels, strict=True)
        )
        self.dropout = KeyedDropout(params.dropout, axes=1)
        self.conv_seg = nn.Conv2d(channels[-1], num_classes, 1)

    def forward(self, features: list[Tensor]) -> list[Output]:
        """The image and five features from fine to coarse, (N,K,H,W) -> logits (N,C,H,W)."""
        skips = [self.stem(features[0]), *features[1:-1]]
        x = features[-1]
        for stage, skip in zip(self.stages, skips[::-1], strict=True):
            x = stage(torch.cat([F.interpolate(x, skip.shape[2:], mode="nearest"), skip], dim=1))
        return [Output(self.conv_seg(self.dropout(x)))]


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution, batch normalisation, ReLU, from torch's own first weights.

    Under AdamW those find small classes that the larger ones of the other heads never do.
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
