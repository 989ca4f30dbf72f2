"""Plain vision transformers: DINOv2 with registers and DINOv3, from timm.

Sources: https://arxiv.org/abs/2010.11929 (the architecture), https://arxiv.org/abs/2304.07193 and
https://arxiv.org/abs/2309.16588 (DINOv2, registers), https://arxiv.org/abs/2508.10104 (DINOv3)
"""

import math
import re
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.layers import padded

PATCH = 16  # the side of a patch in pixels
GRID = 37  # patches along a side of the images that DINOv2 has learned its positions from
DINOV2 = tuple(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large", "giant"))
DINOV3 = tuple(
    f"vit_{size}_patch16_dinov3{bias}"
    for size in ("small", "small_plus", "base", "large", "huge_plus")
    for bias in ("", "_qkvb")
)
# Small ones of either kind, which nobody publishes weights of.
TINY = {
    "vit_tiny_patch14_reg4_dinov2": "vit_small_patch14_reg4_dinov2",
    "vit_tiny_patch16_dinov3": "vit_small_patch16_dinov3_qkvb",
}
TINY_SIZES = {"embed_dim": 32, "depth": 4, "num_heads": 2}
VITS = (*DINOV2, *DINOV3, *TINY)
BLOCKS = (vision_transformer.Block, eva.EvaBlock)


class ViT(nn.Module):
    """A vision transformer for images of any size, its weights under timm's names.

    Patches are 16 pixels wide, DINOv2's too, as EoMT uses it: `patch14` in the name tells which
    published weights it starts from; they are resampled. DINOv2's learned positions are kept as
    they were learned, and resampled to the grid of patches at hand. The coordinates of DINOv3's
    rotary embedding are never jittered.
    """

    multiple = PATCH  # of which an image's sides should be multiples

    def __init__(self, name: str, drop_path: float = 0.0, pretrained: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = dict(TINY_SIZES) if name in TINY else {}
        if "dinov2" in name:
            options |= {"patch_size": PATCH, "img_size": PATCH * GRID}
        network: Any = timm.create_model(
            TINY.get(name, name),
            pretrained=pretrained,
            num_classes=0,
            drop_path_rate=drop_path,
            **options,
        )
        self.width: int = network.embed_dim
        self.num_prefix_tokens: int = network.num_prefix_tokens
        self.no_embed_class = True  # timm: positions belong to patches alone
        self.patch_embed = network.patch_embed
        self.cls_token, self.reg_token = network.cls_token, network.reg_token
        self.pos_embed: nn.Parameter | None = network.pos_embed
        self.rope = getattr(network, "rope", None)
        self.blocks: Any = network.blocks
        self.norm = network.norm

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N,3,H,W) -> the patches after the last block, (N,width,H/16,W/16), sides rounded up."""
        x, rope, grid = self.tokens(images)
        for block in self.blocks:
            x = self.apply_block(block, x, rope)
        patches = self.norm(x)[:, self.num_prefix_tokens :]
        return [patches.transpose(1, 2).unflatten(2, grid)]

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """What enters the first block, what every block rotates by, and the grid of patches.

        (N,3,H,W) -> (N, prefix tokens + patches, width): class, registers, then patches in rows.
        Images are padded at the bottom and the right, by zeros.
        """
        x = self.patch_embed.proj(padded(images, PATCH))
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x = x + self._positions(self.pos_embed, grid)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token)]
        return torch.cat([*prefix, x], dim=1), self._rotation(grid), grid

    def apply_block(
        self, block: nn.Module, x: Tensor, rope: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """A block on tokens (N,L,width); mask (N,1,L,L): True where a row may look at a column."""
        result: Tensor = block(x, mask) if rope is None else block(x, rope, mask)
        return result

    def _positions(self, learned: Tensor, grid: tuple[int, int]) -> Tensor:
        """The learned positions on another grid, (1, patches, width): bicubic, antialiased.

        As two matrix products: torch's own has no deterministic backward on CUDA.
        """
        side = math.isqrt(learned.shape[1])
        exporting = torch.compiler.is_exporting()
        if not exporting and grid == (side, side):
            return learned
        make = _resampling_of_symbols if exporting else _resampling
        rows, columns = (make(side, new, learned.dtype, learned.device) for new in grid)
        with torch.autocast(learned.device.type, enabled=False):
            across = columns @ learned.view(side, side, -1)  # (side, new columns, width)
            return (rows @ across.flatten(1)).view(1, grid[0] * grid[1], -1)

    def _rotation(self, grid: tuple[int, int]) -> Tensor | None:
        """DINOv3's rotary embedding of the patches' centres, (patches, 2 x width of a head)."""
        if self.rope is None:
            return None
        periods: Tensor = self.rope.periods
        centres = [
            (torch.arange(side, dtype=periods.dtype, device=periods.device) + 0.5) / side * 2 - 1
            for side in grid
        ]
        places = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=2).flatten(0, 1)
        angles = (2 * math.pi * places[..., None] / periods).flatten(1).repeat(1, 2)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def translated(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published weights, timm's or Meta's, under our names and resampled to patches of 16."""
        kind = vision_transformer if self.rope is None else eva
        translated: dict[str, Tensor] = kind.checkpoint_filter_fn(dict(weights), self)
        return translated

    def adopt_grid(self, positions: Tensor | None) -> None:
        """Make room for learned positions of another grid than ours, before they are loaded.

        EoMT's published weights have them on the grid of the images they were trained with. The
        parameter stays the same object, an optimizer may know it already.
        """
        if self.pos_embed is None or positions is None:
            return
        if positions.shape == self.pos_embed.shape:
            return
        places = positions.shape[1] if positions.dim() == 3 else 0
        if positions.shape[2:] == (self.width,) and math.isqrt(places) ** 2 == places > 0:
            self.pos_embed.data = self.pos_embed.data.new_empty(positions.shape)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        self.adopt_grid(state_dict.get(f"{prefix}pos_embed"))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def depth_of(self, name: str) -> int:
        """How deep a parameter lies: 0 what makes tokens, i + 1 block i, the last + 1 the norm."""
        if match := re.match(r"blocks\.(\d+)\.", name):
            return int(match[1]) + 1
        return len(self.blocks) + 1 if name.startswith("norm.") else 0

    def lr_mult(self, name: str, decay: float) -> float:
        """A parameter's share of the learning rate, by layer-wise decay as EoMT has it.

        The last block and the norm learn at the full rate, every block before by `decay` less than
        the next, and what makes tokens as the first block.
        Source: training/lightning_module.py of https://github.com/tue-mps/eomt
        """
        blocks = len(self.blocks)
        return float(decay ** max(blocks - max(self.depth_of(name), 1), 0))


@lru_cache(maxsize=64)
def _resampling(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(new, old): each row holds the weights of the old places in a new one."""
    with torch.inference_mode(mode=False):  # what is kept must serve in training too
        lines = torch.eye(old, dtype=torch.float64).view(1, old, 1, old)
        resized = F.interpolate(lines, (1, new), mode="bicubic", antialias=True)
        return resized[0, :, 0].T.contiguous().to(device, dtype)


def _resampling_of_symbols(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same by arithmetic, for torch.export, to which the sizes are symbols.

    Keys' cubic convolution with a = -1/2, stretched where the new places are fewer.
    Source: doi:10.1109/TASSP.1981.1163711, and torch's UpSampleKernel.cpp
    """
    step = old / new
    reach: Any = torch.sym_max(step, 1.0)
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * step - 0.5
    x = ((torch.arange(old) - centres[:, None]) / reach).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return (weights / weights.sum(dim=1, keepdim=True)).to(device, dtype)
