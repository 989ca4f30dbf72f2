"""Training samples with draws that depend on (seed, sample number) alone, and their batches.

The sample number counts on for ever: number = iteration * batch_size + position in the global
batch. Neither ranks nor workers nor a restart change how an image is drawn.
"""

import time
from collections.abc import Iterable, Iterator

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.data.order import FullOrder, Order
from pipeline.data.store import Split
from pipeline.data.table import Array
from pipeline.data.transforms import AugmentationParams, augment
from pipeline.errors import InputError

Batch = tuple[Tensor, Tensor, Tensor]  # images, targets, keys: see build_loader

# Independent streams of the seed, beside that of the order.
AUGMENTATION, MODEL = 1, 2

NOTICED = 5.0  # seconds until the end of another process has surely been noticed


class Samples(Dataset[Batch]):
    """Sample number -> image (h,w,3) uint8, target (h,w) uint8 and key () int64.

    `order` says which image a number is, by default FullOrder. The shard of a sample is asked for
    `ahead` numbers before.
    """

    def __init__(
        self,
        split: Split,
        augmentation: AugmentationParams,
        fill: tuple[int, ...],
        ignore_index: int,
        seed: int,
        order: Order | None = None,
        ahead: int = 0,
    ) -> None:
        self.split = split
        self.augmentation = augmentation
        self.fill = fill
        self.ignore_index = ignore_index
        self.seed = seed
        self.order = FullOrder(len(split), seed) if order is None else order
        self.ahead = ahead

    def __getitem__(self, number: int) -> Batch:
        if self.ahead:
            self.split.expect(self.order[number + self.ahead])
        rng = np.random.default_rng((self.seed, AUGMENTATION, number))
        image, target = augment(
            *self.split[self.order[number]],
            self.augmentation,
            fill=self.fill,
            ignore_index=self.ignore_index,
            rng=rng,
        )
        (key,) = np.random.SeedSequence((self.seed, MODEL, number)).generate_state(1, np.uint64)
        return (
            torch.from_numpy(_own(image)),
            torch.from_numpy(_own(target)),
            torch.tensor(int(key >> 1)),  # a torch integer has 63 bits
        )


def _own(pixels: Array) -> Array:
    """The pixels one after another, in memory that may be written to: views of files may not."""
    return np.require(pixels, requirements=["C", "W"])


class RankBatches(Sampler[list[int]]):
    """The sample numbers of one rank, a list an iteration, microbatch after microbatch.

    `sizes` are the images in a batch and the parts that it is cut into, `iterations` the first and
    the one after the last.

    Raises:
        InputError: the processes can't share a microbatch equally.
    """

    def __init__(
        self, sizes: tuple[int, int], iterations: tuple[int, int], rank: int, world_size: int
    ) -> None:
        self.batch_size, self.accumulation = sizes
        self.iterations = range(*iterations)
        self.microbatch = self.batch_size // self.accumulation
        if self.batch_size % (self.accumulation * world_size):
            raise InputError(
                f"train.batch_size {self.batch_size} / train.accumulation {self.accumulation} is "
                f"not divisible by the {world_size} processes that were started; use a multiple of "
                f"{self.accumulation * world_size}, or as many processes as train.gpus"
            )
        self.share = self.microbatch // world_size
        self.rank = rank

    def __len__(self) -> int:
        return len(self.iterations)

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in self.iterations:
            first = iteration * self.batch_size + self.rank * self.share
            yield [
                first + micro * self.microbatch + place
                for micro in range(self.accumulation)
                for place in range(self.share)
            ]


def build_loader(
    samples: Samples, batches: RankBatches, workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """Batches of images (n,h,w,3) uint8, targets (n,h,w) uint8 and keys (n,) int64."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
        multiprocessing_context="spawn" if workers else None,  # a fork copies running threads
    )


def arriving(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader's iterator.

    Raises:
        InputError: it was raised where a batch was loaded, in this process or in another.
        RuntimeError: a process that loads batches has ended.
    """
    try:
        yield from batches
    except InputError as error:  # torch puts the other process's traceback before the text
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None
    except (EOFError, ConnectionError) as error:
        if not str(error).startswith("Caught "):  # in the other process
            time.sleep(NOTICED)  # where it has ended, torch's handler of SIGCHLD raises its error
        raise


def _begin_worker(worker: int) -> None:
    """One thread a worker."""
    cv2.setNumThreads(1)
