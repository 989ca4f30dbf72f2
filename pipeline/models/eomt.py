"""EoMT: a plain vision transformer in whose last blocks queries take part and become masks.

Source: https://arxiv.org/abs/2503.19108
"""

from typing import NamedTuple, Self, cast

import torch
from pydantic import model_validator
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.models.backbones import BackboneParams, build_backbone, recomputed
from pipeline.models.keyed import Keyed
from pipeline.models.layers import bands, resize, resized_band, taps
from pipeline.models.losses import LossParams
from pipeline.models.network import Labels, Network
from pipeline.models.set_loss import Prediction, SetLoss, SetLossParams
from pipeline.models.vit import PATCH, VITS, ViT
from pipeline.params import Few, Probability, Width, one_of

POWER = 0.9  # of the annealing's polynomial
STRIDE = 4  # of the masks


class EoMTParams(SetLossParams):
    """`num_queries` queries join the last `num_blocks` blocks of the backbone.

    Published are 3 blocks for small and base, 4 for large and 5 for giant. In each of them queries
    look only where their masks are, until, block by block, that ends: a query is masked with a
    probability that falls from 1 to 0 while the share of the training that is done rises from the
    first to the second number of `annealing`, a pair for each block. Null: the published intervals.
    """

    num_queries: Width = 100
    num_blocks: Few = 4
    annealing: tuple[tuple[Probability, Probability], ...] | None = None

    @model_validator(mode="after")
    def _a_pair_for_each_block(self) -> Self:
        if self.annealing is None:
            return self
        if len(self.annealing) != self.num_blocks:
            raise InputError(
                f"annealing has {len(self.annealing)} pairs for {self.num_blocks} blocks; give one "
                "[start, end] a block, or null"
            )
        if wrong := [list(pair) for pair in self.annealing if pair[0] >= pair[1]]:
            raise InputError(f"annealing: {wrong[0]} must rise")
        return self

    def intervals(self) -> list[tuple[float, float]]:
        """When each block's masks are annealed, in shares of the training.

        All published configurations have these: intervals of a sixth, the first begins after a
        sixth, the last ends a sixth before the end, the others lie evenly between.
        Source: configs/dinov2 of https://github.com/tue-mps/eomt
        """
        if self.annealing is not None:
            return list(self.annealing)
        gaps = max(self.num_blocks - 1, 1)
        starts = [1 / 6 + block / gaps / 2 for block in range(self.num_blocks)]
        return [(start, start + 1 / 6) for start in starts]


class Outputs(NamedTuple):
    """Predictions, the last one counts; the image's share of their masks' height and width."""

    predictions: list[Prediction]
    extent: tuple[float, float]


