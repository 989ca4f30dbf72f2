"""The fully convolutional head."""

import torch
from torch import Tensor, nn

from pipeline.models.layers import ConvModule
from pipeline.models.segmenter import Classifier, HeadParams
from pipeline.params import Few, Width


class FCNParams(HeadParams):
    """`convs` convolutions, `channels` wide."""

    channels: Width = 512
    convs: Few = 2


class FCNHead(Classifier):
    """3x3 convolutions on the coarsest features, and one more that sees those features again.

    Source: https://arxiv.org/abs/1411.4038
    """

    Params = FCNParams

    def __init__(self, widths: list[int], num_classes: int, params: FCNParams) -> None:
        channels, convs = params.channels, params.convs
        super().__init__(channels, num_classes, params.dropout)
        incoming = [widths[-1], *[channels] * (convs - 1)]
        self.convs = nn.Sequential(*(ConvModule(width, channels, 3) for width in incoming))
        self.conv_cat = ConvModule(widths[-1] + channels, channels, 3)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at the coarsest."""
        x = features[-1]
        decoded: Tensor = self.conv_cat(torch.cat([x, self.convs(x)], dim=1))
        return decoded
