"""Outlines that annotators have drawn -> class ids of pixels: COCO, LabelMe, CVAT and YOLO.

A pixel belongs to an outline as COCO's own code has it (pycocotools); of two outlines on one pixel
the later one counts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.data.table import Array
from pipeline.errors import InputError

Outline = list[float]  # x, y, x, y, ... in pixels, or in shares of width and height

# What Python and pycocotools raise of a file that holds something else than it should.
BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError)


class Shape(NamedTuple):
    """One thing of a class: its outlines, or runs of pixels as COCO counts them.

    `label` is the name of the class or, of YOLO, its number.
    """

    label: str | int
    outlines: Sequence[Outline] = ()
    runs: Mapping[str, Any] | None = None


class Drawing(NamedTuple):
    """What was drawn on an image, in order. `size` is its height and width; None: not told."""

    size: tuple[int, int] | None
    shapes: Sequence[Shape]


def ids_of(
    drawing: Drawing, size: tuple[int, int], classes: Sequence[str], background: int
) -> Array:
    """The ids (H,W) uint8 of an image's pixels; `background` where nothing was drawn.

    An id is the place of a name in `classes`. Labels that are numbers leave the background out.

    Raises:
        InputError: a label is none of the classes, and says which are; or an outline isn't one.
    """
    try:
        return _drawn(drawing, size, classes, background)
    except InputError:
        raise
    except BROKEN as error:
        raise InputError(f"an outline can't be drawn ({type(error).__name__}: {error})") from None


def _drawn(
    drawing: Drawing, size: tuple[int, int], classes: Sequence[str], background: int
) -> Array:
    height, width = size
    ids = np.full(size, background, np.uint8)
    numbered = [place for place, name in enumerate(classes) if place != background]
    for label, outlines, runs in drawing.shapes:
        if isinstance(label, int):
            if not 0 <= label < len(numbered):
                raise InputError(f"class {label} is none of the {len(numbered)} that are drawn")
            place = numbered[label]
        elif label in classes:
            place = list(classes).index(label)
        else:
            raise InputError(
                f"label {label!r} is not in data.classes: {', '.join(classes)}; add it there, or "
                "rename it"
            )
        whole = np.array([1.0, 1.0]) if drawing.size else np.array([width, height])
        given: Any = [
            (np.reshape(one, (-1, 2)) * whole).ravel().tolist() for one in outlines if len(one) > 4
        ]
        if not all(_is_near(one, size) for one in given):
            raise InputError(f"an outline of {label!r} leads far out of the image")
        if runs is not None:
            given = dict(runs)
            if tuple(given["size"]) != size:
                raise InputError(f"{label!r} is drawn on {given['size']} pixels, not {list(size)}")
        if given:
            ids[_mask(given, size)] = place
    return ids


def _is_near(outline: Outline, size: tuple[int, int]) -> bool:
    """Whether no point is farther from the image than the image is long.

    The memory that drawing takes grows with the length of an outline.
    """
    points = np.reshape(outline, (-1, 2))
    far = np.array(size[::-1])
    return bool((np.isfinite(points) & (points >= -far) & (points <= 2 * far)).all())


def _mask(given: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels (H,W) of outlines, or of runs as COCO counts them."""
    try:
        found = coco_mask.frPyObjects(given, *size) if _uncounted(given) else given
        merged = coco_mask.merge(found) if isinstance(found, list) else found
        return np.asarray(coco_mask.decode(merged) > 0)
    except Exception as error:  # pycocotools knows no narrower one
        raise ValueError(str(error)) from None


def _uncounted(given: Any) -> bool:
    """Whether pycocotools has to make runs of it first: of outlines and of plain counts."""
    return isinstance(given, list) or isinstance(given["counts"], list)


