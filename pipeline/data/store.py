"""The prepared data set: packed uint8 shards, memory-mapped in training, beside one index.json.

A shard is the bytes of its records, one after another: image (H,W,3) RGB, then target (H,W). The
index holds where each record lies and the md5 of each shard, so that the folder's own identity (the
one DVC writes into dvc.lock) costs the md5 of one small file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.disk import check_format, file_md5, write_text
from pipeline.errors import InputError, counted
from pipeline.params import Colour, Grey, Positive

PREPARED = Path("data/prepared")
INDEX = "index.json"
SUMMARY = "summary.json"

REBUILD = "run `dvc repro -f prepare`"

Array = NDArray[np.uint8]
Natural = Annotated[int, Field(ge=0)]


class Entry(NamedTuple):
    """Where a record lies: byte `offset` in `shard`, an image of `height` x `width` pixels.

    Images of one `group` are no independent ones. `classes` are those that the target holds.
    """

    name: str
    group: str
    shard: str
    offset: Natural
    height: Positive
    width: Positive
    classes: Sequence[int] = ()

    @property
    def size(self) -> int:
        """The bytes of a record."""
        return 4 * self.height * self.width


class Index(BaseModel):
    """The content of index.json, which ends with the md5 of all before it.

    `content` is the identity of the data set, whichever fold is val, and `fold` which one is, if
    there are folds; `exif` is data.exif. `pixels` and `frequency` are those of each class in train,
    see `audit.prepare`; `shards` holds the md5 of each shard, `splits` the entries of each split,
    as lists of their values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: int
    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    ignore_index: Grey
    exif: Literal["apply", "ignore"]
    content: str
    fold: int | None
    pixels: list[Natural]
    frequency: list[float]
    shards: dict[Annotated[str, Field(pattern=r"^[a-z]+-\d+\.bin$")], str]
    splits: dict[str, list[Entry]]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        lengths = {len(self.classes), len(self.palette), len(self.pixels), len(self.frequency)}
        if len(lengths) > 1 or self.ignore_index < len(self.classes):
            raise InputError("what it holds of its classes doesn't fit together")
        if self.splits.keys() != {"train", "val", "test"}:
            raise InputError("it must have the splits train, val and test")
        ends = dict.fromkeys(self.shards, 0)
        names = set()
        for entry in chain(*self.splits.values()):
            if entry.name in names:
                raise InputError(f"image {entry.name!r} is there twice")
            if not all(0 <= one < len(self.classes) for one in entry.classes):
                raise InputError(f"image {entry.name!r} has classes that don't exist")
            if ends.get(entry.shard) != entry.offset:
                raise InputError(f"image {entry.name!r} is not where the one before it ends")
            names.add(entry.name)
            ends[entry.shard] += entry.size
        return self

    def sizes(self) -> dict[str, int]:
        """The bytes of each shard."""
        entries = chain(*self.splits.values())
        ends = {entry.shard: entry.offset + entry.size for entry in entries}
        return dict.fromkeys(self.shards, 0) | ends


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
        data = self._shards[entry.shard][entry.offset : entry.offset + entry.size]
        return (
            data[: 3 * pixels].reshape(entry.height, entry.width, 3),
            data[3 * pixels :].reshape(entry.height, entry.width),
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # a worker process maps the files itself


class Store:
    """What `prepare` left in a folder.

    Raises:
        InputError: the folder holds no index, one of another version of this tool, or one that is
            not as `prepare` wrote it; or a shard is missing or has another length.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder / INDEX)
        for name, size in index.sizes().items():
            path = folder / name
            if not path.is_file():
                raise InputError(f"{path} is missing; {REBUILD}")
            if path.stat().st_size != size:
                raise _damaged(path, f"{path.stat().st_size} bytes instead of {size}")
        self.name = index.name
        self.classes, self.palette = index.classes, index.palette
        self.ignore_index, self.exif = index.ignore_index, index.exif
        self.content, self.fold = index.content, index.fold
        self.pixels = index.pixels
        self.frequency = index.frequency
        self.shards = index.shards
        self._splits = index.splits

    def split(self, name: str) -> Split:
        """One of train, val and test; the last two may be empty."""
        return Split(self.folder, self._splits[name])

    def verification(
        self, *splits: str, alive: Callable[[], None] = lambda: None
    ) -> "Verification":
        """Begin to compare the bytes of these splits' shards with the index."""
        names = {entry.shard for split in splits for entry in self._splits[split]}
        return Verification(
            {self.folder / name: self.shards[name] for name in sorted(names)}, alive
        )

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


class Verification:
    """Files are read and compared with their md5, in threads, while the caller does other work."""

    def __init__(self, md5s: dict[Path, str], alive: Callable[[], None]) -> None:
        self._alive = alive
        self._problems: dict[Path, str] = {}
        files, count = list(md5s.items()), min(len(md5s), os.cpu_count() or 1)
        self._threads = [
            Thread(target=self._compare, args=(files[start::count],), daemon=True)
            for start in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _compare(self, files: Sequence[tuple[Path, str]]) -> None:
        for path, expected in files:
            try:
                found = file_md5(path)
            except OSError as error:
                self._problems[path] = str(error)
                continue
            if found != expected:
                self._problems[path] = f"md5 {found} instead of {expected}"
            self._alive()

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            InputError: a file is not as it was written; names the first, and the remedy.
        """
        for thread in self._threads:
            thread.join()
        if self._problems:
            path = min(self._problems)
            more = f", and {counted(len(self._problems) - 1, 'other')}"
            raise _damaged(path, self._problems[path] + more * (len(self._problems) > 1))


def spread(total: int, count: int) -> NDArray[np.intp]:
    """So many places among a total, or all if there are fewer, at equal distances."""
    return np.arange(min(total, count)) * total // min(total, count) if total else np.arange(0)


SEAL = ',"md5":"{}"}}\n'  # the end of index.json


def write_index(folder: Path, index: Index) -> None:
    """Write index.json."""
    text = json.dumps(index.model_dump(), ensure_ascii=False, separators=(",", ":"))[:-1]
    seal = SEAL.format(hashlib.md5(text.encode()).hexdigest())
    write_text(folder / INDEX, text + seal)


def _read_index(path: Path) -> Index:
    """Read index.json, see `Store`."""
    if not path.is_file():
        raise InputError(f"{path} is missing; run `dvc repro prepare` first")
    content = path.read_bytes()
    length = len(SEAL.format("0" * 32))
    text, seal = content[:-length], content[-length:]
    reason = "its content doesn't have the md5 that it ends with"
    if seal == SEAL.format(hashlib.md5(text).hexdigest()).encode():
        try:
            index = Index.model_validate_json(text + b"}")
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        else:
            check_format({"format": index.format}, path, REBUILD)
            return index
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it can't be read as JSON ({error})") from None
    check_format(found if isinstance(found, dict) else {}, path, REBUILD)  # the likelier reason
    raise _damaged(path, reason)


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not as `prepare` wrote it: {reason}; {REBUILD}")
