"""Models by name: a backbone, perhaps a neck, a head, and perhaps an auxiliary head."""

from torch import Tensor, nn

from pipeline.models.backbones import build_backbone
from pipeline.models.deeplabv3 import DeepLabV3Head
from pipeline.models.deeplabv3plus import DeepLabV3PlusHead
from pipeline.models.fcn import AuxiliaryHead, FCNHead
from pipeline.models.keyed import key_random_layers
from pipeline.models.layers import Output, whole
from pipeline.models.library import build_library_model
from pipeline.models.pointrend import PointRendHead
from pipeline.models.pspnet import PSPHead
from pipeline.models.segformer import SegFormerHead
from pipeline.models.semantic_fpn import FPN, SemanticFPNHead
from pipeline.models.unet import UNetHead
from pipeline.models.upernet import UPerHead
from pipeline.params import LIBRARY, ModelParams

HEADS = {
    "deeplabv3": DeepLabV3Head,
    "deeplabv3plus": DeepLabV3PlusHead,
    "fcn": FCNHead,
    "pointrend": PointRendHead,
    "pspnet": PSPHead,
    "segformer": SegFormerHead,
    "semantic_fpn": SemanticFPNHead,
    "unet": UNetHead,
    "upernet": UPerHead,
}
NECKS = {"pointrend": FPN, "semantic_fpn": FPN}


class Segmenter(nn.Module):
    """A backbone under a head, and in training under an auxiliary head as well."""

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module | None,
        decode_head: nn.Module,
        auxiliary_head: nn.Module | None,
        aux_weight: float,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.aux_weight = aux_weight
        self.keyed = key_random_layers(self)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor | list[Output]:
        """Normalised images (N,3,H,W) -> logits (N,C,H,W).

        In training mode what there is to learn from instead; `keys` (N,) int64 then name the
        samples for the random layers.
        """
        for layer in self.keyed:
            layer.keys = keys
        features = [images, *self.backbone(images)]
        outputs = self.decode_head(features if self.neck is None else self.neck(features))
        if self.training and self.auxiliary_head is not None:
            (auxiliary,) = self.auxiliary_head(features)
            outputs = [*outputs, auxiliary._replace(weight=self.aux_weight)]
        dense = [
            output._replace(logits=whole(output.logits, images.shape[2:]))
            if output.points is None
            else output
            for output in outputs
        ]
        return dense if self.training else dense[0].logits


def build_model(model: ModelParams, num_classes: int) -> nn.Module:
    """The network of the `model` section, its backbone pretrained as asked, the rest random.

    Raises:
        ValueError: the pretrained weights can't be had or don't fit, or the library has no such
            network.
    """
    if model.name.startswith(LIBRARY):
        return build_library_model(model, num_classes)
    backbone, channels = build_backbone(model.backbone)
    widths = [3, *channels]
    neck = NECKS[model.name](widths) if model.name in NECKS else None
    head = HEADS[model.name](widths, num_classes, model)
    auxiliary = AuxiliaryHead(widths, num_classes, model) if model.aux_weight > 0 else None
    return Segmenter(backbone, neck, head, auxiliary, model.aux_weight)
