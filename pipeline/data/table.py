"""The table of a data set's records: a row of numbers for each, and the bytes of their names.

Its two files are memory-mapped: opening a table costs a look at its rows, whatever it holds, and
the processes of a machine share it.
"""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.disk import file_md5, writing
from pipeline.errors import InputError

RECORDS, NAMES = TABLE = ("records.table", "names.txt")

Array = NDArray[np.uint8]
Rows = NDArray[np.void]  # (R,) of ROW

# Where the name of a record begins, with its bytes and those of its group, which follows; the
# number of its shard, and where it lies there; and a bit for each class, of those that its target
# holds, beginning with the highest of the first byte.
ROW = np.dtype(
    [
        ("name", "<u8"),
        ("name_size", "<u4"),
        ("group_size", "<u4"),
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("classes", "u1", 32),
    ]
)
LARGEST = 2**40  # pixels: more would have more bytes than 64 bits count


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

    @property
    def size(self) -> int:
        """The bytes of a record."""
        return 4 * self.height * self.width


class Entries(Sequence[Entry]):
    """Records in order: their rows, what holds their names, and the names of the shards.

    With a `folder` they are those of its table from row `first` on, and a process that they are
    sent to maps its files itself.
    """

    def __init__(
        self,
        rows: Rows,
        names: Array,
        shards: Sequence[str],
        *,
        folder: Path | None = None,
        first: int = 0,
    ) -> None:
        self.rows, self.names, self.shards = rows, names, shards
        self._folder, self._first = folder, first

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Self:
        """The same, as a table."""
        listed = list(entries)
        shards = list(dict.fromkeys(entry.shard for entry in listed))
        number = {name: place for place, name in enumerate(shards)}
        rows = np.zeros(len(listed), ROW)
        held = np.zeros((len(listed), 256), bool)
        names = bytearray()
        for place, entry in enumerate(listed):
            name, group = entry.name.encode(), entry.group.encode()
            said = (len(names), len(name), len(group))
            lies = (number[entry.shard], entry.offset, entry.height, entry.width)
            rows[place] = (*said, *lies, 0)
            held[place, list(entry.classes)] = True
            names += name + group
        rows["classes"] = np.packbits(held, axis=1)
        return cls(rows, np.frombuffer(bytes(names), np.uint8), shards)

    @classmethod
    def mapped(cls, folder: Path, shards: Sequence[str]) -> Self:
        """Those in a folder.

        Raises:
            ValueError: a file is empty, or no whole number of rows.
        """
        rows = np.asarray(np.memmap(folder / RECORDS, ROW, "r"))  # whose slices cost less
        names = np.asarray(np.memmap(folder / NAMES, np.uint8, "r"))
        return cls(rows, names, shards, folder=folder)

    def write(self, folder: Path) -> dict[str, str]:
        """Write them as a folder's table; returns the md5 of each of its two files."""
        with TableWriter(folder) as table:
            table.add(self)
        return table.md5s()

    def part(self, first: int, count: int) -> Self:
        """So many of them from one on."""
        rows, place = self.rows[first : first + count], self._first + first
        return type(self)(rows, self.names, self.shards, folder=self._folder, first=place)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        name, name_size, group_size, shard, offset, height, width, held = self.rows[index].item()
        group = name + name_size
        return Entry(
            self.names[name:group].tobytes().decode(),
            self.names[group : group + group_size].tobytes().decode(),
            shard=self.shards[shard],
            offset=offset,
            height=height,
            width=width,
            classes=tuple(np.flatnonzero(np.unpackbits(held)).tolist()),
        )

    def shard_of(self, index: int) -> str:
        """The name of the shard that one of them lies in."""
        return self.shards[int(self.rows["shard"][index])]

    def shard_sizes(self) -> list[int]:
        """How many of them lie in each shard, in order."""
        counts: list[int] = np.unique(self.rows["shard"], return_counts=True)[1].tolist()
        return counts

    def used_shards(self) -> list[str]:
        """The names of the shards that they lie in."""
        return [self.shards[number] for number in np.unique(self.rows["shard"])]

    def holding(self, label: int) -> NDArray[np.intp]:
        """The places of those whose target holds a class, (n,)."""
        byte, bit = divmod(label, 8)
        return np.flatnonzero(self.rows["classes"][:, byte] & (128 >> bit))

    def __reduce__(self) -> tuple[Any, ...]:
        if self._folder is None:
            return type(self), (self.rows, self.names, self.shards)
        return _mapped_again, (self._folder, self.shards, self._first, len(self))

    def check(self, num_classes: int) -> dict[str, int]:
        """The bytes of each shard, where these are all records of a data set, as `prepare` has it.

        Raises:
            InputError: what does not fit.
        """
        self._check_names()
        allowed = np.packbits(np.arange(256) < num_classes)
        if (self.rows["classes"] & ~allowed).any():
            raise InputError("an image has classes that don't exist")
        pixels = self.rows["height"].astype(np.float64) * self.rows["width"]
        if not ((pixels >= 1) & (pixels <= LARGEST)).all():
            raise InputError("an image has no pixel, or too many")
        shard = self.rows["shard"].astype(np.int64)
        first = np.flatnonzero(np.diff(shard, prepend=-1))
        if shard[first].tolist() != [*range(len(self.shards))]:
            raise InputError("its images are not in the order of the shards")
        sizes = 4 * pixels.astype(np.uint64)
        ends = np.cumsum(sizes)
        begins = ends - sizes
        lengths = np.diff(np.append(begins[first], ends[-1:]))
        in_shards = np.diff(np.append(first, len(shard)))
        if not np.array_equal(self.rows["offset"], begins - np.repeat(begins[first], in_shards)):
            raise InputError("an image is not where the one before it ends")
        return dict(zip(self.shards, lengths.tolist(), strict=True))

    def _check_names(self) -> None:
        sizes = self.rows["name_size"].astype(np.uint64) + self.rows["group_size"]
        ends = np.cumsum(sizes)
        total = int(ends[-1]) if len(ends) else 0
        if not np.array_equal(self.rows["name"], ends - sizes) or self.names.shape != (total,):
            raise InputError("the names of its images are not one after another")
        decoder = codecs.getincrementaldecoder("utf-8")()
        groups = self.rows["name"] + self.rows["name_size"]
        begins = np.concatenate([self.rows["name"], groups])
        try:
            for start in range(0, total, 2**24):
                decoder.decode(self.names[start : start + 2**24].tobytes())
            decoder.decode(b"", final=True)
            if (self.names[begins[begins < total]] & 0xC0 == 0x80).any():
                raise ValueError("a name begins in the middle of a letter")
        except ValueError:
            raise InputError("the names of its images are no UTF-8") from None


