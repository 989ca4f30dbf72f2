"""A linear probe: what the last features tell by themselves."""

from torch import Tensor, nn

from pipeline.models.layers import Head, Output
from pipeline.params import ModelParams


class LinearHead(Head):
    """Dropout of channels, batch normalisation, a 1x1 convolution.

    Source: dinov3/eval/segmentation of https://github.com/facebookresearch/dinov3
    """

    def __init__(self, widths: list[int], num_classes: int, params: ModelParams) -> None:
        super().__init__(widths[-1], num_classes, params.dropout)
        self.norm = nn.BatchNorm2d(widths[-1])

    def forward(self, features: list[Tensor]) -> list[Output]:
        """The coarsest features -> one output, as coarse."""
        return [Output(self.conv_seg(self.norm(self.dropout(features[-1]))))]
