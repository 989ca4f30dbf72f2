"""Read every file once, judge it and pack it. What is wrong with a data set is said all at once."""

import hashlib
import json
import os
import pickle
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, combinations
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple, Self

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.files import Ids, some
from pipeline.data.formats import Reader, Record
from pipeline.data.params import DataParams
from pipeline.data.shards import ObjectStore, Shards, shards_of
from pipeline.data.splits import SPLITS
from pipeline.data.store import SUMMARY, Index, Split, spread, write_index
from pipeline.data.table import Array, Entries, Entry, TableWriter
from pipeline.disk import FORMAT, write_bytes, write_json, writing
from pipeline.errors import InputError, counted, shown
from pipeline.params import plain

RECORDS_PER_SHARD = 128

# A perceptual hash has SIDE^2 bits. Saved again as JPEG, at half the size, or without its outermost
# percent, an image differs from itself in 0 to 30 of them; two of one scene in 70 and more.
SIDE, ALIKE = 16, 32
# The lowest frequencies of the cosine transform (DCT-II) of four times as many samples.
LOWEST = np.cos(np.pi / (4 * SIDE) * np.outer(np.arange(SIDE), np.arange(4 * SIDE) + 0.5))


# What is compared of records, a row for each: hashes of the name and of the pixels of image and
# target, which others share seldom; and the perceptual hash of the image, which is alike where
# images are.
MARKS = np.dtype(
    [("name", "<u8"), ("image", "<u8"), ("target", "<u8"), ("look", "<u8", SIDE**2 // 64)]
)
Marks = NDArray[np.void]  # (R,) of MARKS
Job = tuple[str, list[Record]]  # a shard's name and records
CHUNK = 2**14  # perceptual hashes that are compared at once, and fit into a cache


@dataclass
class Shard:
    """What the packing of one shard found.

    `ids` are those of its targets' files, before they become classes. `histogram` counts the pixels
    of each id, `shown` the labelled ones of the images that show it. `content` is what the
    records add to the identity of the data set.
    """

    name: str
    split: str
    md5: str
    size: int
    entries: Entries
    marks: Marks
    ids: set[int]
    problems: list[str]
    histogram: NDArray[np.int64]
    shown: NDArray[np.int64]
    content: int


class Audit:
    """What the shards hold together, split by split in the order of SPLITS.

    The rows and marks of the records lie in the folder `draft`: memory may not hold them all.
    """

    def __init__(self, folder: Path, draft: Path, store: str | None) -> None:
        self.folder, self._draft, self._store = folder, draft, store
        self._table = TableWriter(draft)
        self._marks = (draft / "marks").open("wb")
        self.counts = dict.fromkeys(SPLITS, 0)
        self.histograms = {split: np.zeros(256, np.int64) for split in SPLITS}
        self.shown = {split: np.zeros(256, np.int64) for split in SPLITS}
        self.files: dict[str, tuple[str, int]] = {}  # md5 and bytes of each shard
        self.ids: set[int] = set()
        self.problems: list[str] = []
        self.content = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self._marks.close()

    def add(self, shard: Shard) -> None:
        """Take the next shard in."""
        self._table.add(shard.entries)
        with writing(Path(self._marks.name)):
            self._marks.write(shard.marks.data)
        self.counts[shard.split] += len(shard.entries)
        self.histograms[shard.split] += shard.histogram
        self.shown[shard.split] += shard.shown
        self.files[shard.name] = shard.md5, shard.size
        self.ids |= shard.ids
        self.problems += shard.problems
        self.content = (self.content + shard.content) % 2**128

    @property
    def places(self) -> dict[str, slice]:
        """Where the records of each split are among all."""
        ends = accumulate(self.counts.values())
        return {
            split: slice(end - count, end)
            for (split, count), end in zip(self.counts.items(), ends, strict=True)
        }

    @property
    def shards(self) -> Shards:
        """What has the pixels, once all shards are there."""
        return shards_of(self.folder, self._store, self.files)

    @cached_property
    def entries(self) -> Entries:
        """Those of all records, once all shards are there."""
        if not sum(self.counts.values()):
            return Entries.of(())
        return Entries.mapped(self._draft, self._table.shards)

    @cached_property
    def marks(self) -> Marks:
        """Those of all records, once all shards are there."""
        if not sum(self.counts.values()):
            return np.empty(0, MARKS)
        return np.memmap(self._draft / "marks", MARKS, "r")

    def histogram(self, split: str, num_classes: int) -> NDArray[np.int64]:
        """Pixels of each class, and after them the ignored ones: (C+1,)."""
        total = self.histograms[split]
        return np.append(total[:num_classes], total[num_classes:].sum())


Pack = Callable[[str, list[Record]], Shard]


class Part(NamedTuple):
    """Which machine this is of `machines` that prepare a data set together, and see one folder.

    `attempt` is what they call it, and no other one.
    """

    number: int = 0
    machines: int = 1
    attempt: str = "alone"


def prepare(
    params: DataParams,
    folder: Path,
    progress: Callable[[int, int], None],
    part: Part = Part(),  # noqa: B008  # it can't be changed
) -> list[str] | None:
    """Audit the data set and write its shards, their table and index into `folder`.

    Returns what one should look at and may be right, a line each; summary.json has it, too. None
    on all machines but the first of several.

    The index also holds each class's frequency in train: its share of the labelled pixels of the
    images that show it.

    `progress(done, total)` is called with the number of records.

    Raises:
        InputError: the audit's findings, all of them, a line each; no index is written then.
    """
    reader = params.reader()
    records, problems = reader.records()
    jobs = _jobs(records, params.subset)
    draft = folder / f"audit-{part.attempt}"
    pack = partial(_pack, reader, folder, params)
    if part.number:
        _help(pack, jobs, draft, part)
        return None
    total = sum(len(batch) for _, batch in jobs)
    if folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            error.filename = str(folder)  # it has a name without its folder
            raise
    draft.mkdir(parents=True)
    with ExitStack() as ending:
        ending.callback(shutil.rmtree, draft, ignore_errors=True)
        with Audit(folder, draft, params.store) as audit:
            for shard in _all_packed(pack, jobs, draft, part):
                audit.add(shard)
                progress(sum(audit.counts.values()), total)
        problems += audit.problems + _twice(audit) + _shared_images(audit)
        histograms = {split: audit.histogram(split, len(params.classes)) for split in SPLITS}
        labelled = [split for split in SPLITS if histograms[split][:-1].any()]
        if not problems:  # else an empty split only follows from them
            problems += _empty(params, labelled, histograms["train"])
            if problems:
                problems += _black_and_white(params, audit.ids)
        if not problems:
            return _write_index(params, audit, labelled)
    for name in audit.files:
        (folder / name).unlink(missing_ok=True)  # an object store may have it
    lines = "\n".join(f"  {shown(problem)}" for problem in problems)
    count = counted(len(problems), "problem")
    raise InputError(f"{params.root}: {count} in the data set:\n{lines}")


def _jobs(records: list[Record], subset: int | None) -> list[Job]:
    """The shards by name, with the records of each."""
    jobs = []
    for split in SPLITS:
        own = [record for record in records if record.split == split]
        own = [own[place] for place in spread(len(own), subset or len(own))]
        for start in range(0, len(own), RECORDS_PER_SHARD):
            batch = own[start : start + RECORDS_PER_SHARD]
            jobs.append((f"{split}-{start // RECORDS_PER_SHARD:05}.bin", batch))
    return jobs


def _help(pack: Pack, jobs: list[Job], draft: Path, part: Part) -> None:
    """Pack what another machine than the first has to, and leave there what was found."""
    _wait_for(draft)
    for shard in _packed(pack, jobs[part.number :: part.machines]):
        write_bytes(draft / shard.name, pickle.dumps(shard))


def _all_packed(pack: Pack, jobs: list[Job], draft: Path, part: Part) -> Iterator[Shard]:
    """The shards in order, which this machine and the others pack."""
    own = _packed(pack, jobs[:: part.machines])
    for place, (name, _) in enumerate(jobs):
        if place % part.machines == 0:
            yield next(own)
        else:
            _wait_for(draft / name)
            yield pickle.loads((draft / name).read_bytes())
            (draft / name).unlink()


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.1)


def _packed(pack: Pack, jobs: list[Job]) -> Iterator[Shard]:
    """The shards in order, which processes pack, one for each core that is ours."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = get_context("spawn")  # a fork copies OpenCV's threads in the middle of their work
    with ProcessPoolExecutor(ours, context) as pool:
        try:
            yield from pool.map(pack, *zip(*jobs, strict=True)) if jobs else ()
        except BaseException:  # else what is being packed, a minute of it, would be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def _pack(
    reader: Reader[Any], folder: Path, params: DataParams, name: str, records: list[Record]
) -> Shard:
    """Read, judge and write the records of one shard. Runs in a worker process."""
    cv2.setNumThreads(1)
    entries, marks = [], []
    ids: set[int] = set()
    problems = []
    total, labelled = np.zeros(256, np.int64), np.zeros(256, np.int64)
    digest = hashlib.md5()
    offset = content = 0
    table = _packing(params)
    with (folder / name).open("wb") as file:
        for record in records:
            try:
                image, raw = reader.read(record)
                counts = id_counts(raw)
                _judge(record, image, raw.shape, counts=counts, params=params)
            except InputError as error:
                problems.append(str(error))
                continue
            ids.update(np.flatnonzero(counts).tolist())
            target = cv2.LUT(raw.astype(np.uint8, copy=False), table)
            height, width = target.shape
            histogram = np.zeros(256, np.int64)
            np.add.at(histogram, table[: len(counts)], counts)
            classes = tuple(np.flatnonzero(histogram[: len(params.classes)]).tolist())
            entry = Entry(
                record.name,
                params.format.group(record.name),
                shard=name,
                offset=offset,
                height=height,
                width=width,
                classes=classes,
            )
            entries.append(entry)
            sums = _pixel_sum(image), _pixel_sum(np.asarray(target, np.uint8))
            marks.append((_hash(record.name), *sums, _look(image)))
            content += _number(json.dumps([record.name, *sums]))
            total += histogram
            labelled += (histogram > 0) * histogram[: len(params.classes)].sum()
            for part in (np.ascontiguousarray(image), target):  # a tile may be a view
                digest.update(part.data)
                offset += file.write(part.data)
    if params.store is not None and offset:
        ObjectStore(params.store).put(folder / name, digest.hexdigest())
        (folder / name).unlink()
    return Shard(
        name,
        records[0].split,
        md5=digest.hexdigest(),
        size=offset,
        entries=Entries.of(entries),
        marks=np.array(marks, MARKS),
        ids=ids,
        problems=problems,
        histogram=total,
        shown=labelled,
        content=content,
    )


def _number(text: str) -> int:
    """The md5 of a text, 128 bits."""
    return int.from_bytes(hashlib.md5(text.encode()).digest())


def _hash(name: str) -> int:
    return _number(name) % 2**64


def id_counts(ids: Ids) -> NDArray[np.int64]:
    """The pixels of each id, from 0 to the highest that there is: (H,W) -> (K,)."""
    if ids.dtype == np.uint8 and ids.size <= 2**24:  # OpenCV is faster, but counts in fp32
        counts = cv2.calcHist([ids], [0], None, [256], [0, 256])
        return np.trim_zeros(counts.ravel(), "b").astype(np.int64)
    return np.bincount(ids.ravel())


def _pixel_sum(image: Array) -> int:
    """The sum of the pixels, eight bytes a number, modulo 2^64, without the last few bytes.

    A hundred times cheaper than a hash, which only images of equal sums need.
    """
    pixels = image.ravel()
    return int(pixels[: len(pixels) // 8 * 8].view(np.uint64).sum())


def _look(image: Array) -> Array:
    """The perceptual hash of an image: which low frequencies are above their median.

    SIDE^2 bits, as uint64.

    Source: https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html (pHash)
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (4 * SIDE, 4 * SIDE), interpolation=cv2.INTER_AREA)
    frequencies = LOWEST @ small @ LOWEST.T
    return np.packbits(frequencies > np.median(frequencies)).view(np.uint64)


