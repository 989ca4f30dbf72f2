"""Unified perceptual parsing."""

from torch import Tensor, nn

from pipeline.models.layers import ConvModule, JoiningConv, PyramidPooling, resize
from pipeline.models.pspnet import PyramidParams
from pipeline.models.segmenter import Classifier


class UPerHead(Classifier):
    """A feature pyramid whose top is pooled at several scales, all levels joined at stride 4.

    Source: https://arxiv.org/abs/1807.10221
    """

    Params = PyramidParams
    levels = 4

    def __init__(self, widths: list[int], num_classes: int, params: PyramidParams) -> None:
        channels, scales = params.channels, params.pool_scales
        super().__init__(channels, num_classes, params.dropout)
        self.psp_modules = PyramidPooling(widths[-1], channels, scales)
        self.bottleneck = JoiningConv(widths[-1] + len(scales) * channels, channels, 3)
        lower = widths[-4:-1]
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in lower)
        self.fpn_bottleneck = JoiningConv(4 * channels, channels, 3)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at stride 4."""
        lower = features[-4:-1]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, lower, strict=True)]
        coarsest = features[-1]
        levels.append(self.bottleneck(self.psp_modules(coarsest), coarsest.shape[2:]))
        for level in (2, 1, 0):
            levels[level] = levels[level] + resize(levels[level + 1], levels[level].shape[2:])
        levels[:3] = [conv(x) for conv, x in zip(self.fpn_convs, levels[:3], strict=True)]
        decoded: Tensor = self.fpn_bottleneck(levels, levels[0].shape[2:])
        return decoded
