"""PointRend: the coarse map of a feature pyramid, corrected point by point where it is unsure.

Source: https://arxiv.org/abs/1912.08193
"""

from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.models.keyed import Keyed
from pipeline.models.layers import resize
from pipeline.models.segmenter import Head, Output
from pipeline.models.semantic_fpn import CHANNELS, FPN, SemanticFPNHead, SemanticFPNParams
from pipeline.params import Fraction, Points, Probability, Width


class PointRendParams(SemanticFPNParams):
    """The coarse head is Semantic FPN's, `channels` wide; the point head has `point_channels`.

    In training `train_points` of an image are learned from: of `oversample_ratio` times as many
    candidates the share `importance_ratio` is chosen for being uncertain. In evaluation each of
    `subdivision_steps` doubles the map's size and looks at `subdivision_points` anew.
    """

    dropout: Fraction = 0.0
    point_channels: Width = 256
    train_points: Points = 2048
    oversample_ratio: float = Field(ge=1, le=100, default=3)
    importance_ratio: Probability = 0.75
    subdivision_steps: int = Field(ge=0, le=10, default=2)
    subdivision_points: Points = 8196


class PointRendHead(Head, nn.ModuleList):
    """The coarse head, then the point head."""

    Params = PointRendParams
    levels = 4
    neck = FPN

    def __init__(self, widths: list[int], num_classes: int, params: PointRendParams) -> None:
        super().__init__(
            [SemanticFPNHead(widths, num_classes, params), PointHead(num_classes, params)]
        )
        self.params = params

    def forward(self, features: list[Tensor]) -> list[Output]:
        """The four levels of the pyramid -> in training the coarse map at stride 4 and the points.

        In evaluation the refined map, at four times the size.
        """
        point_head = cast("PointHead", self[1])
        (coarse,) = self[0](features)
        if self.training:
            points = point_head.draw(coarse.logits)
            logits = point_head(features[0], coarse.logits, points)
            return [coarse, Output(logits, points, name="points_")]
        return [Output(self._refine(features[0], coarse.logits))]

    def _refine(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Twice the size again and again, with the least certain points looked at anew."""
        refined = coarse
        for _ in range(self.params.subdivision_steps):
            height, width = 2 * refined.shape[2], 2 * refined.shape[3]
            refined = resize(refined, (height, width))
            count = torch.sym_min(self.params.subdivision_points, height * width)
            cells = uncertainty(refined.flatten(2)).topk(count, dim=1).indices
            exact = torch.promote_types(fine.dtype, torch.float32)
            down = cells // width
            across = cells - down * width
            centres = (across.to(exact) + 0.5) / width, (down.to(exact) + 0.5) / height
            points = torch.stack(centres, dim=2)
            logits = self[1](fine, coarse, points).to(refined.dtype)  # autocast resizes in fp32
            places = cells[:, None].expand_as(logits)
            refined = refined.flatten(2).scatter(2, places, logits).view_as(refined)
        return refined


class PointHead(Keyed):
    """A perceptron on the fine features and the coarse logits at points."""

    def __init__(self, num_classes: int, params: PointRendParams) -> None:
        super().__init__()
        self.params = params
        channels = [CHANNELS, *[params.point_channels] * 3]
        self.fcs = nn.ModuleList(
            PointConv(width + num_classes, params.point_channels) for width in channels[:-1]
        )
        self.fc_seg = nn.Conv1d(channels[-1] + num_classes, num_classes, 1)
        nn.init.normal_(self.fc_seg.weight, std=0.01)
        nn.init.zeros_(self.fc_seg.bias)  # type: ignore[arg-type]

    def forward(self, fine: Tensor, coarse: Tensor, points: Tensor) -> Tensor:
        """Features (N,256,h,w), coarse logits (N,C,h,w), points (N,P,2) -> logits (N,C,P)."""
        guess = sample(coarse, points)
        x = sample(fine, points)
        for layer in self.fcs:
            x = layer(torch.cat([x, guess], dim=1))
        logits: Tensor = self.fc_seg(torch.cat([x, guess], dim=1))
        return logits

    @torch.no_grad()
    def draw(self, coarse: Tensor) -> Tensor:
        """Points to learn from, (N,P,2): most of them the least certain of more, the rest any."""
        count, ratio = self.params.train_points, self.params.oversample_ratio
        chosen = int(count * self.params.importance_ratio)
        candidates = int(count * ratio)
        exact = torch.promote_types(coarse.dtype, torch.float32)
        drawn = self.uniform(2 * (candidates + count - chosen)).to(exact)
        points = drawn.view(len(coarse), -1, 2)
        some, rest = points[:, :candidates], points[:, candidates:]
        # Rounded, and the first of equals: where an image is flat, the last digits, which vary with
        # the number of ranks, would choose.
        doubt = (uncertainty(sample(coarse, some)) * 1024).round()
        order = doubt.sort(dim=1, descending=True, stable=True).indices[:, :chosen]
        return torch.cat([some.gather(1, order[..., None].expand(-1, -1, 2)), rest], dim=1)


class PointConv(nn.Sequential):
    """A layer of the perceptron, the same for every point."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.relu = nn.ReLU(inplace=True)


def uncertainty(logits: Tensor) -> Tensor:
    """Second best minus best logit, (N,C,P) -> (N,P): 0 where two classes are equally likely."""
    best, second = logits.topk(2, dim=1).values.unbind(dim=1)
    return second - best


def sample(x: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (N,C,H,W) at points (N,P,2), x and y in [0,1] -> (N,C,P).

    As torch's grid_sample with zeros outside and corners not aligned, which has no deterministic
    backward on CUDA. A sum of weighted rows of a table has, and gathers the four around a point at
    once.
    """
    if torch.compiler.is_exporting():
        grid = 2 * points[:, :, None].to(x.dtype) - 1
        return nn.functional.grid_sample(x, grid, align_corners=False)[..., 0]
    number, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    places, shares = corners(points, height, width)
    first = torch.arange(number, device=x.device)[:, None, None] * (height * width)
    index, weights = (first + places).view(-1, 4), shares.to(x.dtype).view(-1, 4)
    total = nn.functional.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")
    return total.view(number, points.shape[1], channels).permute(0, 2, 1)


def corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four pixels around points (N,P,2) of a map, row after row, and their shares: (N,P,4).

    A pixel outside of the map has a share of 0, and a place inside of it.
    """
    sides = torch.tensor([width, height], device=points.device)
    places = points * sides - 0.5
    low = places.floor()
    beyond = (places - low)[:, :, None]
    right_down = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=points.device)
    pixels = low[:, :, None].long() + right_down  # (N,P,4,2)
    inside = ((pixels >= 0) & (pixels < sides)).all(dim=3)
    shares = torch.where(right_down == 1, beyond, 1 - beyond).prod(dim=3) * inside
    across, down = pixels.clamp(torch.zeros_like(sides), sides - 1).unbind(dim=3)
    return down * width + across, shares
