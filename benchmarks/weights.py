"""Weights by a rule that needs no file, under the peer's names: both sides then hold the same."""

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def drawn(shapes: dict[str, list[int]]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every array of a state_dict, each from the checksum of its name.

    The scales keep activations near one from layer to layer, so that predictions vary.
    """
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = 1 + 0.5 * rng.random(shape)
        elif len(shape) > 1:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(".weight"):
            value = 1 + 0.1 * rng.standard_normal(shape)
        else:
            value = 0.05 * rng.standard_normal(shape)
        yield name, np.asarray(value, np.float32)
