"""Networks that answer with a map of logits, and what most of them are: a backbone under a head."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.models.backbones import BackboneParams, build_backbone
from pipeline.models.keyed import KeyedDropout
from pipeline.models.layers import ConvModule, padded, resized_band, taps
from pipeline.models.losses import Criterion, LossParams, labels_at
from pipeline.models.network import Labels, Network
from pipeline.params import AtLeast0, Fraction, Named


class Output(NamedTuple):
    """Logits of the images' own or a smaller size, (N,C,h,w), or (N,C,P) at `points`.

    Points (N,P,2) are x and y in [0,1). The loss has terms named `name` and the name of each of the
    criterion's terms, times `weight`.
    """

    logits: Tensor
    points: Tensor | None = None
    name: str = ""
    weight: float = 1.0


class MapNetwork(Network):
    """A network whose scores are one map of logits, which learns by the terms of `model.loss`.

    Images are padded at the bottom and the right, by zeros, until `multiple` divides their sides;
    what belongs to the padding is cut off again.
    """

    multiple = 1

    def __init__(self, loss: LossParams | None, labels: Labels) -> None:
        super().__init__()
        terms = loss or LossParams(cross_entropy=1.0)
        self.criterion = Criterion(terms, labels.frequency, labels.ignore_index)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> list[Output]:
        """Normalised images (N,3,H,W) -> in training all there is to learn from, else the map."""
        outputs: list[Output] = super().forward(padded(images, self.multiple), keys)
        return outputs

    def count(self, target: Tensor) -> Tensor:
        return self.criterion.count(target)

    def losses(
        self, outputs: list[Output], target: Tensor, keys: Tensor, divisors: Tensor
    ) -> dict[str, Tensor]:
        terms = {}
        for output in outputs:
            if output.points is None:
                found = self.criterion(output.logits, target, divisors, self._padded(target.shape))
            else:  # as many points in every image, labelled or not
                labels = labels_at(target, output.points)
                counts = self.criterion.divisors_of_points(divisors, labels.shape[1])
                found = self.criterion(output.logits, labels, counts)
            for name, term in found.items():
                terms[output.name + name] = output.weight * term
        return terms

    def scores(self, outputs: list[Output], size: tuple[int, int], rows: slice) -> Tensor:
        """The logits of these rows, at least fp32: rounded to bf16, classes would tie."""
        logits = outputs[0].logits
        old, whole = logits.shape[2], self._padded(size)
        near = logits[:, :, taps(old, whole[0], rows)]
        exact = near.to(torch.promote_types(near.dtype, torch.float32))
        return resized_band(exact, old, whole, rows)[..., : size[1]]

    def _padded(self, size: tuple[int, ...]) -> tuple[int, int]:
        """The size, of which the last two are read, as `forward` pads it."""
        least = self.multiple - 1
        height, width = ((side + least) // self.multiple * self.multiple for side in size[-2:])
        return height, width


class HeadParams(Named):
    """The section `model.head` of a head on a backbone.

    `dropout` takes whole channels before a classifier. `aux_weight` is that of the auxiliary head's
    loss, 0 for no such head.
    """

    dropout: Fraction = 0.1
    aux_weight: AtLeast0 = 0.4

    @property
    def pools_to_one(self) -> bool:
        """Whether a map becomes a single pixel in front of a batch normalisation."""
        return False


class Head(nn.Module, ABC):
    """Features -> outputs, the first of which is the map of logits.

    A head is built from the channels of its features, the number of classes and an instance of its
    own `Params`, the section that configures it. `levels` is how many of the coarsest features it
    reads. `neck`, where there is one, is built from the channels of the features and makes other
    features of them.
    """

    Params: ClassVar[type[HeadParams]] = HeadParams
    levels: ClassVar[int] = 1
    neck: ClassVar[Any] = None

    @abstractmethod
    def forward(self, features: list[Tensor]) -> list[Output]:
        """The image and features from fine to coarse, (N,K,H,W) -> outputs of any size."""

    @classmethod
    def check(cls, head: HeadParams, backbone: BackboneParams, loss: LossParams | None) -> None:
        """Refuse sections that don't fit together.

        Raises:
            InputError: names the key and the rule.
        """
        backbone.check()
        needed = max(cls.levels, 2 if head.aux_weight > 0 else 1)
        if backbone.levels < needed:
            raise InputError(
                f"backbone.name {backbone.name} has {backbone.levels} maps of features, and "
                f"{head.name} with head.aux_weight {head.aux_weight:g} needs {needed}; use another "
                "backbone, such as a resnet or efficientnet_lite0, or another head"
            )

    @classmethod
    def check_batch(cls, head: HeadParams, microbatch: int, crop_size: tuple[int, int]) -> None:
        """Refuse a batch that the head can't learn from.

        Raises:
            InputError: names the parameters and the rule.
        """
        if head.pools_to_one and microbatch < 2:
            raise InputError(
                f"train.batch_size / train.accumulation is 1, and the 1x1 pooling of {head.name} "
                "leaves batch normalisation a single value a channel; use at least 2"
            )

    @classmethod
    def build(
        cls, head: Any, backbone: BackboneParams, loss: LossParams | None, labels: Labels
    ) -> "Segmenter":
        """The whole network: this head, by its section `head`, on a backbone."""
        return Segmenter(cls, head, backbone=backbone, loss=loss, labels=labels)


class Classifier(Head):
    """A head whose logits are a 1x1 convolution, after dropout, of what it decodes.

    Attributes carry the names of MMSegmentation's modules, so that its checkpoints fit; so does
    what weights start from: https://github.com/open-mmlab/mmsegmentation
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = KeyedDropout(dropout, axes=1)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor]) -> list[Output]:
        return [Output(self.conv_seg(self.dropout(self.decode(features))))]

    @abstractmethod
    def decode(self, features: list[Tensor]) -> Tensor:
        """The image and features -> what the classes are read from, (N,channels,h,w)."""


