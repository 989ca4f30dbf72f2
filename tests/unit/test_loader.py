"""Which samples make up which batch, on any number of ranks and workers, after any restart."""

import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from pipeline.data.loader import NOTICED, Batch, RankBatches, Samples, arriving, build_loader
from pipeline.data.store import Split
from pipeline.data.table import Entry
from pipeline.errors import InputError
from tests.unit.sections import params

AUGMENTATION = {
    "augmentation.crop_size": [16, 16],
    "augmentation.ratio_range": [0.5, 2.0],
    "augmentation.flip": {"horizontal": 0.5, "vertical": 0.5},
    "augmentation.photometric": True,
}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Seven images of 20 x 24."""
    folder = tmp_path_factory.mktemp("store")
    data = np.random.default_rng(0).integers(0, 256, 7 * 20 * 24 * 4, dtype=np.uint8)
    data.tofile(folder / "a.bin")
    return Split(folder, [Entry(f"{i}", f"{i}", "a.bin", i * 1920, 20, 24) for i in range(7)])


def samples(split: Split, seed: int = 0) -> Samples:
    return Samples(split, params(AUGMENTATION).augmentation, (9, 9, 9), 255, seed)


def test_every_epoch_is_another_permutation(split: Split):
    one = samples(split)
    epochs = [[one.order[7 * e + i] for i in range(7)] for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15


def test_the_order_depends_on_the_seed_and_not_on_what_was_asked_before(split: Split):
    one = samples(split)
    order = [one.order[number] for number in range(50)]
    other = samples(split)
    assert [other.order[number] for number in reversed(range(50))] == order[::-1]
    other = samples(split, seed=1)
    assert [other.order[number] for number in range(50)] != order


def test_a_sample_depends_on_the_seed_and_its_number_alone(split: Split):
    one, other, reseeded = samples(split), samples(split), samples(split, seed=1)
    one[3]
    for ours, theirs in zip(one[40], other[40], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(one[40][0], reseeded[40][0])
    keys = {int(one[number][2]) for number in range(60)}
    keys |= {int(reseeded[number][2]) for number in range(60)}
    assert len(keys) == 120
    assert min(keys) >= 0


def test_an_image_is_drawn_otherwise_in_every_epoch(split: Split):
    one = samples(split)
    numbers = [number for number in range(70) if one.order[number] == 0]
    assert len(numbers) == 10
    assert len({one[number][0].numpy().tobytes() for number in numbers}) == 10


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_every_microbatch(world_size: int, accumulation: int):
    sizes, iterations = (8, accumulation), (0, 6)
    ranks = [list(RankBatches(sizes, iterations, rank, world_size)) for rank in range(world_size)]
    size = 8 // accumulation
    for iteration in range(6):
        for micro in range(accumulation):
            share = size // world_size
            parts = [rank[iteration][micro * share :][:share] for rank in ranks]
            first = iteration * 8 + micro * size
            assert list(chain(*parts)) == list(range(first, first + size))
    assert [len(RankBatches(sizes, iterations, 0, world_size)), len(ranks[0])] == [6, 6]


def test_a_restart_yields_the_tail_of_the_whole():
    whole = list(RankBatches((8, 2), (0, 6), 1, 2))
    for start in range(7):
        tail = RankBatches((8, 2), (start, 6), 1, 2)
        assert list(tail) == whole[start:]
        assert len(tail) == 6 - start


@pytest.mark.parametrize(
    ("sizes", "world_size", "multiple"),
    [((8, 1), 3, 3), ((8, 2), 3, 6), ((8, 2), 8, 16), ((8, 1), 16, 16)],
)
def test_a_microbatch_that_the_ranks_cannot_share_equally_is_refused(
    sizes: tuple[int, int], world_size: int, multiple: int
):
    refusal = (
        f"train.batch_size 8 / train.accumulation {sizes[1]} is not divisible by the {world_size} "
        f"processes that were started; use a multiple of {multiple}, or as many processes as "
        "train.gpus"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"):
        RankBatches(sizes, (0, 6), 0, world_size)


def batches(split: Split, workers: int) -> list[list[np.ndarray]]:
    loader = build_loader(samples(split), RankBatches((8, 1), (1, 6), 0, 2), workers, False)
    return [[part.numpy() for part in batch] for batch in loader]


@pytest.mark.slow
def test_workers_change_no_bit_of_a_batch(split: Split):
    # In a process of its own: a fork of this one would copy the threads of OpenCV and torch.
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        alone, shared = (fresh.submit(batches, split, workers).result(300) for workers in (0, 2))
    assert len(alone) == len(shared) == 5
    for own, theirs in zip(alone, shared, strict=True):
        assert [part.shape for part in own] == [(4, 16, 16, 3), (4, 16, 16), (4,)]
        assert [part.dtype for part in own] == [np.uint8, np.uint8, np.int64]
        assert all(np.array_equal(a, b) for a, b in zip(own, theirs, strict=True))


class Refusing(Samples):
    """Samples of which none can be read."""

    def __getitem__(self, number: int) -> Batch:
        raise InputError(f"number {number}:\nno such shard; run prepare")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_loading_process_refuses_is_said_alone(split: Split, workers: int):
    refusing = Refusing(split, params({}).augmentation, (9, 9, 9), 255, seed=0)
    loader = build_loader(refusing, RankBatches((2, 1), (3, 4), 0, 1), workers, False)
    with pytest.raises(InputError, match=r"^number 6:\nno such shard; run prepare$"):
        next(arriving(iter(loader)))


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("reset"), BrokenPipeError()])
def test_torch_says_that_a_loading_process_has_ended_though_its_connection_says_it_first(
    error: Exception,
):
    def notice(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, notice)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid 7\) is killed"):
            next(arriving(failing(error)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_fault_within_a_loading_process_is_not_taken_for_its_end():
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="Caught"):
        next(arriving(failing(ConnectionError("Caught ConnectionError in DataLoader worker 0"))))
    assert time.monotonic() - began < NOTICED


def failing(error: Exception) -> Iterator[Batch]:
    """A loader's iterator that fails."""
    raise error
    yield
