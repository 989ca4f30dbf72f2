"""Weights by a rule that needs no file, under MMSegmentation's names; numpy alone.

The arrays in data/parity were computed from them, and the benchmarks give them to both sides.
"""

import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray


def drawn_weights(
    shapes: Iterable[tuple[str, list[int]]], tame: bool = False
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every array of a state_dict, each from the checksum of its name.

    The scales keep activations near one from layer to layer; `tame` makes deep networks' smaller.
    """
    for name, shape in shapes:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_mean"):
            value = 0.1 * rng.standard_normal(shape)
        elif name.endswith("running_var"):
            value = 1 + 0.5 * rng.random(shape)
        elif len(shape) > 1:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(".weight"):
            value = 1 + 0.1 * rng.standard_normal(shape)
        else:
            value = 0.05 * rng.standard_normal(shape)
        if tame and name.startswith("backbone.layer") and name.endswith("bn3.weight"):
            value = value * 0.2
        if tame and name.endswith(("conv_seg.weight", "fc_seg.weight")):
            value = value * 0.1
        yield name, np.asarray(value, np.float32)
