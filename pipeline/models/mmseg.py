"""MMSegmentation's names of weights -> ours: heads keep them, backbones have timm's."""

import re

import torch
from torch import Tensor

RENAMED = (
    # ResNetV1c's stem.
    (r"^backbone\.stem\.7\.", "backbone.bn1."),
    (r"^backbone\.stem\.", "backbone.conv1."),
    # The mix transformer's embeddings, blocks and last norm of a stage.
    (r"^backbone\.layers\.0\.0\.projection\.", "backbone.patch_embed.proj."),
    (r"^backbone\.layers\.0\.0\.norm\.", "backbone.patch_embed.norm."),
    (r"^backbone\.layers\.(\d)\.0\.projection\.", r"backbone.stages.\1.downsample.proj."),
    (r"^backbone\.layers\.(\d)\.0\.norm\.", r"backbone.stages.\1.downsample.norm."),
    (r"^backbone\.layers\.(\d)\.2\.", r"backbone.stages.\1.norm."),
    (r"^backbone\.layers\.(\d)\.1\.(\d+)\.", r"backbone.stages.\1.blocks.\2."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.dwconv."),
    (r"\.ffn\.layers\.4\.", ".mlp.fc2."),
)
QUERY_KEY_VALUE = re.compile(r"(.*\.attn)\.attn\.in_proj_(weight|bias)")


def from_mmseg(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of MMSegmentation under our names; a name it does not know stays."""
    renamed: dict[str, Tensor] = {}
    for given, value in weights.items():
        name = given
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if match := QUERY_KEY_VALUE.fullmatch(name):  # one matrix for all three
            query, key_value = value.tensor_split([len(value) // 3])
            renamed[f"{match[1]}.q.{match[2]}"] = query
            renamed[f"{match[1]}.kv.{match[2]}"] = key_value
        elif ".mlp.fc" in name and value.dim() == 4:  # a linear layer, as a 1x1 convolution
            renamed[name] = torch.flatten(value, 1)
        else:
            renamed[name] = value
    return renamed
