"""One training step: forward, losses, backward, optimizer; and the memory that it takes.

Batch 2, 150 classes, two threads, random weights: time and memory hang on no weight. A step begins
with uint8 images, as they come from the loader, and so includes normalisation and padding. Ours in
bf16 stands against theirs in fp32: its AmpOptimWrapper refuses to work without a GPU. Peak memory
is that of the process, which has done nothing else; `above start` is what came after the network
and its optimizer were built. Both must have as many parameters.
"""

import time

from benchmarks.protocol import Case, Metrics, Round

NETWORKS = {
    "pspnet_r50": (
        "pspnet_r50-d8_512x512_80k_ade20k",
        "pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py",
    ),
    "segformer_b0": (
        "segformer_mit-b0_512x512_160k_ade20k",
        "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
    ),
    "pointrend_r101": (
        "pointrend_r101_512x512_160k_ade20k",
        "point_rend/pointrend_r101_4xb4-160k_ade20k-512x512.py",
    ),
}
BATCH, CLASSES = 2, 150
# Of 512 the memory is wanted: more rounds don't raise its peak.
CASES = [
    Case(f"{network} {side} {precision}", threads=2, rounds=2 if side == 512 else None)
    for network in NETWORKS
    for side in (128, 256, 512)
    for precision in ("fp32", "bf16")
]
STEPS = {128: 2, 256: 1, 512: 1}  # a round


def ours(case: str) -> Round:
    """The recipe's learner and `train_step`."""
    import torch

    from benchmarks import ours
    from benchmarks.side import memory, now
    from pipeline.training.loop import train_step

    network, text, precision = case.split()
    side = int(text)
    changes = {
        "augmentation.crop_size": [side, side],
        "train.batch_size": BATCH,
        "train.precision": precision,
    }
    given = ours.params(NETWORKS[network][0], changes)
    learner = ours.learner_of(given, CLASSES)
    count = sum(weight.numel() for weight in learner.network.parameters())
    images = torch.randint(0, 256, (BATCH, side, side, 3), dtype=torch.uint8)
    targets = torch.randint(0, CLASSES, (BATCH, side, side), dtype=torch.uint8)
    start, iteration = now(), 0

    def measure() -> tuple[Metrics, int]:
        nonlocal iteration
        begin = time.perf_counter()
        for _ in range(STEPS[side]):
            learner.set_learning_rate(given.train, iteration)
            keys = torch.arange(BATCH) + BATCH * iteration
            train_step(learner, (images, targets, keys), 1)
            iteration += 1
        seconds = time.perf_counter() - begin
        return {"s/step": seconds / STEPS[side], **memory(start)}, count

    return measure


def theirs(case: str) -> Round:
    """The published configuration's network and optimizer, and its `train_step`."""
    import torch
    from mmengine.optim import build_optim_wrapper
    from mmengine.structures import PixelData

    from benchmarks import theirs
    from benchmarks.side import memory, now

    network, text, _ = case.split()
    side = int(text)
    config = theirs.config(NETWORKS[network][1])
    model = theirs.model(config, (side, side))
    model.init_weights()
    model.train()
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    count = sum(weight.numel() for weight in model.parameters())
    from mmseg.structures import SegDataSample

    inputs, samples = [], []
    for _ in range(BATCH):
        inputs.append(torch.randint(0, 256, (3, side, side), dtype=torch.uint8))
        target = PixelData(data=torch.randint(0, CLASSES, (1, side, side)))
        shape = {"img_shape": (side, side), "ori_shape": (side, side)}
        samples.append(SegDataSample(metainfo=shape, gt_sem_seg=target))
    start = now()

    def measure() -> tuple[Metrics, int]:
        begin = time.perf_counter()
        for _ in range(STEPS[side]):
            model.train_step({"inputs": inputs, "data_samples": samples}, optimizer)
        seconds = time.perf_counter() - begin
        return {"s/step": seconds / STEPS[side], **memory(start)}, count

    return measure
