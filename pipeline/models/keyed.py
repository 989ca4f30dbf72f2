"""Random layers whose draws depend on the sample's key and the layer's name alone.

So a sample meets the same draws on any rank, in any microbatch, after any restart, and again in the
second forward of activation checkpointing.
"""

import zlib

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from pipeline.errors import InputError

# SplitMix64's constants: https://doi.org/10.1145/2714064.2660195
GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


class Keyed(nn.Module):
    """A layer that draws. Its network gives it a salt of its own, and in training the keys."""

    salt = 0
    keys: Tensor | None = None  # (N,) int64, one for each sample of the batch

    def uniform(self, count: int) -> Tensor:
        """`count` numbers in [0,1) for each sample, (N,count) float32 on the keys' device."""
        assert self.keys is not None, "training draws need the keys of the samples"
        return uniform(self.keys, self.salt, count)


class KeyedDropout(Keyed):
    """Dropout with a draw for every entry of the first `axes` axes of a sample; None: of all.

    1 takes whole channels (https://arxiv.org/abs/1411.4280), 0 whole samples, as stochastic depth
    does (https://arxiv.org/abs/1603.09382).
    """

    def __init__(self, p: float, axes: int | None) -> None:
        super().__init__()
        self.p = p
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """(N,...) -> the same shape."""
        if not self.training or self.p == 0:
            return x
        drawn = x.shape[1:] if self.axes is None else x.shape[1 : 1 + self.axes]
        kept = self.uniform(drawn.numel()) >= self.p
        mask = kept.to(x.dtype) / (1 - self.p)
        return x * mask.view(len(x), *drawn, *[1] * (x.dim() - 1 - len(drawn)))


def uniform(keys: Tensor, salt: int, count: int) -> Tensor:
    """(N,) int64 keys -> (N,count) float32 in [0,1), each row a SplitMix64 stream of key and salt.

    Integer arithmetic on the keys' device: the same numbers on any.
    """
    steps = torch.arange(1, count + 1, device=keys.device)
    state = _mix(keys ^ _mix(torch.full((), salt, device=keys.device)))
    bits = _shifted(_mix(state[:, None] + steps * GOLDEN), 40)
    return bits.to(torch.float32) * 2**-24


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A right shift that fills with zeros; torch's own fills with the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def key_random_layers(model: nn.Module) -> list[Keyed]:
    """Replace the random layers below `model` by keyed ones, and give each a stream of its own.

    Raises:
        InputError: names the layers of a kind that has no keyed form.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if (keyed := _keyed(child)) is not None:
                setattr(parent, name, keyed)
    unkeyed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]
    if unkeyed:
        raise InputError(
            f"random layers without a keyed form: {', '.join(unkeyed)}; their draws would change "
            "with the number of GPUs; set their rate to 0"
        )
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Keyed)}
    for name, layer in layers.items():
        layer.salt = zlib.crc32(name.encode())
    return list(layers.values())


def _keyed(layer: nn.Module) -> KeyedDropout | None:
    if isinstance(layer, DropPath):
        return KeyedDropout(layer.drop_prob or 0.0, axes=0)
    if isinstance(layer, nn.Dropout):
        return KeyedDropout(layer.p, axes=None)
    if isinstance(layer, (nn.Dropout1d, nn.Dropout2d)):
        return KeyedDropout(layer.p, axes=1)
    return None
