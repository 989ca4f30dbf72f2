"""Training samples a second, in one process on one thread, from the files to a batch.

Ours reads what `prepare` has packed, theirs JPEG and PNG; both have them in the page cache. The
law of the draws is the same, see law.py. In `<set>, the rest on a device` both leave to a device
what they can: ours distortion and normalisation (its batch is uint8), theirs normalisation.
"""

import time
from pathlib import Path

from benchmarks.images import folder
from benchmarks.protocol import Case, Metrics, Round

SETS = {
    "ade20k": (
        "pspnet_r50-d8_512x512_80k_ade20k",
        "pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py",
    ),
    "cityscapes": (
        "pspnet_r50-d8_512x1024_80k_cityscapes",
        "pspnet/pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py",
    ),
}
REST = ", the rest on a device"
CASES = [Case(name + rest) for name in SETS for rest in ("", REST)]
BATCH = 16
BATCHES = {"ade20k": 8, "cityscapes": 3}  # a round


def files(name: str) -> Path:
    """64 images of 683x512 with 150 classes, or 24 of 2048x1024 with 19."""
    shapes = {"ade20k": ((512, 683), 64, 151), "cityscapes": ((1024, 2048), 24, 19)}
    shape, count, num_ids = shapes[name]
    return folder(name, {"train": [shape] * count, "val": [shape] * 2}, num_ids)


def ours(case: str) -> Round:
    """Samples, collated; then normalised, channels last."""
    from torch.utils.data import default_collate

    from benchmarks import ours
    from pipeline.data.loader import Samples
    from pipeline.data.transforms import fill_of
    from pipeline.precision import PRECISIONS, Normalization

    name, left = case.removesuffix(REST), case.endswith(REST)
    store = ours.prepared(files(name), SETS[name][0])
    given = ours.params(SETS[name][0], {"augmentation.photometric": not left})
    samples = Samples(
        store.split("train"),
        given.augmentation,
        fill=fill_of(given.model.mean),
        ignore_index=store.ignore_index,
        seed=0,
    )
    normalize = Normalization(
        given.model.mean, given.model.std, precision=PRECISIONS["fp32"], device=ours.CPU
    )
    number = 0

    def measure() -> tuple[Metrics, list[int]]:
        nonlocal number
        begin = time.perf_counter()
        for _ in range(BATCHES[name]):
            batch = default_collate([samples[number + place] for place in range(BATCH)])
            images = batch[0] if left else normalize(batch[0])
            number += BATCH
        seconds = time.perf_counter() - begin
        shape = [len(images), 3, *images.shape[1:3]] if left else list(images.shape)
        return {"samples/s": BATCH * BATCHES[name] / seconds}, shape

    return measure


def theirs(case: str) -> Round:
    """The dataset with its train_pipeline, collated; then the data preprocessor's batch."""
    import numpy as np
    from mmengine.dataset import pseudo_collate
    from mmseg.registry import MODELS

    from benchmarks import theirs

    name, left = case.removesuffix(REST), case.endswith(REST)
    config = theirs.config(SETS[name][1])
    loader = config.train_dataloader
    dataset = theirs.dataset(loader, files(name), "train", loader.dataset.pipeline)
    preprocess = MODELS.build(config.model.data_preprocessor)
    np.random.seed(0)
    number = 0

    def measure() -> tuple[Metrics, list[int]]:
        nonlocal number
        begin = time.perf_counter()
        for _ in range(BATCHES[name]):
            batch = pseudo_collate(
                [dataset[(number + place) % len(dataset)] for place in range(BATCH)]
            )
            images = batch["inputs"] if left else preprocess(batch, training=True)["inputs"]
            number += BATCH
        seconds = time.perf_counter() - begin
        shape = [len(images), 3, *config.crop_size] if left else list(images.shape)
        return {"samples/s": BATCH * BATCHES[name] / seconds}, shape

    return measure
