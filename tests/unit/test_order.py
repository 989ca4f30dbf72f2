"""Which image each sample is: orders of whole epochs, of blocks, and by class."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest

from pipeline.data.loader import RankBatches
from pipeline.data.order import WINDOW, BlockOrder, ClassOrder, rare_class_shares


def test_the_rarer_a_class_the_larger_its_share():
    # Frequencies 0.7, 0.2, 0.1 and 0: exp((1 - f) / 0.5) is e^0.6, e^1.6, e^1.8.
    shares = rare_class_shares((70, 20, 10, 0), 0.5)
    weights = [math.exp(0.6), math.exp(1.6), math.exp(1.8), 0]
    assert shares.tolist() == pytest.approx([weight / sum(weights) for weight in weights])
    assert rare_class_shares((70, 20, 10, 0), 0.001).tolist() == pytest.approx([0, 0, 1, 0])
    assert rare_class_shares((70, 20, 10, 0), 1e9).tolist() == pytest.approx([1 / 3] * 3 + [0])


def test_images_are_drawn_by_their_classes():
    # Class 0 is in all seven images, class 1 in two, class 2 in none.
    holders = [np.arange(7), np.array([1, 4]), np.arange(0)]
    shares = np.array([0.3, 0.7, 0.0])
    drawn = ClassOrder(holders, shares, 0)
    order = [drawn[number] for number in range(4000)]
    # Each has 0.3 / 7, and those with class 1 half of 0.7 on top; four sigma are at most 0.031.
    for index in range(7):
        expected = 0.3 / 7 + 0.35 * (index in (1, 4))
        assert order.count(index) / 4000 == pytest.approx(expected, abs=0.031)
    again = ClassOrder(holders, shares, 0)
    assert [again[number] for number in reversed(range(4000))] == order[::-1]
    reseeded = ClassOrder(holders, shares, 1)
    assert [reseeded[number] for number in range(4000)] != order


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [([7], 2), ([3, 1, 5], 4), ([2, 2], 8), ([128] * 9 + [31], 4), ([600, 600], 2), ([1], 3)],
)
def test_every_epoch_of_a_block_order_has_each_image_once(sizes: list[int], batch_size: int):
    order = BlockOrder(sizes, batch_size, seed=0)
    count = sum(sizes)
    epochs = [[order[epoch * count + place] for place in range(count)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count > 7:
        assert len({tuple(epoch) for epoch in epochs}) == 3
    again = pickle.loads(pickle.dumps(order))
    numbers = np.random.default_rng(0).permutation(3 * count).tolist()  # asked for in any order
    whole = [image for epoch in epochs for image in epoch]
    assert [again[number] for number in numbers] == [whole[number] for number in numbers]
    if count > 7:
        assert [BlockOrder(sizes, batch_size, seed=1)[n] for n in range(count)] != epochs[0]


def test_a_small_block_order_by_hand():
    """Two positions, five images in shards of two, one and two, in the order that was drawn."""
    shards = np.random.default_rng((0, 0, 0)).permutation(3).tolist()
    images = [[0, 1], [2], [3, 4]]
    row = [image for shard in shards for image in images[shard]]
    first = np.random.default_rng((0, 0, 0, 0, 0)).permutation(3).tolist()
    second = np.random.default_rng((0, 0, 0, 1, 0)).permutation(2).tolist()
    parts = [[row[place] for place in first], [row[3 + place] for place in second]]
    order = BlockOrder([2, 1, 2], 2, seed=0)
    assert [order[number] for number in range(5)] == [
        parts[0][0],
        parts[1][0],
        parts[0][1],
        parts[1][1],
        parts[0][2],
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_process_reads_its_share_of_the_shards_and_each_once_an_epoch(world_size: int):
    size, batch_size = 128, 8
    shards = 64
    order = BlockOrder([size] * shards, batch_size, seed=0)
    iterations = size * shards // batch_size
    reads: Counter[int] = Counter()
    for rank in range(world_size):
        batches = RankBatches((batch_size, 1), (iterations, 2 * iterations), rank, world_size)
        read = [order[number] // size for batch in batches for number in batch]
        assert len({*read}) <= shards / world_size + batch_size
        reads.update({*read})
        # What is read at any time fits into a small cache: some shards a position.
        share = batch_size // world_size
        for start in range(0, len(read), WINDOW * share):
            assert len({*read[start : start + WINDOW * share]}) <= 3 * share
    assert sum(reads.values()) <= shards + batch_size
