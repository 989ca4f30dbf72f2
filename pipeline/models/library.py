"""The networks of segmentation_models_pytorch, https://smp.readthedocs.io, under our contract."""

import copy
import difflib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.keyed import key_random_layers
from pipeline.models.layers import AveragePool, Output
from pipeline.params import LIBRARY, ModelParams

STRIDE = 32  # what most of its networks need an image's sides to be multiples of


class LibraryModel(nn.Module):
    """A network of the library under the contract of ours, for images of any size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.keyed = key_random_layers(network)

    @property
    def backbone(self) -> nn.Module:
        """The library's encoder."""
        encoder: nn.Module = self.network.encoder  # type: ignore[assignment]
        return encoder

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor | list[Output]:
        """Normalised images (N,3,H,W) -> logits (N,C,H,W); in training one output with them.

        Images are padded at the bottom and the right by zeros, the normalised mean.
        """
        for layer in self.keyed:
            layer.keys = keys
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE))
        logits: Tensor = self.network(padded)[:, :, :height, :width]
        return [Output(logits)] if self.training else logits


def build_library_model(model: ModelParams, num_classes: int) -> LibraryModel:
    """`smp.<Architecture>` with the encoder `model.backbone.name`.

    Raises:
        ValueError: the library has no such architecture or encoder, or lacks its weights.
    """
    import segmentation_models_pytorch as smp

    architectures = {one.__name__: one for one in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    name, encoder = model.name.removeprefix(LIBRARY), model.backbone.name
    if name not in architectures:
        (close,) = difflib.get_close_matches(name, architectures, n=1, cutoff=0)
        raise ValueError(
            f"model.name: segmentation_models_pytorch has no {name}; did you mean "
            f"{LIBRARY}{close}? It has {', '.join(sorted(architectures))}"
        )
    try:
        network = architectures[name](
            encoder, encoder_weights=model.backbone.pretrained, classes=num_classes
        )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"model: {model.name} with the encoder {encoder}: {error}") from error
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                match child.output_size:
                    case int(bins) | (int(bins), _):  # it pools to squares
                        setattr(parent, name, AveragePool(bins))  # deterministic: see average_pool
    whole = LibraryModel(network)
    _try_out(whole, f"model: {model.name} with the encoder {encoder}")
    return whole


def _try_out(model: LibraryModel, what: str) -> None:
    """Freeze what no gradient reaches, which processes would wait for.

    Raises:
        ValueError: a layer draws by other means than the random layers that could be keyed.
    """
    trial, before = copy.deepcopy(model).train(), torch.get_rng_state()
    outputs = trial(torch.zeros(2, 3, 224, 224), torch.arange(2))
    if not torch.equal(before, torch.get_rng_state()):
        raise ValueError(
            f"{what} draws random numbers without keys, which would change with the number of "
            "GPUs; use another encoder, as one of timm's (tu-...)"
        )
    torch.autograd.backward(outputs[0].logits.sum())
    for own, tried in zip(model.parameters(), trial.parameters(), strict=True):
        own.requires_grad_(tried.grad is not None)
