"""The light head of SegFormer."""

from torch import Tensor, nn

from pipeline.models.layers import ConvModule, JoiningConv
from pipeline.models.segmenter import Classifier, HeadParams
from pipeline.params import AtLeast0, Width


class SegFormerParams(HeadParams):
    """`channels` are those of each level and of the joined ones."""

    aux_weight: AtLeast0 = 0.0
    channels: Width = 256


class SegFormerHead(Classifier):
    """Features of stride 4 to 32, each to as many channels, joined at stride 4.

    Source: https://arxiv.org/abs/2105.15203
    """

    Params = SegFormerParams
    levels = 4

    def __init__(self, widths: list[int], num_classes: int, params: SegFormerParams) -> None:
        channels = params.channels
        super().__init__(channels, num_classes, params.dropout)
        self.convs = nn.ModuleList(ConvModule(width, channels, 1) for width in widths[-4:])
        self.fusion_conv = JoiningConv(4 * channels, channels, 1)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at stride 4."""
        levels = [conv(x) for conv, x in zip(self.convs, features[-4:], strict=True)]
        decoded: Tensor = self.fusion_conv(levels, levels[0].shape[2:])
        return decoded
