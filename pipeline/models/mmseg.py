"""MMSegmentation's names of weights -> ours: heads keep them, backbones have timm's."""

import re

from torch import Tensor

RENAMED = (
    # ResNetV1c's stem.
    (r"^backbone\.stem\.7\.", "backbone.bn1."),
    (r"^backbone\.stem\.", "backbone.conv1."),
)


def from_mmseg(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of MMSegmentation under our names; a name it does not know stays."""
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