class AuxiliaryHead(Classifier):
    """One 3x3 convolution on the second coarsest features, to a quarter of their channels.

    Source: https://arxiv.org/abs/1612.01105
    """

    levels = 2

    def __init__(self, widths: list[int], num_classes: int, params: HeadParams) -> None:
        channels = widths[-2] // 4
        super().__init__(channels, num_classes, params.dropout)
        self.convs = nn.Sequential(ConvModule(widths[-2], channels, 3))

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features at the second coarsest."""
        decoded: Tensor = self.convs(features[-2])
        return decoded


class Segmenter(MapNetwork):
    """A backbone under a head, and in training under an auxiliary head as well."""

    def __init__(
        self,
        head: Any,
        params: HeadParams,
        backbone: BackboneParams,
        loss: LossParams | None,
        labels: Labels,
    ) -> None:
        super().__init__(loss, labels)
        self.backbone, channels = build_backbone(backbone)
        self.multiple = getattr(self.backbone, "multiple", 1)
        widths, classes = [3, *channels], labels.num_classes
        self.neck = None if head.neck is None else head.neck(widths)
        self.decode_head = head(widths, classes, params)
        self.aux_weight = params.aux_weight
        auxiliary = params.aux_weight > 0
        self.auxiliary_head = AuxiliaryHead(widths, classes, params) if auxiliary else None
        self.key_draws()

    def outputs(self, images: Tensor) -> list[Output]:
        features = [images, *self.backbone(images)]
        outputs: list[Output]
        outputs = self.decode_head(features if self.neck is None else self.neck(features))
        if self.training and self.auxiliary_head is not None:
            (auxiliary,) = self.auxiliary_head(features)
            outputs = [*outputs, auxiliary._replace(name="auxiliary_", weight=self.aux_weight)]
        return outputs
