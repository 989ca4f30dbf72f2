"""The feature pyramid, and the head that sums its levels."""

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.layers import ConvModule, resize
from pipeline.models.segmenter import Classifier, HeadParams
from pipeline.params import AtLeast0, Width

CHANNELS = 256  # of every level of the pyramid


class SemanticFPNParams(HeadParams):
    """`channels` are those of the summed levels."""

    aux_weight: AtLeast0 = 0.0
    channels: Width = 128


class PlainConv(nn.Sequential):
    """A convolution with bias and nothing after it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]


class FPN(nn.Module):
    """Features of stride 4 to 32, all of 256 channels, each told what the coarser ones know.

    Source: https://arxiv.org/abs/1612.03144
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        own = widths[-4:]
        self.lateral_convs = nn.ModuleList(PlainConv(width, CHANNELS, 1) for width in own)
        self.fpn_convs = nn.ModuleList(PlainConv(CHANNELS, CHANNELS, 3) for _ in own)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features from fine to coarse, the last four of them used -> four (N,256,h,w)."""
        levels = [conv(x) for conv, x in zip(self.lateral_convs, features[-4:], strict=True)]
        for level in (2, 1, 0):
            size = levels[level].shape[2:]
            levels[level] = levels[level] + F.interpolate(levels[level + 1], size, mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]


class Upsample(nn.Module):
    """Twice the size, bilinear."""

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C,2H,2W)."""
        return resize(x, (2 * x.shape[2], 2 * x.shape[3]))


class SemanticFPNHead(Classifier):
    """Every level convolved and doubled in size until it has stride 4, then their sum.

    Source: https://arxiv.org/abs/1901.02446
    """

    Params = SemanticFPNParams
    levels = 4
    neck = FPN

    def __init__(self, widths: list[int], num_classes: int, params: SemanticFPNParams) -> None:
        channels = params.channels
        super().__init__(channels, num_classes, params.dropout)
        self.scale_heads = nn.ModuleList(_scale_head(channels, level) for level in range(4))

    def decode(self, features: list[Tensor]) -> Tensor:
        """The four levels of the pyramid -> features at stride 4."""
        levels = [head(x) for head, x in zip(self.scale_heads, features, strict=True)]
        total: Tensor = levels[0]
        for level in levels[1:]:
            total = total + resize(level, total.shape[2:])
        return total


def _scale_head(channels: int, doublings: int) -> nn.Sequential:
    layers: list[nn.Module] = [ConvModule(CHANNELS, channels, 3)]
    for step in range(doublings):
        if step > 0:
            layers.append(ConvModule(channels, channels, 3))
        layers.append(Upsample())
    return nn.Sequential(*layers)
