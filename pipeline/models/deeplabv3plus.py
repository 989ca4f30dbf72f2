"""DeepLabV3+: DeepLabV3 by separable convolutions, joined with finer features."""

import torch
from torch import Tensor, nn

from pipeline.models.deeplabv3 import DeepLabV3Head, DeepLabV3Params
from pipeline.models.layers import ConvModule, SeparableConvModule, resize
from pipeline.params import Width


class DeepLabV3PlusParams(DeepLabV3Params):
    """`low_level_channels` are what the features of stride 4 are reduced to."""

    low_level_channels: Width = 48


class DeepLabV3PlusHead(DeepLabV3Head):
    """What DeepLabV3 decodes, beside the features of stride 4, through two convolutions.

    Source: https://arxiv.org/abs/1802.02611
    """

    Params = DeepLabV3PlusParams
    levels = 4

    def __init__(self, widths: list[int], num_classes: int, params: DeepLabV3PlusParams) -> None:
        super().__init__(widths, num_classes, params)
        channels, low_level = params.channels, params.low_level_channels
        self.c1_bottleneck = ConvModule(widths[-4], low_level, 1)
        self.sep_bottleneck = nn.Sequential(
            SeparableConvModule(channels + low_level, channels),
            SeparableConvModule(channels, channels),
        )

    def branch(self, in_channels: int, channels: int, dilation: int) -> nn.Module:
        """One of the parallel convolutions, separable where it is dilated."""
        if dilation == 1:
            return super().branch(in_channels, channels, dilation)
        return SeparableConvModule(in_channels, channels, dilation)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at stride 4."""
        low_level = self.c1_bottleneck(features[-4])
        coarse = resize(super().decode(features), low_level.shape[2:])
        decoded: Tensor = self.sep_bottleneck(torch.cat([coarse, low_level], dim=1))
        return decoded
