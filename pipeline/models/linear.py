"""A linear probe: what the last features tell by themselves."""

from torch import Tensor, nn

from pipeline.models.segmenter import Classifier, HeadParams, Output
from pipeline.params import AtLeast0


class LinearParams(HeadParams):
    """There is nothing to choose but dropout; a plain transformer has no auxiliary head."""

    aux_weight: AtLeast0 = 0.0


class LinearHead(Classifier):
    """Dropout of channels, batch normalisation, a 1x1 convolution.

    Source: dinov3/eval/segmentation of https://github.com/facebookresearch/dinov3
    """

    Params = LinearParams

    def __init__(self, widths: list[int], num_classes: int, params: LinearParams) -> None:
        super().__init__(widths[-1], num_classes, params.dropout)
        self.norm = nn.BatchNorm2d(widths[-1])

    def forward(self, features: list[Tensor]) -> list[Output]:
        return [Output(self.conv_seg(self.decode(features)))]

    def decode(self, features: list[Tensor]) -> Tensor:
        """The coarsest features, normalised after dropout."""
        normalised: Tensor = self.norm(self.dropout(features[-1]))
        return normalised