def _judge(
    record: Record,
    image: Array,
    size: tuple[int, ...],
    *,
    counts: NDArray[np.int64],
    params: DataParams,
) -> None:
    """An InputError where an image can't be used with a target of so many pixels of each id."""
    if image.shape[:2] != size:
        (height, width), (rows, columns) = image.shape[:2], size
        raise InputError(
            f"{record.image}: {width}x{height} pixels, but its target {record.target} has "
            f"{columns}x{rows}"
        )
    found = np.flatnonzero(counts).tolist()
    bad = [one for one in found if one >= params.num_ids and one != params.ignore_index]
    if bad:
        zero = ", and one for reduce_zero_label" if params.reduce_zero_label else ""
        raise InputError(
            f"{record.target}: class ids {some(bad)} are neither below {params.num_ids} (the "
            f"number of data.classes{zero}) nor data.ignore_index {params.ignore_index}"
        )


def _packing(params: DataParams) -> Array:
    """(256,): ids as in the files -> classes and ignore_index."""
    table = np.arange(256)
    if params.reduce_zero_label:
        table -= 1
        table[[0, params.ignore_index]] = params.ignore_index
    return table.astype(np.uint8)


def _alike_in(columns: Sequence[NDArray[Any]]) -> list[NDArray[np.intp]]:
    """The places of rows that are equal in all columns, each time there are several; in order."""
    order = np.lexsort(columns)
    begins = np.zeros(len(order), bool)
    begins[:1] = True
    for column in columns:
        values = column[order]
        begins[1:] |= values[1:] != values[:-1]
    starts = np.flatnonzero(begins)
    sizes = np.diff(starts, append=len(order))
    several = sizes > 1
    groups = [
        order[start : start + size]
        for start, size in zip(starts[several], sizes[several], strict=True)
    ]
    return sorted(groups, key=lambda group: int(group[0]))


