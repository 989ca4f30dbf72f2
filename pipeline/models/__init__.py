"""Networks by the name of their head. A new head is a file beside this one and a line in HEADS."""

from typing import Annotated, Any, Protocol, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from pipeline.models.backbones import BackboneParams
from pipeline.models.deeplabv3 import DeepLabV3Head
from pipeline.models.deeplabv3plus import DeepLabV3PlusHead
from pipeline.models.eomt import EoMT
from pipeline.models.fcn import FCNHead
from pipeline.models.library import LIBRARY, LibraryModel
from pipeline.models.linear import LinearHead
from pipeline.models.losses import LossParams
from pipeline.models.network import Labels, Network
from pipeline.models.pointrend import PointRendHead
from pipeline.models.pspnet import PSPHead
from pipeline.models.segformer import SegFormerHead
from pipeline.models.semantic_fpn import SemanticFPNHead
from pipeline.models.unet import UNetHead
from pipeline.models.upernet import UPerHead
from pipeline.params import Named, Section, choose


class Architecture(Protocol):
    """What a class must have to stand in HEADS. A `Head` inherits all of it but `Params`."""

    @property
    def Params(self) -> type[Named]:  # noqa: N802 - it is a class
        """What configures it: the section `model.head`."""

    def check(self, head: Any, backbone: BackboneParams, loss: LossParams | None) -> None:
        """Raise an InputError that names the key and the rule where sections don't fit together."""

    def check_batch(self, head: Any, microbatch: int, crop_size: tuple[int, int]) -> None:
        """Raise an InputError that names the parameter for a batch that nothing is learned from."""

    def build(
        self, head: Any, backbone: BackboneParams, loss: LossParams | None, labels: Labels
    ) -> Network:
        """The network of these sections; raises an InputError where weights can't be had."""


HEADS: dict[str, Architecture] = {
    "deeplabv3": DeepLabV3Head,
    "deeplabv3plus": DeepLabV3PlusHead,
    "eomt": EoMT,
    "fcn": FCNHead,
    "linear": LinearHead,
    "pointrend": PointRendHead,
    "pspnet": PSPHead,
    "segformer": SegFormerHead,
    "semantic_fpn": SemanticFPNHead,
    "unet": UNetHead,
    "upernet": UPerHead,
}


Level = Annotated[float, Field(ge=0, le=255)]  # of grey
Spread = Annotated[float, Field(ge=0.01, le=10000)]  # of grey levels


class ModelParams(Section):
    """The section `model`: the network, what it learns by, and what normalises its images.

    Without a `loss` a map of logits learns by cross entropy; a network that learns by terms of its
    own takes none. `mean` and `std` are grey levels, those that pretrained weights expect.
    """

    head: SerializeAsAny[Named]
    backbone: BackboneParams
    loss: LossParams | None = None
    mean: tuple[Level, Level, Level]
    std: tuple[Spread, Spread, Spread]

    @field_validator("head", mode="before")
    @classmethod
    def _of_its_name(cls, given: Any) -> Named:
        name = given.get("name") if isinstance(given, dict) else None
        if isinstance(name, str) and name.startswith(LIBRARY):
            return choose({name: LibraryModel.Params}, given)
        table: dict[str, type[Named]] = {name: head.Params for name, head in HEADS.items()}
        return choose(table, given, f", or {LIBRARY}<Architecture>")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        head_of(self.head).check(self.head, self.backbone, self.loss)
        return self


def head_of(head: Named) -> Architecture:
    """The class that a section `model.head` chooses."""
    return LibraryModel if head.name.startswith(LIBRARY) else HEADS[head.name]


def build_model(model: ModelParams, labels: Labels) -> Network:
    """The network of the section `model`, its backbone pretrained as asked, the rest random.

    Raises:
        InputError: the pretrained weights can't be had or don't fit, or the library has no such
            network.
    """
    return head_of(model.head).build(model.head, model.backbone, model.loss, labels)
