"""The fully convolutional head, alone or as the auxiliary head of another network."""

import torch
from torch import Tensor, nn

from pipeline.models.layers import ConvModule, Head
from pipeline.params import ModelParams


class FCNHead(Head):
    """3x3 convolutions on the coarsest features, and one more that sees those features again.

    Source: https://arxiv.org/abs/1411.4038
    """

    def __init__(self, widths: list[int], num_classes: int, params: ModelParams) -> None:
        channels, convs = params.fcn.channels, params.fcn.convs
        super().__init__(channels, num_classes, params.dropout)
        incoming = [widths[-1], *[channels] * (convs - 1)]
        self.convs = nn.Sequential(*(ConvModule(width, channels, 3) for width in incoming))
        self.conv_cat = ConvModule(widths[-1] + channels, channels, 3)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at the coarsest."""
        x = features[-1]
        decoded: Tensor = self.conv_cat(torch.cat([x, self.convs(x)], dim=1))
        return decoded


class AuxiliaryHead(Head):
    """One 3x3 convolution on the second coarsest features, to a quarter of their channels.

    Source: https://arxiv.org/abs/1612.01105
    """

    def __init__(self, widths: list[int], num_classes: int, params: ModelParams) -> None:
        channels = widths[-2] // 4
        super().__init__(channels, num_classes, params.dropout)
        self.convs = nn.Sequential(ConvModule(widths[-2], channels, 3))

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at the second coarsest."""
        decoded: Tensor = self.convs(features[-2])
        return decoded
