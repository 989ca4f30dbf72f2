"""The page of an evaluation: its scores, curves, errors and calibration, and what it comes from."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from pipeline.data.store import Store
from pipeline.data.table import Array
from pipeline.evaluation.errors import confused, places
from pipeline.evaluation.metrics import iou_of, mean_of
from pipeline.evaluation.per_image import PerImage
from pipeline.evaluation.reliability import BINS, Reliability, read_calibration
from pipeline.evaluation.report import OPACITY, choose, shrunk
from pipeline.pages import address, render
from pipeline.pages.charts import Chart, line_chart

LONGEST = 640  # pixels of a picture's longer side: a page shows it no larger
QUALITY = 95  # of a photograph as a JPEG file
FEWEST = 20  # pixels of a bin: what fewer of them show is mostly chance
PAIRS = 10  # of classes that are confused most
FEW = 6  # classes, each with a curve of its own beside the others
MANY = 12  # classes, from which a matrix or a chart for each would be unreadable

Colour = tuple[int, int, int, int]  # red, green, blue, opacity
RIGHT, WRONG, UNLABELLED = (0, 0, 0, 140), (255, 0, 144, 255), (128, 128, 128, 200)
Curve = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Evaluation:
    """What the page tells of, as the stages left it.

    `scores`, `calibration` and `summary` are the contents of the files of these names; `train` and
    `val` the lines of the curves; `mask` gives the prediction (H,W) of an image by its index.
    `params` are the parameters by their dotted names, `lineage` what the result comes from.
    """

    store: Store
    split: str
    per_image: PerImage
    scores: Mapping[str, Any]
    calibration: Mapping[str, Any]
    summary: Mapping[str, Any]
    train: Curve
    val: Curve
    mask: Callable[[int], Array]
    params: Mapping[str, Any]
    lineage: Mapping[str, str]
    commands: Sequence[str]


class Shown(NamedTuple):
    """An image of the gallery: its name, its own mean IoU, and its pictures by what they show.

    `photo` lies below each of the `layers`, which are mostly transparent.
    """

    name: str
    score: float
    width: int
    height: int
    photo: str
    layers: dict[str, str]


def report_page(evaluation: Evaluation) -> str:
    """HTML."""
    store, per_image = evaluation.store, evaluation.per_image
    split = store.split(evaluation.split)
    confusion = per_image.confusion()
    tables = read_calibration(evaluation.calibration)
    classes = list(store.classes)
    few = len(classes) <= MANY
    return render(
        "report.html",
        data=store.name,
        split=evaluation.split,
        images=len(per_image.names),
        groups=len(set(per_image.groups.tolist())),
        scores=evaluation.scores,
        classes=classes,
        shares=dict(zip(classes, confusion.sum(axis=1) / max(confusion.sum(), 1), strict=True)),
        curves=curves(evaluation.train, evaluation.val, classes),
        confusion=confusion.tolist() if few else None,
        pairs=confused(confusion, classes, PAIRS),
        gallery=gallery(evaluation),
        legend=list(store.colours.items()),
        marks=[("wrong", WRONG[:3]), ("not labelled", UNLABELLED[:3])],
        places=places(split, evaluation.mask, store.ignore_index),
        tables=tables,
        bins=BINS,
        temperature=evaluation.calibration["temperature"],
        fewest=FEWEST,
        reliability=reliability_chart("All classes", tables),
        reliabilities=[reliability_chart(name, tables, label) for label, name in enumerate(classes)]
        if few
        else [],
        audit=evaluation.summary["splits"],
        params={name: _plain(value) for name, value in evaluation.params.items()},
        lineage=evaluation.lineage,
        commands=evaluation.commands,
    )


def curves(train: Curve, val: Curve, classes: Sequence[str]) -> list[Chart | None]:
    """The charts of the training's loss and of the validations' IoU; None where there are none."""
    terms = [name for name in (train[0] if train else {}) if name.startswith("loss/")]
    names = ["loss", *(terms if len(terms) > 1 else [])]
    scores = {"mean IoU": "mean_iou"}
    if len(classes) <= FEW:
        scores |= {name: f"iou.{name}" for name in classes}
    return [
        line_chart(
            "Loss on train",
            {name: _column(train, name) for name in names},
            x_label="iteration",
            y_label="loss",
        ),
        line_chart(
            "IoU on val",
            {name: _column(val, column) for name, column in scores.items()},
            x_label="iteration",
            y_label="IoU",
        ),
    ]


def _column(lines: Curve, name: str) -> list[tuple[float, float]]:
    """The points of one column of a curve, without those that are undefined."""
    return [(float(line["iteration"]), float(line[name])) for line in lines if line.get(name)]


def reliability_chart(
    title: str, tables: Mapping[str, Reliability], label: int | None = None
) -> Chart | None:
    """How many are right of those that are so sure: of all pixels, or of those of a class."""
    lines = {
        name: [(x, y) for x, y, pixels in table.curve(label) if pixels >= FEWEST]
        for name, table in tables.items()
    }
    return line_chart(
        title,
        lines,
        x_label="confidence",
        y_label="share that is right",
        unit=True,
        dots=True,
        diagonal="as right as sure",
    )


def gallery(evaluation: Evaluation) -> dict[str, list[Shown]]:
    """The worst, median and best images."""
    scores = mean_of(iou_of(evaluation.per_image.areas())).tolist()
    split = evaluation.store.split(evaluation.split)
    found: dict[str, list[Shown]] = {"worst": [], "median": [], "best": []}
    for name, index in choose(scores):
        kind = name.split("-")[0]
        if kind not in found:
            continue
        image, target = split[index]
        layers = pictures(target, evaluation.mask(index), evaluation.store)
        photo = shrunk(image, LONGEST, cv2.INTER_AREA)
        shown = Shown(
            split.entries[index].name,
            scores[index],
            width=photo.shape[1],
            height=photo.shape[0],
            photo=_photo(photo),
            layers=layers,
        )
        found[kind].append(shown)
    return found


def pictures(target: Array, prediction: Array, store: Store) -> dict[str, str]:
    """What is laid over an image: nothing, the target, the prediction, and what is wrong in it."""
    opacity = round(255 * OPACITY)
    colours: list[Colour] = [(0, 0, 0, 0)] * 256
    for label, (red, green, blue) in enumerate(store.palette):
        colours[label] = (red, green, blue, opacity)
    ignored = target == store.ignore_index
    errors = np.where(ignored, 2, target != prediction).astype(np.uint8)
    return {
        "image": _layer(np.zeros_like(target), [(0, 0, 0, 0)]),
        "target": _layer(target, colours),
        "prediction": _layer(prediction, colours),
        "errors": _layer(errors, [RIGHT, WRONG, UNLABELLED]),
    }


def _layer(ids: Array, colours: Sequence[Colour]) -> str:
    """The colours of ids (H,W) as the address of an <img>: a PNG file with a palette."""
    picture = Image.fromarray(shrunk(ids, LONGEST, cv2.INTER_NEAREST), "L")
    picture.putpalette([level for colour in colours for level in colour[:3]])
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=bytes(colour[3] for colour in colours))
    return address(file.getvalue(), "png")


def _photo(image: Array) -> str:
    """A photograph (H,W,3) as the address of an <img>: as PNG, some would take megabytes."""
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    assert done, "OpenCV encodes any uint8 picture"
    return address(data.tobytes(), "jpeg")


def _plain(value: Any) -> str:
    """A parameter as params.yaml has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
