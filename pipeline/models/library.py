"""The networks of segmentation_models_pytorch, https://smp.readthedocs.io, under our contract."""

import copy
import warnings
from typing import Any, ClassVar

import timm
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.models.backbones import BackboneParams
from pipeline.models.layers import AveragePool
from pipeline.models.losses import LossParams
from pipeline.models.network import Labels
from pipeline.models.segmenter import MapNetwork, Output
from pipeline.params import Named, nearest, one_of

LIBRARY = "smp."  # what the names of its networks begin with here
TIMM = "tu-"  # what the library's names of timm's networks begin with


class LibraryModel(MapNetwork):
    """A network of the library, `smp.<Architecture>`, for images of any size."""

    Params: ClassVar[type[Named]] = Named
    multiple = 32  # what most of its networks need an image's sides to be multiples of

    def __init__(self, network: nn.Module, loss: LossParams | None, labels: Labels) -> None:
        super().__init__(loss, labels)
        self.network = network
        self.key_draws()

    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The library's encoder."""
        encoder: nn.Module = self.network.encoder  # type: ignore[assignment]
        return encoder

    def outputs(self, images: Tensor) -> list[Output]:
        return [Output(self.network(images))]

    @staticmethod
    def check(head: Named, backbone: BackboneParams, loss: LossParams | None) -> None:
        """Refuse what only our own backbones have, and what the library has not.

        Raises:
            InputError: names the keys, or the nearest name that there is.
        """
        own = backbone.model_fields_set - {"name", "pretrained"}
        changed = [
            f"backbone.{key}"
            for key in sorted(own)
            if getattr(backbone, key) != BackboneParams.model_fields[key].default
        ]
        if changed:
            raise InputError(
                f"{', '.join(changed)}: a network of {LIBRARY}* has its own; leave them out"
            )
        check_names(head.name, backbone)
        try:
            with torch.device("meta"), warnings.catch_warnings():  # without memory for its weights
                warnings.simplefilter("ignore")
                architectures()[head.name](backbone.name, encoder_weights=None, classes=2)
        except RuntimeError:
            pass  # an encoder that asks for a value: it is built, and heard, in training
        except (KeyError, ValueError) as error:
            raise InputError(f"{head.name} with the encoder {backbone.name}: {error}") from error

    @classmethod
    def check_batch(cls, head: Named, microbatch: int, crop_size: tuple[int, int]) -> None:
        """Refuse crops that would be padded in training.

        Raises:
            InputError: names the parameter and the nearest size.
        """
        if any(side % cls.multiple for side in crop_size):
            nearest_sides = [max(32, round(side / 32) * 32) for side in crop_size]
            raise InputError(
                f"augmentation.crop_size {list(crop_size)}: {head.name} is trained on sides that "
                f"{cls.multiple} divides; use {nearest_sides}"
            )

    @classmethod
    def build(
        cls, head: Named, backbone: BackboneParams, loss: LossParams | None, labels: Labels
    ) -> "LibraryModel":
        """The architecture that `head.name` says, with the encoder `backbone.name`.

        Raises:
            InputError: the library has no such architecture or encoder, or lacks its weights.
        """
        network = build_network(head.name, backbone, labels.num_classes)
        model = cls(network, loss, labels)
        _try_out(model, f"model: {head.name} with the encoder {backbone.name}")
        return model


def build_network(name: str, backbone: BackboneParams, num_classes: int) -> nn.Module:
    """The library's network as it is, but for pooling, which becomes deterministic on a GPU."""
    try:
        network: nn.Module = architectures()[name](
            backbone.name, encoder_weights=backbone.pretrained, classes=num_classes
        )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"model: {name} with the encoder {backbone.name}: {error}") from error
    for parent in list(network.modules()):
        for own, child in parent.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                match child.output_size:
                    case int(bins) | (int(bins), _):  # it pools to squares
                        setattr(parent, own, AveragePool(bins))
    return network


def architectures() -> dict[str, Any]:
    """The library's architectures, by our names."""
    import segmentation_models_pytorch as smp  # only where it is asked for

    return {LIBRARY + one.__name__: one for one in smp.MODEL_ARCHITECTURES_MAPPING.values()}


def check_names(name: str, backbone: BackboneParams) -> None:
    """Refuse an architecture, an encoder or weights that the library does not have.

    Raises:
        InputError: names the key and the nearest that there is.
    """
    from segmentation_models_pytorch.encoders import encoders

    one_of("head.name", name, architectures())
    encoder, weights = backbone.name, backbone.pretrained
    of_timm = encoder.removeprefix(TIMM)
    if encoder.startswith(TIMM):
        if not timm.is_model(of_timm):
            near = nearest(of_timm, timm.list_models())
            raise InputError(
                f"backbone.name {encoder!r}: timm has no {of_timm}; did you mean {TIMM}{near}?"
            )
        try:
            config = timm.get_pretrained_cfg(of_timm)
        except RuntimeError as error:  # of what stands behind the dot
            raise InputError(f"backbone.name {encoder!r}: {error}") from error
        offered = ["imagenet"] if config and config.has_weights else []
    else:
        one_of("backbone.name", encoder, encoders, f", or {TIMM} and a name of timm's")
        offered = [*encoders[encoder]["pretrained_settings"]]
    if weights is not None and weights not in offered:
        raise InputError(
            f"backbone.pretrained: {LIBRARY}* has no weights {weights!r} of {encoder}; use "
            f"{' or '.join([*offered, 'null'])}"
        )


def _try_out(model: LibraryModel, what: str) -> None:
    """Freeze what no gradient reaches, which processes would wait for.

    Raises:
        InputError: a layer draws by other means than the random layers that could be keyed.
    """
    trial, before = copy.deepcopy(model).train(), torch.get_rng_state()
    outputs = trial(torch.zeros(2, 3, 224, 224), torch.arange(2))
    if not torch.equal(before, torch.get_rng_state()):
        raise InputError(
            f"{what} draws random numbers without keys, which would change with the number of "
            "GPUs; use another encoder, as one of timm's (tu-...)"
        )
    torch.autograd.backward(outputs[0].logits.sum())
    for own, tried in zip(model.parameters(), trial.parameters(), strict=True):
        own.requires_grad_(tried.grad is not None)
