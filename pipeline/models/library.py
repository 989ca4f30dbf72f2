"""The networks of segmentation_models_pytorch, https://smp.readthedocs.io, under our contract."""

import difflib

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.keyed import key_random_layers
from pipeline.models.layers import Output
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
    return LibraryModel(network)
