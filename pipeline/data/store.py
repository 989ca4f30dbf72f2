"""The prepared data set: packed uint8 shards, the table of their records, and index.json.

A shard is the bytes of its records, one after another: image (H,W,3) RGB, then target (H,W). It is
memory-mapped in training. The index has the md5 of shards and table, so that the folder's own
identity (the one DVC writes into dvc.lock) costs the md5 of one small file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from threading import Thread
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.data.shards import CACHE_GB, CachedShards, LocalShards, Shards, shards_of
from pipeline.data.table import RECORDS, TABLE, Array, Entries, Entry
from pipeline.disk import amount, check_format, file_md5, write_text
from pipeline.errors import InputError, counted, one_line
from pipeline.params import Colour, Grey

PREPARED = Path("data/prepared")
INDEX = "index.json"
SUMMARY = "summary.json"

REBUILD = "run `dvc repro -f prepare`"

Natural = Annotated[int, Field(ge=0)]


class Index(BaseModel):
    """The content of index.json, which ends with the md5 of all before it.

    `content` is the identity of the data set, whichever fold is val, and `fold` which one is, if
    there are folds; `exif` is data.exif. `pixels` and `frequency` are those of each class in train,
    see `audit.prepare`. `shards` and `table` hold the md5 of each file; the rows of the table are
    those of train, of val and of test, as many as `splits` has. `store` is the URL of the object
    store that has the shards; None: they are in the folder.
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
    table: dict[str, str]
    splits: dict[str, Natural]
    store: str | None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        lengths = {len(self.classes), len(self.palette), len(self.pixels), len(self.frequency)}
        if len(lengths) > 1 or self.ignore_index < len(self.classes):
            raise InputError("what it holds of its classes doesn't fit together")
        if self.splits.keys() != {"train", "val", "test"}:
            raise InputError("it must have the splits train, val and test")
        if self.table.keys() != {*TABLE}:
            raise InputError(f"its table must be {' and '.join(TABLE)}")
        return self


class Split:
    """The records of one split, in order, read from the shards."""

    def __init__(self, shards: Path | Shards, entries: Sequence[Entry]) -> None:
        self.shards = LocalShards(shards) if isinstance(shards, Path) else shards
        self.entries = entries if isinstance(entries, Entries) else Entries.of(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        """Image (H,W,3) and target (H,W), uint8 views of the file."""
        entry = self.entries[index]
        pixels = entry.height * entry.width
        data = self.shards.open(entry.shard)[entry.offset : entry.offset + entry.size]
        return (
            data[: 3 * pixels].reshape(entry.height, entry.width, 3),
            data[3 * pixels :].reshape(entry.height, entry.width),
        )

    def expect(self, index: int) -> None:
        """Say that a record will be read soon."""
        self.shards.expect(self.entries.shard_of(index))


class Store:
    """What `prepare` left in a folder.

    Raises:
        InputError: the folder holds no index, one of another version of this tool, or one that is
            not as `prepare` wrote it; or a shard is missing or has another length.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder / INDEX)
        entries, sizes = _read_table(folder, index)
        files = {name: (md5, sizes[name]) for name, md5 in index.shards.items()}
        self._shards = shards_of(folder, index.store, files)
        if self.is_local:
            _check_sizes(folder, sizes)
        self.name = index.name
        self.classes, self.palette = index.classes, index.palette
        self.ignore_index, self.exif = index.ignore_index, index.exif
        self.content, self.fold = index.content, index.fold
        self.pixels = index.pixels
        self.frequency = index.frequency
        self.shards = index.shards
        self._table = index.table
        counts = index.splits.values()
        firsts = accumulate(counts, initial=0)
        self._splits = dict(zip(index.splits, map(entries.part, firsts, counts)))

    def split(self, name: str) -> Split:
        """One of train, val and test; the last two may be empty."""
        return Split(self._shards, self._splits[name])

    def verification(
        self, *splits: str, alive: Callable[[], None] = lambda: None
    ) -> "Verification":
        """Begin to compare the bytes of these splits' shards with the index.

        Of an object store they are those that the cache has; it loses one that has changed.
        """
        if isinstance(self._shards, CachedShards):
            return Verification(self._shards.cached() if splits else {}, alive, mend=Path.unlink)
        names = chain.from_iterable(self._splits[split].used_shards() for split in splits)
        return Verification({self.folder / name: self.shards[name] for name in names}, alive)

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

    def require_room(self, split: str, count: int | None, asked: str, remedy: str) -> None:
        """Raise an InputError where an object store's cache can't hold so many shards of a split.

        `asked` is what needs them, all where `count` is None.
        """
        if isinstance(self._shards, CachedShards):
            sizes = sorted(map(self._shards.size, self._splits[split].used_shards()), reverse=True)
            if (needed := sum(sizes[:count])) > self._shards.limit:
                raise InputError(
                    f"{asked} needs {amount(needed)} of {split} at a time, and {CACHE_GB} allows "
                    f"{amount(self._shards.limit)}; raise it{remedy}"
                )

    @property
    def is_local(self) -> bool:
        """Whether the shards are in the folder."""
        return isinstance(self._shards, LocalShards)

    def require_measured(self, split: str) -> None:
        """Raise an InputError where the split of evaluation.split has no labelled image."""
        other = "val" if split == "test" else "test"
        self.require(split, f"evaluation.split: {split}", f"use evaluation.split: {other}")

    @cached_property
    def md5(self) -> str:
        """The identity DVC gives the folder: md5 over the sorted list of its files' md5."""
        own = {name: file_md5(self.folder / name) for name in (INDEX, SUMMARY)}
        there = self.shards if self.is_local else {}
        files = sorted((there | self._table | own).items())
        listed = [{"md5": md5, "relpath": name} for name, md5 in files]
        return hashlib.md5(json.dumps(listed).encode()).hexdigest() + ".dir"


class Verification:
    """Files are read and compared with their md5, in threads, while the caller does other work.

    `mend` is called with a file that has another md5, and is else a problem.
    """

    def __init__(
        self,
        md5s: dict[Path, str],
        alive: Callable[[], None],
        mend: Callable[[Path], None] | None = None,
    ) -> None:
        self._alive, self._mend = alive, mend
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
            if found != expected and self._mend is not None:
                self._mend(path)
            elif found != expected:
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


def _read_table(folder: Path, index: Index) -> tuple[Entries, dict[str, int]]:
    """The records of a data set, and the bytes that each shard must have, see `Store`."""
    for name, md5 in index.table.items():
        if not (path := folder / name).is_file():
            raise InputError(f"{path} is missing; {REBUILD}")
        if (found := file_md5(path)) != md5:
            raise _damaged(path, f"md5 {found} instead of {md5}")
    try:
        entries = Entries.mapped(folder, [*index.shards])
        sizes = entries.check(len(index.classes))
    except ValueError as error:  # an InputError, too
        raise _damaged(folder / RECORDS, one_line(error)) from None
    if len(entries) != sum(index.splits.values()):
        raise _damaged(folder / RECORDS, f"{len(entries)} rows instead of those of {INDEX}")
    return entries, sizes


def _check_sizes(folder: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing; {REBUILD}")
        if path.stat().st_size != size:
            raise _damaged(path, f"{path.stat().st_size} bytes instead of {size}")


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not as `prepare` wrote it: {reason}; {REBUILD}")