def _twice(audit: Audit) -> list[str]:
    """Images of one name."""
    problems = []
    for places in _alike_in([audit.marks["name"]]):
        times = Counter(audit.entries[place].name for place in places)
        problems += [f"image {name!r} is there twice" for name in times if times[name] > 1]
    return problems


def _shared_images(audit: Audit) -> list[str]:
    """Images that are the same, pixel for pixel, in more than one split."""
    rows = audit.entries.rows
    images = Split(audit.shards, audit.entries)
    ends = [*accumulate(audit.counts.values())]
    problems = []
    for found in _alike_in([rows["width"], rows["height"], audit.marks["image"]]):
        of = [SPLITS[number] for number in np.searchsorted(ends, found, "right")]
        if len({*of}) == 1:
            continue
        names: defaultdict[bytes, dict[str, str]] = defaultdict(dict)
        for split, place in zip(of, found, strict=True):
            image, _ = images[place]
            names[hashlib.sha256(image.data).digest()].setdefault(split, audit.entries[place].name)
        problems += [
            "the same image in " + " and ".join(f"{split} ({name})" for split, name in same.items())
            for same in names.values()
            if len(same) > 1
        ]
    return problems


def _alike(audit: Audit, splits: Sequence[str]) -> list[str]:
    """The images that are nearly one of another split, the most alike first."""
    looks = audit.marks["look"]
    found = []
    for one, other in combinations(splits, 2):
        first, second = audit.places[one], audit.places[other]
        distances = np.full(second.stop - second.start, SIDE**2)
        nearest = np.zeros(len(distances), np.intp)
        for start in range(first.start, first.stop, CHUNK):
            chunk = looks[start : min(start + CHUNK, first.stop)].T.copy()
            for place, look in enumerate(looks[second]):
                bits = np.bitwise_count(chunk ^ look[:, None]).sum(axis=0, dtype=np.uint16)
                best = bits.argmin()
                if bits[best] < distances[place]:
                    distances[place], nearest[place] = bits[best], start + best
        for index in np.flatnonzero(distances <= ALIKE):
            like, own = audit.entries[nearest[index]], audit.entries[second.start + index]
            pair = f"{one} ({like.name}) and {other} ({own.name})"
            found.append((int(distances[index]), pair))
    return [
        f"nearly the same image in {pair}: {distance} of the {SIDE**2} bits of their perceptual "
        "hashes differ"
        for distance, pair in sorted(found)
    ]