@lru_cache(maxsize=16)  # files of many images; one that has a single image is read once anyway
def drawings(kind: str, path: Path) -> dict[str, Drawing]:
    """The drawings in a file, by the path of each image without its suffix, as the file has it.

    Raises:
        InputError: the file can't be read as one of this kind; the text names it.
    """
    try:
        found = PARSERS[kind][1](path)
        return {Path(name).with_suffix("").as_posix(): one for name, one in found.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (*BROKEN, RecursionError, OSError, ElementTree.ParseError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: can't be read as a file of {kind} ({reason})") from None


def _coco(path: Path) -> dict[str, Drawing]:
    """Source: https://cocodataset.org/#format-data ."""
    content = json.loads(path.read_text(encoding="utf-8"))
    names = {one["id"]: str(one["name"]) for one in content["categories"]}
    shapes: dict[Any, list[Shape]] = {one["id"]: [] for one in content["images"]}
    for one in content["annotations"]:
        drawn = one["segmentation"]
        if isinstance(drawn, dict):
            shapes[one["image_id"]].append(Shape(names[one["category_id"]], runs=drawn))
        else:
            shapes[one["image_id"]].append(Shape(names[one["category_id"]], drawn))
    return {
        one["file_name"]: Drawing((one["height"], one["width"]), shapes[one["id"]])
        for one in content["images"]
    }


def _labelme(path: Path) -> dict[str, Drawing]:
    """Source: https://github.com/wkentaro/labelme ."""
    content = json.loads(path.read_text(encoding="utf-8"))
    shapes = []
    for one in content["shapes"]:
        points, kind = one["points"], one.get("shape_type") or "polygon"
        if kind == "rectangle":
            points = _corners(*points[0], *points[1])
        elif kind != "polygon":
            raise InputError(f"a {kind} of {one['label']!r} has no inside; draw a polygon")
        shapes.append(Shape(str(one["label"]), [np.ravel(points).tolist()]))
    return {path.stem: Drawing((content["imageHeight"], content["imageWidth"]), shapes)}


def _cvat(path: Path) -> dict[str, Drawing]:
    """CVAT for images 1.1. Source: https://docs.cvat.ai/docs/dataset_management/formats/ ."""
    found = {}
    for image in ElementTree.parse(path).getroot().iter("image"):
        shapes = []
        drawn = [one for one in image if one.tag not in ("tag",)]
        for one in sorted(drawn, key=lambda one: int(one.get("z_order", "0"))):
            if one.tag == "box":
                points = _corners(
                    *(float(one.attrib[side]) for side in ("xtl", "ytl", "xbr", "ybr"))
                )
            elif one.tag == "polygon":
                points = [
                    [float(x) for x in pair.split(",")] for pair in one.attrib["points"].split(";")
                ]
            else:
                raise InputError(f"a {one.tag} of {one.get('label')!r}; export polygons")
            shapes.append(Shape(one.attrib["label"], [np.ravel(points).tolist()]))
        size = int(image.attrib["height"]), int(image.attrib["width"])
        found[image.attrib["name"]] = Drawing(size, shapes)
    return found


def _yolo(path: Path) -> dict[str, Drawing]:
    """Source: https://docs.ultralytics.com/datasets/segment/ ."""
    shapes = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            label, *outline = line.split()
            if len(outline) < 6:
                raise InputError(f"{len(outline)} numbers are no outline: {line!r}")
            shapes.append(Shape(int(label), [[float(x) for x in outline]]))
    return {path.stem: Drawing(None, shapes)}


def _corners(x: float, y: float, right: float, bottom: float) -> list[list[float]]:
    return [[x, y], [right, y], [right, bottom], [x, bottom]]


# By format: the suffix of its files, and what reads one. A file of LabelMe or YOLO is one image's.
PARSERS: dict[str, tuple[str, Callable[[Path], dict[str, Drawing]]]] = {
    "coco": (".json", _coco),
    "labelme": (".json", _labelme),
    "cvat": (".xml", _cvat),
    "yolo": (".txt", _yolo),
}
ONE_EACH = ("labelme", "yolo")


def by_image(
    kind: str, place: Path, images: Mapping[str, Path]
) -> tuple[dict[str, Path], list[str]]:
    """{an image's stem: the file that has its drawing}, and the problems met, a line each.

    `place` is a file, or a folder of them; `images` are those of the data set, by stem.
    """
    suffix = PARSERS[kind][0]
    files = [place] if place.is_file() else sorted(place.rglob(f"*{suffix}"))
    problems = []
    if not files:
        problems += [f"{place}: no {suffix} file of {kind}; data.format.annotations names it"]
    found: dict[str, Path] = {}
    last = {stem.rpartition("/")[2]: stem for stem in images}
    for file in files:
        if kind in ONE_EACH:
            found[file.relative_to(place).with_suffix("").as_posix()] = file
            continue
        try:
            names = drawings(kind, file).keys()
        except InputError as error:
            problems.append(str(error))
            continue
        for stem in names:
            found[stem if stem in images else last.get(stem.rpartition("/")[2], stem)] = file
    return found, problems


def drawing_of(kind: str, file: Path, stem: str) -> Drawing:
    """The drawing of an image in a file that `by_image` has found."""
    held = drawings(kind, file)
    return held[stem if stem in held else stem.rpartition("/")[2]]
