"""Files -> arrays: photographs as RGB, targets as the ids or the colours that are stored.

A file is what its content says, whatever its name does. Its header is read first, so that one of
too many pixels, of several images or of a lossy format is refused before anything is decoded.
"""

import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from posixpath import splitext
from typing import Any, TypeVar

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from pipeline.data.table import Array
from pipeline.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
TARGET_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
UNNAMED = "its name is no UTF-8, which an index, a table or a page can't hold; rename it"

# What Pillow may take a file for: others of its readers start programs, or are seldom tried.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
TARGET_FORMATS = ("PNG", "BMP", "TIFF")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24")
SUBFILE_TYPE, REDUCED, MASK = 254, 1, 4  # of TIFF: a smaller copy, or a mask, of another page

LARGEST = 2**30  # pixels: OpenCV decodes no more
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which is lower; `_header` has ours
DARKEST = 4096  # values of 16 bits that stay below this become fewer than 16 of 8 bits

# libjpeg complains of these, and yet every pixel is there: some phones write them.
HARMLESS = re.compile("Invalid SOS parameters|Unknown Adobe color transform")
PADDING = re.compile("([0-9]+) extraneous bytes before marker 0xd9")

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
    problems = [
        f"{folder / name}: a link to {'a folder' if entry.is_dir() else 'nothing'}, which DVC does "
        "not follow; put the files there"
        for name, entry in _entries(folder)
        if entry.is_symlink() and not entry.is_file()
    ]
    found, unclear = stems(folder, suffixes)
    problems += unclear
    if not found and not unclear:
        problems.append(f"{folder}: no {', '.join(suffixes)} file{_instead(folder)}")
    return found, problems