class TableWriter:
    """A folder's table, whose records come part by part; `shards` are those that there are."""

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / name for name in TABLE]
        self._files = [path.open("wb") for path in self._paths]
        self._names = 0  # bytes
        self.shards: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more comes."""
        for path, file in zip(self._paths, self._files, strict=True):
            with writing(path):
                file.close()

    def add(self, part: Entries) -> None:
        """Append records, which follow one another in a table; a shard may be in two parts."""
        if not part:
            return
        shards = part.used_shards()
        if shards[0] in self.shards[-1:]:
            self.shards.pop()
        begin, last = int(part.rows["name"][0]), part.rows[-1]
        end = int(last["name"]) + int(last["name_size"]) + int(last["group_size"])
        names = part.names[begin:end]
        rows = part.rows.copy()
        rows["name"] = rows["name"].astype(np.int64) + (self._names - begin)
        rows["shard"] = rows["shard"].astype(np.int64) + (len(self.shards) - int(rows["shard"][0]))
        for path, file, array in zip(self._paths, self._files, (rows, names), strict=True):
            with writing(path):
                file.write(array.data)
        self._names += len(names)
        self.shards += shards

    def md5s(self) -> dict[str, str]:
        """Of the two files, once they are closed."""
        return {path.name: file_md5(path) for path in self._paths}


def _mapped_again(folder: Path, shards: Sequence[str], first: int, count: int) -> Entries:
    return Entries.mapped(folder, shards).part(first, count)
