"""What an evaluation leaves for people: predicted masks, plots for DVC, and pictures."""

import io
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.store import Split, Store, spread
from pipeline.data.table import Array
from pipeline.disk import write_table, writing
from pipeline.evaluation.metrics import Matrix, confusion_matrix

PICTURES = 3  # of each kind
PANEL = 640  # pixels of the longer side of each of a picture's three parts
SIZE = 12  # pixels of the letters below it
OPACITY = 0.5
PREDICTIONS = Path("evaluation/predictions")  # below work_dir


class Masks:
    """The predicted mask of each image of a split: palette PNG of class ids, below `work_dir`.

    A file has the name of its image below the data set's folder.
    """

    def __init__(self, work_dir: Path, split: Split, palette: Sequence[Sequence[int]]) -> None:
        self.folder = work_dir / PREDICTIONS
        self._names = [entry.name for entry in split.entries]
        self._palette = palette

    def clear(self) -> None:
        """Take away what an earlier evaluation has left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def write(self, index: int, prediction: Array) -> None:
        """The mask (H,W) of the image of this index."""
        path = self.folder / f"{self._names[index]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            write_mask(path, prediction, self._palette)

    def read(self, index: int) -> Array:
        """What `write` was given."""
        return read_mask((self.folder / f"{self._names[index]}.png").read_bytes())


def write_mask(path: Any, ids: Array, palette: Sequence[Sequence[int]]) -> None:
    """Class ids (H,W) as a PNG of the palette's colours, in a file by its path or an open one."""
    picture = Image.fromarray(ids, "L")
    picture.putpalette([level for colour in palette for level in colour])
    picture.save(path, "PNG")


def read_mask(content: bytes) -> Array:
    """The class ids (H,W) uint8 of a mask's file."""
    with Image.open(io.BytesIO(content)) as file:
        return np.array(file)


def write_plots(folder: Path, scores: dict[str, Any], confusion: Matrix, store: Store) -> None:
    """classes.tsv: the scores of each class; confusion.tsv: the share of each target class."""
    kinds = ("iou", "boundary_iou", "accuracy", "precision", "dice")
    rows = [[name, *(scores[kind][name] for kind in kinds)] for name in store.classes]
    write_table(folder / "classes.tsv", ["class", *kinds], rows)
    rows = []
    for name, row in zip(store.classes, confusion, strict=True):
        shares = row / max(row.sum(), 1)
        for predicted, pixels, share in zip(store.classes, row, shares, strict=True):
            rows.append([name, predicted, pixels, float(share)])
    write_table(folder / "confusion.tsv", ["target", "prediction", "pixels", "share"], rows)


def choose(scores: Sequence[float]) -> list[tuple[str, int]]:
    """Names and indices of images to look at.

    `panel` are the same images in every evaluation of a split, spread over it; `worst`, `median`
    and `best` are so by their scores, each image once.
    """
    defined = np.count_nonzero(~np.isnan(scores))
    ranked = np.argsort(scores, kind="stable")[:defined].tolist()  # nan is sorted to the end
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
    fixed = spread(len(scores), PICTURES).tolist()
    panel = [(f"panel-{number}", index) for number, index in enumerate(fixed, start=1)]
    return panel + [(name, index) for index, name in names.items()]


def write_overlays(
    folder: Path, masks: Masks, *, split: Split, chosen: list[tuple[str, int]], store: Store
) -> None:
    """One PNG for each chosen image, as `panel` draws it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, index in chosen:
        image, target = split[index]
        picture = panel(image, target, masks.read(index), store.colours)
        stem = re.sub(r"[^\w\-]+", "_", split.entries[index].name)[-60:]  # names have a limit
        path = folder / f"{name}_{stem}.png"
        with writing(path):
            path.write_bytes(png(picture))


def panel(
    image: Array, target: Array, prediction: Array, colours: Mapping[str, Sequence[int]]
) -> Array:
    """Side by side the image, with its target over it, and with the prediction; below, a legend.

    The legend names the classes that either shows, with the image's IoU of each.
    """
    palette = [*colours.values()]
    layers = [image, *(blend(image, labels, palette) for labels in (target, prediction))]
    layers = [shrunk(layer, PANEL, cv2.INTER_AREA) for layer in layers]
    gap = np.full((layers[0].shape[0], 4, 3), 255, np.uint8)
    picture = np.hstack([layers[0], gap, layers[1], gap, layers[2]])
    classes = len(palette)
    confusion = confusion_matrix(target, prediction, classes, classes)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    shown = np.argsort(-union, kind="stable")[: np.count_nonzero(union)].tolist()
    told = [
        (f"{name} {confusion[place, place] / union[place]:.3f}", palette[place])
        for place, name in ((place, [*colours][place]) for place in shown)
    ]
    return np.vstack([picture, _legend(told, picture.shape[1])])


def _legend(told: Sequence[tuple[str, Sequence[int]]], width: int) -> Array:
    """Texts behind squares of their colours, line by line, (h,width,3)."""
    font = ImageFont.load_default(SIZE)
    line, left, places = 0, SIZE // 2, []
    for text, colour in told:
        length = round(font.getlength(text)) + 2 * SIZE
        if left + length > width and left > SIZE // 2:
            line, left = line + 1, SIZE // 2
        places.append((line, left, text, colour))
        left += length + SIZE // 2
    sheet = Image.new("RGB", (width, (line + 1) * 2 * SIZE), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for line, left, text, colour in places:
        top = line * 2 * SIZE + SIZE // 2
        draw.rectangle((left, top, left + SIZE, top + SIZE), tuple(colour), (120, 120, 120))
        draw.text((left + SIZE + SIZE // 2, top + SIZE // 2), text, (0, 0, 0), font, "lm")
    return np.asarray(sheet)


def shrunk(picture: Array, longest: int, interpolation: int) -> Array:
    """A picture, or a map of one, whose longer side has no more pixels than `longest`."""
    height, width = picture.shape[:2]
    factor = min(longest / max(height, width), 1)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    return np.asarray(cv2.resize(picture, size, interpolation=interpolation), np.uint8)


def png(picture: Array) -> bytes:
    """A picture, (H,W,3) or grey (H,W), as a PNG file."""
    coloured = picture.ndim == 3
    done, data = cv2.imencode(
        ".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR) if coloured else picture
    )
    assert done, "OpenCV encodes any uint8 picture"
    return data.tobytes()


def blend(image: Array, labels: Array, palette: Sequence[Sequence[int]]) -> Array:
    """The classes' colours over the image; pixels of no class stay as they are."""
    colours = np.array(palette, np.float32)
    known = labels < len(palette)
    blended = image.astype(np.float32)
    blended[known] += OPACITY * (colours[labels[known]] - blended[known])
    return np.rint(blended).astype(np.uint8)