def stems(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """The same of the files that are there, and what is unclear of their names, a line each."""
    found: dict[str, Path] = {}
    unclear = []
    for name in _files(folder):
        stem, suffix = splitext(name)
        if suffix.lower() not in suffixes:
            continue
        path = folder / name
        if not is_utf8(path):
            unclear.append(f"{path}: {UNNAMED}")
            continue
        if stem in found:
            unclear.append(f"{path}: same stem as {found[stem].name}; keep one of them")
        found[stem] = path
    return found, unclear


def is_utf8(path: Path) -> bool:
    """Whether a path can be written as text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _instead(folder: Path) -> str:
    """What a folder holds, for the end of a message that says what it lacks."""
    suffixes = (splitext(name)[1].lower() for name in _files(folder))
    counts = Counter(suffix or "without a suffix" for suffix in suffixes)
    said = "".join(f", but {count} {suffix}" for suffix, count in counts.items())
    if counts.keys() & {".jpg", ".jpeg"}:
        said += "; JPEG changes ids along every edge: save the targets' source as PNG"
    return said


def _files(folder: Path) -> Iterator[str]:
    """The paths of the files below a folder, relative to it, that are not hidden."""
    for name, entry in _entries(folder):
        if entry.is_file() and not any(part.startswith(".") for part in name.split("/")):
            yield name


def _entries(folder: Path) -> list[tuple[str, "os.DirEntry[str]"]]:
    """All that lies below a folder, by its path relative to it, sorted part by part.

    Paths are text here: a million of pathlib's take minutes.
    """
    found = []
    folders = [""]
    while folders:
        above = folders.pop()
        with os.scandir(folder / above) as entries:
            for entry in entries:
                name = above + entry.name
                found.append((name, entry))
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{name}/")
    return sorted(found, key=lambda one: one[0].replace("/", "\0"))


def read_image(path: Path, max_pixels: int = LARGEST) -> tuple[Array, int]:
    """The pixels as they are stored, (H,W,3) uint8 RGB, and the EXIF orientation, 1 to 8.

    Raises:
        InputError: it can't be read, is damaged, has more than `max_pixels` or holds several
            images; the text names the file.
    """
    content, header = _open(path, "an image", max_pixels)
    exif = Image.Exif()
    if header.format in ("JPEG", "MPO"):
        image = _decode_jpeg(path, content)
        with suppress(Exception):  # a broken one, which viewers do not obey either
            exif = header.getexif()
        return image, _orientation(exif)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image, kinds, found = _decode(path, content, flags | cv2.IMREAD_ANYDEPTH)
    if image.dtype != np.uint8:
        if 0 < image.max() < DARKEST:
            raise InputError(
                f"{path}: its pixels have 16 bits and no value above {image.max()}: it would be "
                "nearly black. Values of 10 or 12 bits must be scaled to all 16, or to 8"
            )
        image, kinds, found = _decode(path, content, flags)
    if header.format == "TIFF":  # OpenCV turns it, whatever it is told
        _refuse_turned(path, getattr(header, "tag_v2", {}))
    for kind, data in zip(kinds, found, strict=True):
        if kind == cv2.IMAGE_METADATA_EXIF:
            with suppress(Exception):
                exif.load(data.tobytes())
    return np.asarray(image, np.uint8), _orientation(exif)


def _open(path: Path, what: str, max_pixels: int) -> tuple[bytes, ImageFile]:
    """The bytes of a file, and what its header says.

    Raises:
        InputError: it can't be read as `what`, has too many pixels or holds several images.
    """
    try:
        content = path.read_bytes()
        header = Image.open(BytesIO(content), formats=IMAGE_FORMATS)
        several = _is_several(header)
    except OSError as error:
        reason = error.strerror or f"none of {', '.join(IMAGE_FORMATS)}, or only a part of one"
        raise InputError(f"{path}: can't be read as {what} ({reason})") from None
    except Exception as error:  # what Pillow raises depends on where a file is broken
        raise InputError(f"{path}: can't be read as {what} ({error})") from None
    width, height = header.size
    if width * height > max_pixels:
        limit = "data.max_pixels allows" if max_pixels < LARGEST else "OpenCV decodes"
        raise InputError(f"{path}: {width}x{height} pixels are more than the {max_pixels} {limit}")
    if several:
        raise InputError(
            f"{path}: holds several images, an animation or pages; save the one that is meant alone"
        )
    return content, header


def _is_several(header: ImageFile) -> bool:
    """Whether a file holds another image than its first, and not only a smaller copy of that.

    Photographs of phones (MPO) bring copies for screens along.
    """
    frames = 1 if header.format == "MPO" else getattr(header, "n_frames", 1)
    if header.format != "TIFF":
        return bool(frames > 1)
    for page in range(1, frames):
        header.seek(page)
        if not header.tag_v2.get(SUBFILE_TYPE, 0) & (REDUCED | MASK):  # type: ignore[attr-defined]
            return True
    header.seek(0)
    return False


def _decode(path: Path, content: bytes, flags: int) -> tuple[NDArray[Any], Any, Any]:
    """What OpenCV makes of a file: its pixels, and its metadata by kind."""
    try:
        image, kinds, found = cv2.imdecodeWithMetadata(
            np.frombuffer(content, np.uint8), flags=flags
        )
    except cv2.error as error:
        raise InputError(f"{path}: can't be read as an image ({error.err})") from None
    if image is None:  # how OpenCV says that a file is truncated or no image
        raise InputError(f"{path}: can't be read as an image")
    return image, kinds, found


def _decode_jpeg(path: Path, content: bytes) -> Array:
    """The pixels of a JPEG, those that OpenCV finds, unless its data is damaged.

    Of that OpenCV and Pillow make some picture without a word. Where damage reads like data, it
    isn't found: of 100 photographs with 300 bytes of garbage one passes.
    """
    try:
        return np.asarray(simplejpeg.decode_jpeg(content))
    except ValueError as error:
        padding = PADDING.search(str(error))
        tail = content[: content.rfind(b"\xff\xd9")][-int(padding[1]) :] if padding else b""
        if HARMLESS.search(str(error)) or len(set(tail)) == 1:
            return np.asarray(simplejpeg.decode_jpeg(content, strict=False))
        raise InputError(
            f"{path}: can't be read as an image: its data is damaged ({error}); take it from its "
            "source again, or save it anew if it looks right"
        ) from None


def read_ids(path: Path, max_pixels: int = LARGEST) -> Ids:
    """(H,W): the id of every pixel, from 1 to 16 bits, grey or palette, as it is stored.

    Raises:
        InputError: it can't be read, is damaged, lossy, too large or several images, or has colours
            in place of ids; the text names the file.
    """
    mode, target = _read_target(path, max_pixels)
    if mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
        raise InputError(
            f"{path}: a target holds one class id a pixel, and this is {mode}; "
            "save it as grey or palette PNG, or give data.format.color_map"
        )
    if mode == "I" and (target.min() < 0 or target.max() > 65535):
        raise InputError(f"{path}: ids from {target.min()} to {target.max()} are out of range")
    return target.astype(np.uint16 if target.dtype.itemsize > 1 else np.uint8)


def read_colours(
    path: Path, color_map: Sequence[tuple[int, int, int]], max_pixels: int = LARGEST
) -> Array:
    """(H,W) uint8: of every pixel the place of its colour in `color_map`.

    Raises:
        InputError: as `read_ids` does, or a colour is not in the map; the text names both.
    """
    mode, colours = _read_target(path, max_pixels, "RGB")
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


def _read_target(
    path: Path, max_pixels: int, convert: str | None = None
) -> tuple[str, NDArray[Any]]:
    """The mode of the file and its pixels, converted if asked."""
    content, file = _open(path, "a target", max_pixels)
    packing = str(file.info.get("compression")) if file.format == "TIFF" else ""
    if file.format not in TARGET_FORMATS or packing in LOSSY_TIFF:
        kind = f"TIFF of {packing}" if packing else file.format
        raise InputError(
            f"{path}: is a {kind} file, whatever its name says, and lossy formats change ids along "
            "every edge; save the target's source as PNG"
        )
    # Pillow keeps the indices of a palette and all 16 bits; OpenCV turns both into something else.
    try:
        if file.format == "PNG":
            _check_png(content, file.width * file.height)
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


def _check_png(content: bytes, pixels: int) -> None:
    """Compare a PNG's checksums, which Pillow doesn't: CRC-32 of its chunks, Adler-32 of its data.

    Raises:
        ValueError: one is wrong, or there is too little data, or far too much.
        struct.error, zlib.error: the file is broken where it is looked at.
    """
    place, data, size = 8, zlib.decompressobj(), 0
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, place)
        packed = content[place + 8 : place + 8 + length]
        if struct.unpack_from(">I", content, place + 8 + length)[0] != zlib.crc32(kind + packed):
            raise ValueError(f"the checksum of its part {kind.decode('latin-1')} is wrong")
        place += 12 + length
        while kind == b"IDAT" and packed and not data.eof:
            size += len(data.decompress(packed, 2**20))
            packed = data.unconsumed_tail
            if size > 10 * pixels + 64:  # at most 8 bytes a pixel and one a row
                raise ValueError("its data is more than its pixels")
    if not data.eof:
        raise ValueError("its data breaks off")


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
