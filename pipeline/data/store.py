"""The prepared data set: packed uint8 shards, memory-mapped in training, beside one index.json.

A shard is the bytes of its records, one after another: image (H,W,3) RGB, then target (H,W). The
index holds where each record lies and the md5 of each shard, so that the folder's own identity (the
one DVC writes into dvc.lock) costs the md5 of one small file.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from pipeline.disk import check_format, file_md5, write_text
from pipeline.errors import InputError

PREPARED = Path("data/prepared")
INDEX = "index.json"
SUMMARY = "summary.json"

Array = NDArray[np.uint8]


class Entry(NamedTuple):
    """Where a record lies: byte `offset` in `shard`, an image of `height` x `width` pixels.

    Images of one `group` are no independent ones. `classes` are those that the target holds.
    """

    name: str
    group: str
    shard: str
    offset: int
    height: int
    width: int
    classes: Sequence[int] = ()


class Index(TypedDict):
    """The content of index.json.

    `content` is the identity of the data set, whichever fold is val, and `fold` which one is, if
    there are folds; `exif` is data.exif. `pixels` and `frequency` are those of each class in train,
    see `audit.prepare`; `shards` holds the md5 of each shard, `splits` the entries of each split,
    as lists of their values.
    """

    format: int
    name: str
    classes: Sequence[str]
    palette: Sequence[Sequence[int]]
    ignore_index: int
    exif: str
    content: str
    fold: int | None
    pixels: list[int]
    frequency: list[float]
    shards: dict[str, str]
    splits: dict[str, list[Entry]]


class Split:
    """The records of one split, in order, read from the shards."""

    def __init__(self, folder: Path, entries: list[Entry]) -> None:
        self.folder = folder
        self.entries = entries
        self._shards: dict[str, Array] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        """Image (H,W,3) and target (H,W), uint8 views of the file."""
        entry = self.entries[index]
        if entry.shard not in self._shards:
            mapped = np.memmap(self.folder / entry.shard, np.uint8, "r")
            self._shards[entry.shard] = np.asarray(mapped)  # whose slices cost less
        pixels = entry.height * entry.width
        data = self._shards[entry.shard][entry.offset : entry.offset + 4 * pixels]
        return (
            data[: 3 * pixels].reshape(entry.height, entry.width, 3),
            data[3 * pixels :].reshape(entry.height, entry.width),
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # a worker process maps the files itself


class Store:
    """What `prepare` left in a folder.

    Raises:
        InputError: the folder holds no index, or one of another version of this tool.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX
        if not path.is_file():
            raise InputError(f"{path} is missing; run `dvc repro prepare` first")
        self.folder = folder
        index: Index = json.loads(path.read_text(encoding="utf-8"))
        check_format(index, path, "run `dvc repro -f prepare`")
        self.name = index["name"]
        self.classes = tuple(index["classes"])
        self.palette = tuple(tuple(colour) for colour in index["palette"])
        self.ignore_index, self.exif = index["ignore_index"], index["exif"]
        self.content, self.fold = index["content"], index["fold"]
        self.pixels = index["pixels"]
        self.frequency = index["frequency"]
        self.shards = index["shards"]
        self._splits = index["splits"]

    def split(self, name: str) -> Split:
        """One of train, val and test; the last two may be empty."""
        return Split(self.folder, [Entry._make(values) for values in self._splits[name]])

    def by_name(self) -> dict[str, tuple[Split, int]]:
        """Where each image lies: its split, and its index there."""
        return {
            entry.name: (split, index)
            for split in map(self.split, self._splits)
            for index, entry in enumerate(split.entries)
        }

    @property
    def colours(self) -> dict[str, tuple[int, ...]]:
        """The colour of each class, red, green, blue, by its name."""
        return dict(zip(self.classes, self.palette, strict=True))

    def require(self, split: str, asked: str, remedy: str) -> None:
        """Raise an InputError where a split that a parameter asks for has no labelled image."""
        if not self._splits[split]:
            raise InputError(f"{asked}, but the data set has no labelled {split} image; {remedy}")

    def require_measured(self, split: str) -> None:
        """Raise an InputError where the split of evaluation.split has no labelled image."""
        other = "val" if split == "test" else "test"
        self.require(split, f"evaluation.split: {split}", f"use evaluation.split: {other}")

    @cached_property
    def md5(self) -> str:
        """The identity DVC gives the folder: md5 over the sorted list of its files' md5."""
        own = {name: file_md5(self.folder / name) for name in (INDEX, SUMMARY)}
        files = sorted((self.shards | own).items())
        listed = [{"md5": md5, "relpath": name} for name, md5 in files]
        return hashlib.md5(json.dumps(listed).encode()).hexdigest() + ".dir"


def spread(total: int, count: int) -> NDArray[np.intp]:
    """So many places among a total, or all if there are fewer, at equal distances."""
    return np.arange(min(total, count)) * total // min(total, count) if total else np.arange(0)


def write_index(folder: Path, index: Index) -> None:
    """Write index.json."""
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    write_text(folder / INDEX, text + "\n")
