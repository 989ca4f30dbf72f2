"""Names of EoMT's weights, as transformers or its authors save them -> ours: a ViT has timm's."""

import re

import torch
from torch import Tensor

SIGNS = (
    {"query.weight", "class_predictor.weight"},
    {"network.q.weight"},
)  # transformers', authors'
RENAMED = (
    # The authors'.
    (r"^network\.encoder\.backbone\.", "backbone."),
    (r"^network\.", ""),
    # transformers'.
    (r"^embeddings\.cls_token$", "backbone.cls_token"),
    (r"^embeddings\.register_tokens$", "backbone.reg_token"),
    (r"^embeddings\.position_embeddings\.weight$", "backbone.pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "backbone.patch_embed.proj."),
    (r"^layers\.(\d+)\.attention\.(out|o)_proj\.", r"backbone.blocks.\1.attn.proj."),
    (r"^layers\.(\d+)\.attention\.", r"backbone.blocks.\1.attn."),
    (r"^layers\.(\d+)\.", r"backbone.blocks.\1."),
    (r"^layernorm\.", "backbone.norm."),
    (r"^query\.", "q."),
    (r"^class_predictor\.", "class_head."),
    (r"^mask_head\.fc1\.", "mask_head.0."),
    (r"^mask_head\.fc2\.", "mask_head.2."),
    (r"^mask_head\.fc3\.", "mask_head.4."),
    (r"^upscale_block\.block\.(\d+)\.", r"upscale.\1."),
    (r"\.layernorm2d\.", ".norm."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
DINOV2 = ((r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),)
DINOV3 = (
    (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
    (r"\.attn\.([qv])_proj\.bias$", r".attn.\1_bias"),
)
DROPPED = re.compile(
    r"criterion\..*|network\.criterion\..*|network\.encoder\.pixel_.*|embeddings\.mask_token"
)


def from_eomt(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of EoMT under our names; any other comes back as it is.

    Sources: https://github.com/huggingface/transformers (models eomt and eomt_dinov3),
    https://github.com/tue-mps/eomt
    """
    if not any(sign <= weights.keys() for sign in SIGNS):
        return weights
    absolute = {"embeddings.position_embeddings.weight", "network.encoder.backbone.pos_embed"}
    rotary = not absolute & weights.keys()
    gated = any(".mlp.gate_proj." in name for name in weights)
    renamed: dict[str, Tensor] = {}
    for given, value in weights.items():
        if DROPPED.fullmatch(given):
            continue
        name = given
        for pattern, replacement in (*RENAMED, *(DINOV3 if rotary else DINOV2)):
            name = re.sub(pattern, replacement, name)
        renamed[name] = value[None] if name.endswith("pos_embed") and value.dim() == 2 else value
    for name in list(renamed):
        if name.endswith(".attn.k_proj.weight"):
            _join(renamed, name.removesuffix("k_proj.weight"), rotary)
        elif name.endswith(".mlp.up_proj.weight"):
            _rename_perceptron(renamed, name.removesuffix("up_proj.weight"), gated, rotary)
    return renamed


def _join(weights: dict[str, Tensor], prefix: str, rotary: bool) -> None:
    """Query, key and value in one matrix; DINOv3's biases stay apart, and a key has none."""
    for kind in ("weight",) if rotary else ("weight", "bias"):
        parts = [weights.pop(f"{prefix}{one}_proj.{kind}") for one in "qkv"]
        weights[f"{prefix}qkv.{kind}"] = torch.cat(parts)
    weights.pop(f"{prefix}k_proj.bias", None)  # moves all logits of a query alike: no effect


def _rename_perceptron(weights: dict[str, Tensor], prefix: str, gated: bool, rotary: bool) -> None:
    """Where a gate stands beside the first layer, DINOv2 has both in one matrix."""
    for kind in ("weight", "bias"):
        up = weights.pop(f"{prefix}up_proj.{kind}")
        if not gated:
            weights[f"{prefix}fc1.{kind}"] = up
        elif rotary:
            weights[f"{prefix}fc1_g.{kind}"] = weights.pop(f"{prefix}gate_proj.{kind}")
            weights[f"{prefix}fc1_x.{kind}"] = up
        else:
            weights[f"{prefix}fc1.{kind}"] = torch.cat(
                [weights.pop(f"{prefix}gate_proj.{kind}"), up]
            )
