"""Files -> arrays: photographs as RGB, targets as the ids or the colours that are stored."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.store import Array
from pipeline.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
TARGET_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")

# Orientations of TIFF and EXIF: the tag, those that exchange height and width, and the axes that
# are then reversed.
ORIENTATION = 274
TRANSPOSED = 5
FLIPPED = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}

Ids = NDArray[np.uint8 | np.uint16]
T = TypeVar("T", bound=np.generic)


def by_stem(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """{path below the folder, without suffix: file}, and the problems met, a line each."""
    if not folder.is_dir():
        return {}, [
            f"{folder}: no such folder; data.root and, for pairs, data.format.images and targets "
            "name it, and in a --temp or queued run it must be tracked by git or `dvc add`"
        ]
    found: dict[str, Path] = {}
    problems = [
        f"{path}: a link to {'a folder' if path.is_dir() else 'nothing'}, which DVC does not "
        "follow; put the files there"
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() and not path.is_file()
    ]
    for path in _files(folder):
        if path.suffix.lower() not in suffixes:
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            problems.append(f"{path}: same stem as {found[stem].name}; keep one of them")
        found[stem] = path
    if not found:
        problems.append(f"{folder}: no {', '.join(suffixes)} file{_instead(folder)}")
    return found, problems


def _instead(folder: Path) -> str:
    """What a folder holds, for the end of a message that says what it lacks."""
    counts = Counter(path.suffix.lower() or "without a suffix" for path in _files(folder))
    said = "".join(f", but {count} {suffix}" for suffix, count in counts.items())
    if counts.keys() & {".jpg", ".jpeg"}:
        said += "; JPEG changes ids along every edge: save the targets' source as PNG"
    return said


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def read_image(path: Path) -> tuple[Array, int]:
    """The pixels as they are stored, (H,W,3) uint8 RGB, and the EXIF orientation, 1 to 8.

    Raises:
        InputError: it can't be read; the text names the file.
    """
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image, kinds, found = cv2.imdecodeWithMetadata(np.fromfile(path, np.uint8), flags=flags)
    except OSError as error:
        raise InputError(f"{path}: can't be read as an image ({error})") from None
    except cv2.error:  # of an empty file
        image = None
    if image is None:  # how OpenCV says that a file is truncated or no image
        raise InputError(f"{path}: can't be read as an image")
    if path.suffix.lower() in (".tif", ".tiff"):  # OpenCV turns it, whatever it is told
        with Image.open(path) as file:
            _refuse_turned(path, getattr(file, "tag_v2", {}))
    exif = Image.Exif()
    for kind, content in zip(kinds, found, strict=True):
        if kind == cv2.IMAGE_METADATA_EXIF:
            with suppress(Exception):  # a broken one, which viewers do not obey either
                exif.load(content.tobytes())
    return np.asarray(image, np.uint8), _orientation(exif)


def read_ids(path: Path) -> Ids:
    """(H,W): the id of every pixel, from 1 to 16 bits, grey or palette, as it is stored.

    Raises:
        InputError: it can't be read, or has colours in place of ids; the text names the file.
    """
    mode, target = _read_target(path)
    if mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
        raise InputError(
            f"{path}: a target holds one class id a pixel, and this is {mode}; "
            "save it as grey or palette PNG, or give data.format.color_map"
        )
    if mode == "I" and (target.min() < 0 or target.max() > 65535):
        raise InputError(f"{path}: ids from {target.min()} to {target.max()} are out of range")
    return target.astype(np.uint16 if target.dtype.itemsize > 1 else np.uint8)


def read_colours(path: Path, color_map: Sequence[tuple[int, int, int]]) -> Array:
    """(H,W) uint8: of every pixel the place of its colour in `color_map`.

    Raises:
        InputError: it can't be read, or a colour is not in the map; the text names both.
    """
    mode, colours = _read_target(path, "RGB")
    if mode not in ("1", "L", "P", "RGB", "RGBA"):
        raise InputError(
            f"{path}: data.format.color_map needs coloured or grey targets, and this is {mode}; "
            "set it to null"
        )
    red_green_blue = np.array([65536, 256, 1])
    pixels, known = colours @ red_green_blue, np.array(color_map) @ red_green_blue
    order = np.argsort(known)
    place = np.searchsorted(known, pixels, sorter=order)
    ids: NDArray[np.intp] = order[np.minimum(place, len(known) - 1)]
    strange = np.unique(pixels[known[ids] != pixels]).tolist()
    if strange:
        listed = [f"[{one >> 16}, {one >> 8 & 255}, {one & 255}]" for one in strange]
        hint = "; if it holds ids, set that to null" if mode in ("1", "L") else ""
        raise InputError(f"{path}: colours {some(listed)} are not in data.format.color_map{hint}")
    return ids.astype(np.uint8)


def _read_target(path: Path, convert: str | None = None) -> tuple[str, NDArray[Any]]:
    """The mode of the file and its pixels, converted if asked."""
    # Pillow keeps the indices of a palette and all 16 bits; OpenCV turns both into something else.
    try:
        with Image.open(path) as file:
            # Pillow spreads the ids of a grey PNG of 2 or 4 bits over 0-255.
            step = {"L;2": 85, "L;4": 17}.get(str(file.tile[0][3]), 1) if file.tile else 1
            mode = file.mode
            pixels = np.asarray(file.convert(convert) if convert else file)
            pixels = pixels if convert or step == 1 else pixels // step
            tags = file.getexif()
    except Exception as error:  # what Pillow raises depends on where a file is broken
        raise InputError(f"{path}: can't be read as a target ({error})") from None
    _refuse_turned(path, tags)
    return mode, pixels


def upright(stored: NDArray[T], orientation: int) -> NDArray[T]:
    """A stored image, or a map of it, (H,W,...), as a viewer shows it: a view of the same memory.

    What is written into the view is turned back thereby.
    """
    turned = stored.swapaxes(0, 1) if orientation >= TRANSPOSED else stored
    return np.flip(turned, FLIPPED.get(orientation, ()))


def _orientation(tags: Mapping[int, Any]) -> int:
    """How a viewer turns an image: as stored by 1, as by anything else that is no number of 1-8."""
    given = tags.get(ORIENTATION)
    return int(given) if given in range(1, 9) else 1  # type: ignore[arg-type]


def _refuse_turned(path: Path, tags: Mapping[int, Any]) -> None:
    """Refuse a file that one library turns and another doesn't."""
    if _orientation(tags) != 1:
        raise InputError(f"{path}: its orientation tag turns it; save it upright, without the tag")


def some(values: Sequence[object]) -> str:
    """The first eight of them, for a message."""
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
