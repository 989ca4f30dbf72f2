"""What an evaluation leaves for people: plots for DVC, and pictures of good and bad predictions."""

import csv
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.data.store import Array, Split, Store
from pipeline.evaluation.inference import Predictor, predictions
from pipeline.evaluation.metrics import Matrix

PICTURES = 3  # of each kind
OPACITY = 0.5


def write_plots(folder: Path, scores: dict[str, Any], confusion: Matrix, store: Store) -> None:
    """classes.tsv: the scores of each class; confusion.tsv: the share of each target class."""
    kinds = ("iou", "boundary_iou", "accuracy", "precision", "dice", "fscore")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "classes.tsv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["class", *kinds])
        for name in store.classes:
            table.writerow([name, *(scores[kind][name] for kind in kinds)])
    with (folder / "confusion.tsv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["target", "prediction", "pixels", "share"])
        for name, row in zip(store.classes, confusion, strict=True):
            shares = row / max(row.sum(), 1)
            for predicted, pixels, share in zip(store.classes, row, shares, strict=True):
                table.writerow([name, predicted, pixels, float(share)])


def choose(scores: Sequence[tuple[int, float]]) -> list[tuple[str, int]]:
    """Names and indices of the best, median and worst images by (index, score), each image once."""
    ranked = [index for index, score in sorted(scores, key=lambda one: one[1]) if score == score]
    count = min(PICTURES, len(ranked) // 3) or min(1, len(ranked))
    middle = (len(ranked) - count) // 2
    kinds = {
        "worst": ranked[:count],
        "median": ranked[middle : middle + count],
        "best": ranked[::-1][:count],
    }
    names: dict[int, str] = {}
    for kind, indices in kinds.items():
        for number, index in enumerate(indices, start=1):
            names.setdefault(index, f"{kind}-{number}")
    return [(name, index) for index, name in names.items()]


def write_overlays(
    folder: Path, predictor: Predictor, *, split: Split, chosen: list[tuple[str, int]], store: Store
) -> None:
    """One PNG for each chosen image: the image, with its target over it, with the prediction."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    name_of = {index: name for name, index in chosen}
    for index, target, prediction in predictions(predictor, split, sorted(name_of)):
        image, _ = split[index]
        panels = [image, _blend(image, target, store), _blend(image, prediction, store)]
        gap = np.full((image.shape[0], 4, 3), 255, np.uint8)
        picture = np.hstack([panels[0], gap, panels[1], gap, panels[2]])
        stem = re.sub(r"[^\w\-]+", "_", split.entries[index].name)[-60:]  # names have a limit
        path = folder / f"{name_of[index]}_{stem}.png"
        done, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        assert done, "OpenCV encodes any uint8 picture"
        path.write_bytes(data.tobytes())


def _blend(image: Array, labels: Array, store: Store) -> Array:
    """The classes' colours over the image; ignored pixels stay as they are."""
    colours = np.array(store.palette, np.float32)
    known = labels != store.ignore_index
    blended = image.astype(np.float32)
    blended[known] += OPACITY * (colours[labels[known]] - blended[known])
    return np.rint(blended).astype(np.uint8)
