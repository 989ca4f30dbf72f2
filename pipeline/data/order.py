"""Which image each sample is. The order depends on the seed and the sample's number alone.

The sample number counts on for ever: number = iteration * batch_size + position in the global
batch. Neither ranks nor workers nor a restart change which image a number is.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

ORDER = 0  # the stream of the seed that all orders are drawn from
WINDOW = 256  # images that are shuffled among one another in a block order
NEAR = 5  # shards of 128 images that a window and the next one lie in, at most

Indices = NDArray[np.intp]


class Order(Protocol):
    """Sample number -> index in the split."""

    def __getitem__(self, number: int) -> int:
        """The index of this sample's image."""


class FullOrder:
    """Every epoch is another permutation of all `count` images."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __getitem__(self, number: int) -> int:
        """See Order."""
        epoch, place = divmod(number, self.count)
        return int(_epoch(self.count, (self.seed, ORDER, epoch))[place])


class ClassOrder:
    """A class is drawn by `shares`, (C,), then one of the images that hold it.

    `holders` are the indices of the images that hold each class.
    """

    def __init__(self, holders: Sequence[Indices], shares: NDArray[np.float64], seed: int) -> None:
        self.holders, self.shares, self.seed = holders, shares, seed

    def __getitem__(self, number: int) -> int:
        """See Order."""
        rng = np.random.default_rng((self.seed, ORDER, number))
        holders = self.holders[rng.choice(len(self.shares), p=self.shares)]
        return int(holders[rng.integers(len(holders))])


class BlockOrder:
    """Every epoch is another permutation of the images, in which few shards are read at a time.

    The shards, of so many images as `sizes` says, are put into a random order, and the row of their
    images is cut into as many parts as a batch has positions: each position goes through its
    part from the begin to the end, and shuffles only WINDOW images at a time. So a process, which
    has the same positions of every batch, reads its share of the shards and each of them once an
    epoch, and a batch still holds images from all over the row.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self.sizes, self.batch_size, self.seed = np.array(sizes, np.intp), batch_size, seed
        self.count = int(self.sizes.sum())
        self._firsts = np.cumsum(self.sizes) - self.sizes  # the first image of each shard
        self._epochs: dict[int, tuple[Indices, Indices]] = {}  # shards, and where each ends

    def __getitem__(self, number: int) -> int:
        """See Order."""
        epoch, offset = divmod(number, self.count)
        # The numbers of an epoch of which each is another position's, one after another: where the
        # epoch begins, another position than the first may be the first.
        lane, place = offset % self.batch_size, offset // self.batch_size
        whole, longer = divmod(self.count, self.batch_size)
        start = lane * whole + min(lane, longer)
        length = whole + (lane < longer)
        window, inside = divmod(place, WINDOW)
        size = min(WINDOW, length - window * WINDOW)
        key = (self.seed, ORDER, epoch, lane, window)
        return self._image(epoch, start + window * WINDOW + int(_window(size, key)[inside]))

    def _image(self, epoch: int, place: int) -> int:
        """The image at a place of the epoch's row."""
        if epoch not in self._epochs:
            shards = np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.sizes))
            before = dict([*self._epochs.items()][-1:])
            self._epochs = before | {epoch: (shards, np.cumsum(self.sizes[shards]))}
        shards, ends = self._epochs[epoch]
        at = int(np.searchsorted(ends, place, "right"))
        return int(self._firsts[shards[at]] + place - (ends[at] - self.sizes[shards[at]]))


def rare_class_shares(pixels: Sequence[int], temperature: float) -> NDArray[np.float64]:
    """How often to draw each class, (C,), by its pixels in train: softmax((1 - frequency) / T).

    The lower the temperature, the more often the rare classes; a class without a pixel never.
    Source: https://arxiv.org/abs/2111.14887
    """
    frequency = np.array(pixels) / sum(pixels)
    exponents = np.where(frequency > 0, (1 - frequency) / temperature, -np.inf)
    weights = np.exp(exponents - exponents.max())
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def _permutation(count: int, key: tuple[int, ...]) -> Indices:
    return np.random.default_rng(key).permutation(count)


_epoch = lru_cache(maxsize=2)(_permutation)  # this one, and the next
_window = lru_cache(maxsize=4096)(_permutation)  # as many as positions of a batch have at a time
