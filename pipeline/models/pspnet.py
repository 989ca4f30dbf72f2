"""Pyramid scene parsing."""

from torch import Tensor

from pipeline.models.layers import ConvModule, Head, PyramidPooling
from pipeline.params import ModelParams


class PSPHead(Head):
    """The coarsest features, pooled at several scales.

    Source: https://arxiv.org/abs/1612.01105
    """

    def __init__(self, widths: list[int], num_classes: int, params: ModelParams) -> None:
        channels, scales = params.pspnet.channels, params.pspnet.pool_scales
        super().__init__(channels, num_classes, params.dropout)
        self.psp_modules = PyramidPooling(widths[-1], channels, scales)
        self.bottleneck = ConvModule(widths[-1] + len(scales) * channels, channels, 3)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at the coarsest."""
        decoded: Tensor = self.bottleneck(self.psp_modules(features[-1]))
        return decoded
