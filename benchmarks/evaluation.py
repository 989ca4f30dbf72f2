"""Evaluation of images of mixed size with 150 classes, SegFormer B0, whole images, batch 1.

In one view, and in 12: scales 0.5 to 1.75, each as it is and mirrored. From the files (theirs) or
the packed data (ours) to the areas of every class. Both hold the same weights; the summed areas
are to agree to one pixel in a thousand: the last digits of a network's sums may decide a pixel.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.images import folder
from benchmarks.protocol import REPOSITORY, Case, Metrics, Round
from tests.unit.drawn import drawn_weights

RECIPE = "segformer_mit-b0_512x512_160k_ade20k"
CONFIG = "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"
NAMES = REPOSITORY / "tests/unit/data/parity/segformer_b0.state_dict.json"
CLASSES = 150
SCALES = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
IMAGES = {"20 images, one view": 20, "3 images, 12 views": 3}
CASES = [Case(name, threads=2) for name in IMAGES]


def files(count: int) -> Path:
    """Sizes as ADE20K's: one side 512, or smaller and larger."""
    rng = np.random.default_rng(0)
    shapes = [(int(rng.choice([384, 512])), int(rng.integers(400, 700))) for _ in range(count)]
    return folder(f"evaluation-{count}", {"train": shapes[:1], "val": shapes}, CLASSES + 1)


def equal(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """By the areas of intersection, union, prediction and label."""
    first, second = np.array(ours), np.array(theirs)
    share = np.abs(first - second).sum() / second.sum()
    return f"{'yes' if share < 1e-3 else 'NO'}: areas differ by {share:.1e}"


def ours(case: str) -> Round:
    """`evaluate` of the packed split."""
    import torch

    from benchmarks import ours
    from benchmarks.side import memory, now
    from pipeline.evaluation.inference import Predictor, evaluate
    from pipeline.models.mmseg import from_mmseg

    views = case.endswith("12 views")
    split = ours.prepared(files(IMAGES[case]), RECIPE).split("val")
    learner = ours.learner_of(ours.params(RECIPE, {}), CLASSES)
    drawn = drawn_weights(json.loads(NAMES.read_text()))
    weights = {name: torch.from_numpy(value) for name, value in drawn}
    learner.network.load_state_dict(from_mmseg(weights))
    predictor = Predictor(
        learner.network,
        learner.normalize,
        precision=learner.precision,
        scale=None if views else (2048, 512),  # theirs scales views from the image
        window=None,
        scales=tuple(SCALES) if views else (1.0,),
        flip=views,
    )
    start = now()

    def measure() -> tuple[Metrics, list[list[int]]]:
        begin = time.perf_counter()
        total = evaluate(predictor, split, num_classes=CLASSES, ignore_index=255)
        seconds = time.perf_counter() - begin
        labelled, predicted, both = total.sum(axis=1), total.sum(axis=0), np.diag(total)
        areas = [both, labelled + predicted - both, predicted, labelled]
        figures = {"images/s": len(split) / seconds, **memory(start)}
        return figures, [area.tolist() for area in areas]

    return measure


def theirs(case: str) -> Round:
    """What its TestLoop does with `test_dataloader`, or with `tta_pipeline` and SegTTAModel."""
    import torch
    from mmengine.dataset import pseudo_collate

    from benchmarks import theirs
    from benchmarks.side import memory, now

    views = case.endswith("12 views")
    config = theirs.config(CONFIG)
    from mmseg.registry import METRICS, MODELS

    network = theirs.model(config, (512, 512))
    drawn = drawn_weights(json.loads(NAMES.read_text()))
    weights = {name: torch.from_numpy(value) for name, value in drawn}
    network.load_state_dict(weights)
    model: Any = network
    pipeline = config.test_pipeline
    if views:
        model = MODELS.build({**config.tta_model, "module": network})
        pipeline = config.tta_pipeline
        pipeline[1].transforms[2][0].reduce_zero_label = True  # as in its test_pipeline
    model.eval()
    dataset = theirs.dataset(config.test_dataloader, files(IMAGES[case]), "val", pipeline)
    metric = METRICS.build(config.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    start = now()

    @torch.no_grad()
    def measure() -> tuple[Metrics, list[list[int]]]:
        begin = time.perf_counter()
        metric.results.clear()
        for index in range(len(dataset)):
            batch = pseudo_collate([dataset[index]])
            samples = model.test_step(batch)
            metric.process(batch, [sample.to_dict() for sample in samples])
        areas = [sum(parts).long().tolist() for parts in zip(*metric.results, strict=True)]
        metric.compute_metrics(metric.results)
        figures = {"images/s": len(dataset) / (time.perf_counter() - begin), **memory(start)}
        return figures, areas

    return measure