class EoMT(Network):
    """A backbone whose last blocks have the queries among their tokens.

    In evaluation a query is masked in a block while that is the likelier there: no draws, and no
    mask at all once it is annealed. Images are padded at the bottom and the right.
    """

    Params = EoMTParams

    def __init__(
        self, backbone: ViT, params: EoMTParams, labels: Labels, with_cp: bool = False
    ) -> None:
        super().__init__()
        width = backbone.width
        if params.num_blocks > len(backbone.blocks):
            raise InputError(
                f"head.num_blocks {params.num_blocks}: the backbone has {len(backbone.blocks)}"
            )
        self.params = params
        self.loss = SetLoss(params, params.num_queries, labels)
        self.backbone: ViT = backbone
        self.q = nn.Embedding(params.num_queries, width)
        self.class_head = nn.Linear(width, labels.num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        self.upscale = nn.Sequential(Upscale(width), Upscale(width))  # from stride 16 to 4
        if with_cp:
            for layer in self.upscale:
                recomputed(layer)
        self.attn_mask_probs: Tensor
        self.register_buffer("attn_mask_probs", torch.ones(params.num_blocks))
        self.settled: list[bool] | None = None
        self.draws = nn.ModuleList(Keyed() for _ in range(params.num_blocks))
        if backbone.rope is not None:  # queries have no place to be rotated by
            for block in backbone.blocks[-params.num_blocks :]:
                block.attn.num_prefix_tokens += params.num_queries
        self.key_draws()

    @classmethod
    def check(cls, head: EoMTParams, backbone: BackboneParams, loss: LossParams | None) -> None:
        """Refuse sections that don't fit together.

        Raises:
            InputError: names the key and the rule.
        """
        backbone.check()
        one_of("backbone.name", backbone.name, VITS)
        if loss is not None:
            raise InputError(
                "loss: eomt learns by terms of its own, whose weights are in head; leave it out"
            )

    @classmethod
    def check_batch(cls, head: EoMTParams, microbatch: int, crop_size: tuple[int, int]) -> None:
        """Any batch will do."""

    @classmethod
    def build(
        cls, head: EoMTParams, backbone: BackboneParams, loss: LossParams | None, labels: Labels
    ) -> Self:
        """The network of the sections `model.head` and `model.backbone`.

        Raises:
            InputError: the weights of the backbone can't be had.
        """
        vit, _ = build_backbone(backbone)
        assert isinstance(vit, ViT), "check lets no other backbone through"
        return cls(vit, head, labels, backbone.with_cp)

    def advance(self, done: float) -> None:
        """Anneal each block's masks."""
        for probability, (start, end) in zip(
            self.attn_mask_probs, self.params.intervals(), strict=True
        ):
            left = (end - done) / (end - start)
            probability.fill_(min(max(left, 0.0), 1.0) ** POWER)

    def outputs(self, images: Tensor) -> Outputs:
        """Normalised images (N,3,H,W) -> predictions before each masked block, and at the end."""
        x, rope, grid = self.backbone.tokens(images)
        extent = (images.shape[2] / (PATCH * grid[0]), images.shape[3] / (PATCH * grid[1]))
        first = len(self.backbone.blocks) - self.params.num_blocks
        masked = [True] * self.params.num_blocks if self.training else self._likely_masked()
        predictions = []
        for number, block in enumerate(self.backbone.blocks, start=-first):
            mask = None
            if number == 0:
                x = torch.cat([self.q.weight.expand(x.shape[0], -1, -1), x], dim=1)
            if number >= 0 and masked[number]:
                predictions.append(self._predict(x, grid))
                mask = self._attention_mask(predictions[-1].masks, grid, number)
            x = self.backbone.apply_block(block, x, rope, mask)
        predictions.append(self._predict(x, grid))
        return Outputs(predictions, extent)

    def _likely_masked(self) -> list[bool]:
        """For each of the last blocks, whether a query is rather masked there than not.

        This waits for the device, and saves most of what the queries cost in evaluation.
        """
        if self.settled is not None:
            return self.settled
        likely: list[bool] = (self.attn_mask_probs >= 0.5).tolist()
        return likely

    def settle(self) -> None:
        self.settled = self._likely_masked()

    def _predict(self, x: Tensor, grid: tuple[int, int]) -> Prediction:
        """What the tokens (N,L,width) mean so far; masks have stride 4."""
        normed = self.backbone.norm(x)
        queries = normed[:, : self.params.num_queries]
        patches = normed[:, self.params.num_queries + self.backbone.num_prefix_tokens :]
        features = self.upscale(patches.transpose(1, 2).unflatten(2, grid))
        masks = torch.einsum("nqc,nchw->nqhw", self.mask_head(queries), features)
        return Prediction(self.class_head(queries), masks)

    @torch.no_grad()
    def _attention_mask(self, masks: Tensor, grid: tuple[int, int], number: int) -> Tensor:
        """Which token may look at which, (N,1,L,L): queries only at patches of their own masks.

        Everything else is open; a query that is not masked this time looks everywhere.
        """
        seen = resize(masks, grid).flatten(2) > 0  # (N,Q,patches)
        if self.training:
            draw = cast("Keyed", self.draws[number]).uniform(self.params.num_queries)
            seen = seen | (draw >= self.attn_mask_probs[number])[..., None]
        prefix, patches = self.backbone.num_prefix_tokens, seen.shape[2]
        before = self.params.num_queries + prefix
        return F.pad(seen, (before, 0, 0, prefix + patches), value=True)[:, None]

    def count(self, target: Tensor) -> Tensor:
        return self.loss.count(target)

    def losses(
        self, outputs: Outputs, target: Tensor, keys: Tensor, divisors: Tensor
    ) -> dict[str, Tensor]:
        return self.loss(outputs.predictions, outputs.extent, target, keys, divisors)

    def scores(self, outputs: Outputs, size: tuple[int, int], rows: slice) -> Tensor:
        """A class's score is the sum over the queries of its probability times the mask's."""
        classes, masks = outputs.predictions[-1]
        exact = torch.promote_types(masks.dtype, torch.float32)
        shares = classes.to(exact).softmax(dim=2)[..., :-1]
        old = masks.shape[2]
        if torch.compiler.is_exporting():  # no number of its own may come of the symbols
            height, width = (STRIDE * side for side in masks.shape[2:])
        else:
            height, width = (
                round(side / share) for side, share in zip(size, outputs.extent, strict=True)
            )
        scores = []
        for band in bands(rows, masks[:, :, 0, 0].numel() * width):  # there may be more queries
            near = masks[:, :, taps(old, height, band)].to(exact)
            chances = resized_band(near, old, (height, width), band)[..., : size[1]].sigmoid()
            with torch.autocast(masks.device.type, enabled=False):
                found = chances.permute(0, 2, 3, 1).flatten(1, 2) @ shares  # (N, rows x W, C)
            scores.append(found.view(found.shape[0], -1, size[1], found.shape[2]))
        return torch.cat(scores, dim=1).permute(0, 3, 1, 2)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores are shares already; they are made to sum to one."""
        return scores / scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


class Upscale(nn.Module):
    """Twice the size: a transposed convolution, then one of each channel, normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, 2, 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = LayerNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N,width,h,w) -> (N,width,2h,2w)."""
        result: Tensor = self.norm(self.conv2(self.act(self.conv1(x))))
        return result
