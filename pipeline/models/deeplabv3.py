"""DeepLabV3: the coarsest features through convolutions of several dilations at once."""

from pydantic import Field
from torch import Tensor, nn

from pipeline.models.layers import AveragePool, ConvModule, JoiningConv
from pipeline.models.segmenter import Classifier, HeadParams
from pipeline.params import Few, Width


class DeepLabV3Params(HeadParams):
    """`dilations` are those of the parallel convolutions, all of them `channels` wide."""

    channels: Width = 512
    dilations: tuple[Few, ...] = Field(min_length=1, max_length=64, default=(1, 12, 24, 36))

    @property
    def pools_to_one(self) -> bool:
        return True


class DeepLabV3Head(Classifier):
    """Atrous spatial pyramid pooling.

    Source: https://arxiv.org/abs/1706.05587
    """

    Params = DeepLabV3Params

    def __init__(self, widths: list[int], num_classes: int, params: DeepLabV3Params) -> None:
        channels, dilations = params.channels, params.dilations
        super().__init__(channels, num_classes, params.dropout)
        self.image_pool = nn.Sequential(AveragePool(1), ConvModule(widths[-1], channels, 1))
        self.aspp_modules = nn.ModuleList(
            self.branch(widths[-1], channels, dilation) for dilation in dilations
        )
        self.bottleneck = JoiningConv((len(dilations) + 1) * channels, channels, 3)

    def branch(self, in_channels: int, channels: int, dilation: int) -> nn.Module:
        """One of the parallel convolutions."""
        return ConvModule(in_channels, channels, 1 if dilation == 1 else 3, dilation)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at the coarsest."""
        x = features[-1]
        branches = [self.image_pool(x), *(branch(x) for branch in self.aspp_modules)]
        decoded: Tensor = self.bottleneck(branches, x.shape[2:])
        return decoded
