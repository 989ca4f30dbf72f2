"""Models by name: a backbone, a head, and perhaps an auxiliary head."""

import zlib

from timm.layers.drop import DropPath
from torch import Tensor, nn

from pipeline.models.backbones import build_backbone
from pipeline.models.heads import FCNHead, KeyedDropout2d, PSPHead, UNetHead, resize
from pipeline.params import ModelParams

HEADS: dict[str, type[PSPHead] | type[UNetHead]] = {"pspnet": PSPHead, "unet": UNetHead}


class Segmenter(nn.Module):
    """A backbone under a head, and in training under an auxiliary head as well."""

    def __init__(self, backbone: nn.Module, head: nn.Module, auxiliary: nn.Module | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.auxiliary = auxiliary
        salt_layers(self)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor | list[Tensor]:
        """Normalised images (N,3,H,W) -> logits (N,C,H,W).

        In training mode a list of them, the auxiliary head's second; `keys` (N,) int64 then name
        the samples for the random layers.
        """
        features = [images, *self.backbone(images)]
        if not self.training:
            return resize(self.head(features, keys), images.shape[2:])
        heads = [self.head] if self.auxiliary is None else [self.head, self.auxiliary]
        return [resize(head(features, keys), images.shape[2:]) for head in heads]


def build_model(model: ModelParams, num_classes: int) -> nn.Module:
    """The network of the `model` section, its backbone pretrained as asked, the rest random.

    Raises:
        ValueError: the pretrained weights can't be had or don't fit.
    """
    backbone, widths = build_backbone(model.backbone)
    channels = [3, *widths]
    head = HEADS[model.name](channels, num_classes, model)
    auxiliary = FCNHead(channels, num_classes, model) if model.aux_weight > 0 else None
    return Segmenter(backbone, head, auxiliary)


def salt_layers(model: nn.Module) -> None:
    """Give every keyed layer a stream of its own, and refuse random layers that are not keyed.

    Raises:
        ValueError: names the layers whose draws would depend on the rank or a restart.
    """
    unkeyed = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        or (isinstance(module, DropPath) and (module.drop_prob or 0) > 0)
    ]
    if unkeyed:
        raise ValueError(
            f"random layers without keys: {', '.join(unkeyed)}; their draws would change with the "
            "number of GPUs; set their rate to 0 or use KeyedDropout2d"
        )
    for name, module in model.named_modules():
        if isinstance(module, KeyedDropout2d):
            module.salt = zlib.crc32(name.encode())
