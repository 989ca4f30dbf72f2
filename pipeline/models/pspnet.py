"""Pyramid scene parsing."""

from pydantic import Field
from torch import Tensor

from pipeline.models.layers import JoiningConv, PyramidPooling
from pipeline.models.segmenter import Classifier, HeadParams
from pipeline.params import Few, Width


class PyramidParams(HeadParams):
    """`pool_scales` are the sides of the pooled maps in pixels, each `channels` wide."""

    channels: Width = 512
    pool_scales: tuple[Few, ...] = Field(min_length=1, max_length=64, default=(1, 2, 3, 6))

    @property
    def pools_to_one(self) -> bool:
        return 1 in self.pool_scales


class PSPHead(Classifier):
    """The coarsest features, pooled at several scales.

    Source: https://arxiv.org/abs/1612.01105
    """

    Params = PyramidParams

    def __init__(self, widths: list[int], num_classes: int, params: PyramidParams) -> None:
        channels, scales = params.channels, params.pool_scales
        super().__init__(channels, num_classes, params.dropout)
        self.psp_modules = PyramidPooling(widths[-1], channels, scales)
        self.bottleneck = JoiningConv(widths[-1] + len(scales) * channels, channels, 3)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at the coarsest."""
        x = features[-1]
        decoded: Tensor = self.bottleneck(self.psp_modules(x), x.shape[2:])
        return decoded