def _empty(params: DataParams, labelled: list[str], train: NDArray[np.int64]) -> list[str]:
    """Splits with nothing to learn or measure, and classes that train can't teach."""
    empty = [split for split in SPLITS if split in params.format.needed and split not in labelled]
    problems = [f"split {split} has no labelled pixel" for split in empty]
    if not empty and labelled == ["train"]:
        problems.append("neither val nor test has a labelled pixel; one of them must")
    if "train" in labelled:
        problems += [
            f"class {name!r} has no pixel in train; take it out of data.classes, label it, or set "
            "data.allow_missing_classes"
            for name, count in zip(params.classes, train[:-1], strict=True)
            if not count and not params.allow_missing_classes
        ]
    return problems


def _black_and_white(params: DataParams, ids: set[int]) -> list[str]:
    """What to do with masks of 0 and 255, the commonest kind, where 255 is to be ignored."""
    if ids != {0, 255} or params.ignore_index != 255 or params.num_ids != 2:
        return []
    return [
        "the targets hold the ids 0 and 255 alone, and 255 is data.ignore_index: no pixel of it is "
        f"learned. If white is {params.classes[-1]!r}, set data.format.color_map: "
        "[[0, 0, 0], [255, 255, 255]]"
    ]


def _content(params: DataParams, audit: Audit) -> str:
    """The identity of the data set, which does not depend on the fold that is val."""
    told = plain(params)
    told["format"].get("splits", {}).pop("fold", None)
    told = {name: value for name, value in told.items() if name not in ("name", "root", "store")}
    return hashlib.md5(json.dumps([told, audit.content]).encode()).hexdigest()


