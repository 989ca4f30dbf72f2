"""Unified perceptual parsing."""

import torch
from torch import Tensor, nn

from pipeline.models.layers import ConvModule, PyramidPooling, resize
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
        self.bottleneck = ConvModule(widths[-1] + len(scales) * channels, channels, 3)
        lower = widths[-4:-1]
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in lower)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in lower)
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at stride 4."""
        lower = features[-4:-1]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, lower, strict=True)]
        levels.append(self.bottleneck(self.psp_modules(features[-1])))
        for level in (2, 1, 0):
            levels[level] = levels[level] + resize(levels[level + 1], levels[level].shape[2:])
        joined = [conv(x) for conv, x in zip(self.fpn_convs, levels[:3], strict=True)]
        size = joined[0].shape[2:]
        coarser = [resize(x, size) for x in (*joined[1:], levels[3])]
        decoded: Tensor = self.fpn_bottleneck(torch.cat([joined[0], *coarser], dim=1))
        return decoded
