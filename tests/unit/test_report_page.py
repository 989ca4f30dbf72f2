"""The page of an evaluation, where there is little to tell, or much."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.store import Split
from pipeline.data.table import Array, Entry
from pipeline.evaluation.metrics import image_areas, summarize
from pipeline.evaluation.per_image import Origin, PerImage
from pipeline.evaluation.reliability import Reliability, calibration_of
from pipeline.evaluation.uncertainty import intervals
from pipeline.pages.report import Evaluation, report_page

LIVE = "<script>alert(1)</script>"


class Stored:
    """What the page needs of a data set: images of noise, and their targets."""

    name, ignore_index = "feet", 255

    def __init__(self, folder: Path, classes: list[str], targets: list[Array]) -> None:
        self.classes = classes
        self.palette = [(number, 0, 0) for number in range(len(classes))]
        self.colours = dict(zip(classes, self.palette, strict=True))
        entries, offset = [], 0
        with (folder / "a.bin").open("wb") as file:
            for number, target in enumerate(targets):
                shown = tuple(label for label in np.unique(target).tolist() if label != 255)
                name = f"{number} {LIVE}"
                entries.append(Entry(name, name, "a.bin", offset, *target.shape, shown))
                offset += file.write(bytes(3 * target.size) + target.tobytes())
        self._split = Split(folder, entries)

    def split(self, name: str) -> Split:
        return self._split


def page(folder: Path, num_classes: int, images: int = 4, **changes: Any) -> str:
    """The page of random predictions, of which nine tenths are right."""
    rng = np.random.default_rng(0)
    classes = [f"{LIVE} {number}" for number in range(num_classes)]
    targets = [rng.integers(num_classes, size=(20, 30)).astype(np.uint8) for _ in range(images)]
    right = [rng.random((20, 30)) < 0.9 for _ in range(images)]
    masks = [np.where(r, t, 0).astype(np.uint8) for r, t in zip(right, targets, strict=True)]
    store = Stored(folder, classes, targets)
    found = [
        image_areas(number, target, mask, num_classes=num_classes, ignore_index=255)
        for number, (target, mask) in enumerate(zip(targets, masks, strict=True))
    ]
    names = [entry.name for entry in store.split("test").entries]
    origin = Origin(classes=classes, params={}, code="", data="", fold=None)
    per_image = PerImage.of(origin, names, names, found)
    scores = summarize(per_image.confusion(), classes, per_image.boundary.sum(axis=0))
    scores["interval"] = intervals(per_image.areas(), per_image.groups, classes)
    table = Reliability.empty(num_classes)
    table.add(rng.dirichlet([1] * num_classes, 500), rng.integers(num_classes, size=500))
    split = {"images": images, "pixels": dict.fromkeys(classes, 7), "ignored_pixels": 0}
    given = {
        "scores": scores,
        "calibration": calibration_of({"raw": table}, None, classes),
        "summary": {"splits": {"train": split}},
        "train": [{"iteration": "1", "loss": "2.5", "loss/a": "2", "loss/b": "0.5"}],
        "val": [],
        "params": {"model.head.name": LIVE},
        "lineage": {"fingerprint": "abc"},
        "commands": ["dvc repro"],
    }
    evaluation = Evaluation(store, "test", per_image, mask=masks.__getitem__, **(given | changes))
    return report_page(evaluation)


def test_of_many_classes_only_the_worst_pairs_are_told(tmp_path: Path):
    matrix = 'aria-label="Confusion matrix"'
    many = page(tmp_path, 13)
    assert matrix in page(tmp_path, 12)
    assert matrix not in many
    assert 'aria-label="The pairs that are confused most"' in many
    assert "All classes: share that is right by confidence" in many


def test_a_training_without_validation_and_one_image_is_told_of(tmp_path: Path):
    found = page(tmp_path, 2, images=1)
    assert "without an interval, as too few groups of images were measured" in found
    assert "Loss on train" in found
    assert "IoU on val" not in found
    assert "The model has no temperature that would calibrate it." in found
    assert found.count('class="viewer"') == 1
    assert "None: nothing was trained here." in page(tmp_path, 2, train=[])