def _write_index(params: DataParams, audit: Audit, labelled: Sequence[str]) -> list[str]:
    """Write the table and index.json, and summary.json for people; returns its warnings.

    A split without any label goes: a test whose labels are withheld.
    """
    folder, classes = audit.folder, params.classes
    places = {split: audit.places[split] for split in labelled}
    with TableWriter(folder) as table:
        for place in places.values():
            for start in range(place.start, place.stop, CHUNK):
                table.add(audit.entries.part(start, min(CHUNK, place.stop - start)))
    for name in audit.files.keys() - {*table.shards}:
        (folder / name).unlink(missing_ok=True)
    warnings = [shown(line) for line in _alike(audit, labelled)]
    histograms = {
        split: audit.histogram(split, len(classes)) * (split in labelled) for split in SPLITS
    }
    counts = {split: audit.counts[split] * (split in labelled) for split in SPLITS}
    summary = {
        split: {
            "images": counts[split],
            "pixels": dict(zip(classes, histograms[split][:-1].tolist(), strict=True)),
            "ignored_pixels": int(histograms[split][-1]),
        }
        for split in SPLITS
    }
    told = {"name": params.name, "splits": summary, "warnings": warnings}
    write_json(folder / SUMMARY, told)
    frequency = histograms["train"][:-1] / audit.shown["train"][: len(classes)].clip(min=1)
    index = Index(
        format=FORMAT,
        name=params.name,
        classes=classes,
        palette=params.palette,
        ignore_index=params.ignore_index,
        exif=params.exif,
        content=_content(params, audit),
        fold=params.format.fold,
        pixels=histograms["train"][:-1].tolist(),
        frequency=frequency.tolist(),
        shards={name: audit.files[name][0] for name in table.shards},
        table=table.md5s(),
        splits=counts,
        store=params.store,
    )
    write_index(folder, index)
    return warnings
