"""Read every file once, judge it and pack it. What is wrong with a data set is said all at once."""

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, combinations
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.files import Ids, some
from pipeline.data.formats import Reader, Record
from pipeline.data.params import DataParams
from pipeline.data.splits import SPLITS
from pipeline.data.store import SUMMARY, Index, Split, spread, write_index
from pipeline.data.table import Array, Entries, Entry
from pipeline.disk import FORMAT, write_json
from pipeline.errors import InputError, counted, shown
from pipeline.params import plain

RECORDS_PER_SHARD = 128

# A perceptual hash has SIDE^2 bits. Saved again as JPEG, at half the size, or without its outermost
# percent, an image differs from itself in 0 to 30 of them; two of one scene in 70 and more.
SIDE, ALIKE = 16, 32
# The lowest frequencies of the cosine transform (DCT-II) of four times as many samples.
LOWEST = np.cos(np.pi / (4 * SIDE) * np.outer(np.arange(SIDE), np.arange(4 * SIDE) + 0.5))


@dataclass
class Shard:
    """What the packing of one shard found.

    `ids` are those of its targets' files, before they become classes. `sums` and `target_sums` are
    those of each entry's pixels, which equal images have in common and others seldom; `looks` are
    perceptual hashes of the images, which are alike where these are.
    `histogram` counts the pixels of each id, `shown` the labelled ones of the images that show it.
    """

    name: str
    split: str
    md5: str
    entries: list[Entry] = field(default_factory=list)
    ids: set[int] = field(default_factory=set)
    sums: list[int] = field(default_factory=list)
    target_sums: list[int] = field(default_factory=list)
    looks: list[bytes] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    shown: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))


def prepare(params: DataParams, folder: Path, progress: Callable[[int, int], None]) -> list[str]:
    """Audit the data set and write its shards, their table and index into `folder`.

    Returns what one should look at and may be right, a line each; summary.json has it, too.

    The index also holds each class's frequency in train: its share of the labelled pixels of the
    images that show it.

    `progress(done, total)` is called with the number of records.

    Raises:
        InputError: the audit's findings, all of them, a line each; no index is written then.
    """
    reader = params.reader()
    records, problems = reader.records()
    if folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            error.filename = str(folder)  # it has a name without its folder
            raise
    folder.mkdir(parents=True)
    jobs, total = [], 0
    for split in SPLITS:
        own = [record for record in records if record.split == split]
        own = [own[place] for place in spread(len(own), params.subset or len(own))]
        total += len(own)
        for start in range(0, len(own), RECORDS_PER_SHARD):
            batch = own[start : start + RECORDS_PER_SHARD]
            jobs.append((f"{split}-{start // RECORDS_PER_SHARD:05}.bin", batch))
    pack = partial(_pack, reader, folder, params)
    shards = []
    context = get_context("spawn")  # a fork copies OpenCV's threads in the middle of their work
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        try:
            for shard in pool.map(pack, *zip(*jobs, strict=True)) if jobs else ():
                shards.append(shard)
                progress(sum(len(one.entries) for one in shards), total)
        except BaseException:  # else what is being packed, a minute of it, would be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise

    problems += [problem for shard in shards for problem in shard.problems]
    problems += _shared_images(folder, shards)
    histograms = {split: _histogram(shards, split, len(params.classes)) for split in SPLITS}
    labelled = [split for split in SPLITS if histograms[split][:-1].any()]
    if not problems:  # else an empty split only follows from them
        problems += _empty(params, labelled, histograms["train"])
        if problems:
            problems += _black_and_white(params, shards)
    if problems:
        for shard in shards:
            (folder / shard.name).unlink()
        lines = "\n".join(f"  {shown(problem)}" for problem in problems)
        count = counted(len(problems), "problem")
        raise InputError(f"{params.root}: {count} in the data set:\n{lines}")
    for shard in shards:
        if shard.split not in labelled:  # a test whose labels are withheld
            (folder / shard.name).unlink()
    shards = [shard for shard in shards if shard.split in labelled]
    warnings = [shown(line) for line in _alike(shards)]
    _write_index(params, folder, shards, warnings)
    return warnings


def _pack(
    reader: Reader[Any], folder: Path, params: DataParams, name: str, records: list[Record]
) -> Shard:
    """Read, judge and write the records of one shard. Runs in a worker process."""
    cv2.setNumThreads(1)
    shard = Shard(name, records[0].split, "")
    digest = hashlib.md5()
    offset = 0
    table = _packing(params)
    with (folder / name).open("wb") as file:
        for record in records:
            try:
                image, ids = reader.read(record)
                counts = id_counts(ids)
                _judge(record, image, ids.shape, counts=counts, params=params)
            except InputError as error:
                shard.problems.append(str(error))
                continue
            shard.ids.update(np.flatnonzero(counts).tolist())
            target = cv2.LUT(ids.astype(np.uint8, copy=False), table)
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
            shard.entries.append(entry)
            shard.sums.append(_pixel_sum(image))
            shard.target_sums.append(_pixel_sum(np.asarray(target, np.uint8)))
            shard.looks.append(_look(image))
            shard.histogram += histogram
            shard.shown += (histogram > 0) * histogram[: len(params.classes)].sum()
            for part in (np.ascontiguousarray(image), target):  # a tile may be a view
                digest.update(part.data)
                offset += file.write(part.data)
    shard.md5 = digest.hexdigest()
    return shard


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


def _look(image: Array) -> bytes:
    """The perceptual hash of an image, SIDE^2 bits: which low frequencies are above their median.

    Source: https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html (pHash)
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (4 * SIDE, 4 * SIDE), interpolation=cv2.INTER_AREA)
    frequencies = LOWEST @ small @ LOWEST.T
    return np.packbits(frequencies > np.median(frequencies)).tobytes()


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


def _shared_images(folder: Path, shards: list[Shard]) -> list[str]:
    """Images that are the same, pixel for pixel, in more than one split."""
    alike: defaultdict[tuple[int, ...], list[tuple[str, Entry]]] = defaultdict(list)
    for shard in shards:
        for entry, total in zip(shard.entries, shard.sums, strict=True):
            alike[entry.height, entry.width, total].append((shard.split, entry))
    problems = []
    for found in alike.values():
        if len({split for split, _ in found}) == 1:
            continue
        places: defaultdict[bytes, dict[str, str]] = defaultdict(dict)
        for split, entry in found:
            image, _ = Split(folder, [entry])[0]
            places[hashlib.sha256(image.data).digest()].setdefault(split, entry.name)
        problems += [
            "the same image in " + " and ".join(f"{split} ({name})" for split, name in same.items())
            for same in places.values()
            if len(same) > 1
        ]
    return problems


def _alike(shards: list[Shard]) -> list[str]:
    """The images that are nearly one of another split, the most alike first."""
    names, looks = {}, {}
    for split in SPLITS:
        own = [shard for shard in shards if shard.split == split]
        names[split] = [entry.name for shard in own for entry in shard.entries]
        held = b"".join(look for shard in own for look in shard.looks)
        looks[split] = np.frombuffer(held, np.uint64).reshape(-1, SIDE**2 // 64)
    found = []
    for one, other in combinations([split for split in SPLITS if names[split]], 2):
        for name, look in zip(names[other], looks[other], strict=True):
            distances = np.bitwise_count(looks[one] ^ look).sum(axis=1)
            nearest = int(distances.argmin())
            if distances[nearest] <= ALIKE:
                pair = f"{one} ({names[one][nearest]}) and {other} ({name})"
                found.append((int(distances[nearest]), pair))
    return [
        f"nearly the same image in {pair}: {distance} of the {SIDE**2} bits of their perceptual "
        "hashes differ"
        for distance, pair in sorted(found)
    ]


def _histogram(shards: list[Shard], split: str, num_classes: int) -> NDArray[np.int64]:
    """Pixels of each class, and after them the ignored ones: (C+1,)."""
    total = np.zeros(256, np.int64)
    for shard in shards:
        if shard.split == split:
            total += shard.histogram
    return np.append(total[:num_classes], total[num_classes:].sum())


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


def _black_and_white(params: DataParams, shards: list[Shard]) -> list[str]:
    """What to do with masks of 0 and 255, the commonest kind, where 255 is to be ignored."""
    ids = set().union(*(shard.ids for shard in shards))
    if ids != {0, 255} or params.ignore_index != 255 or params.num_ids != 2:
        return []
    return [
        "the targets hold the ids 0 and 255 alone, and 255 is data.ignore_index: no pixel of it is "
        f"learned. If white is {params.classes[-1]!r}, set data.format.color_map: "
        "[[0, 0, 0], [255, 255, 255]]"
    ]


def _content(params: DataParams, shards: list[Shard]) -> str:
    """The identity of the data set, which does not depend on the fold that is val."""
    told = plain(params)
    told["format"].get("splits", {}).pop("fold", None)
    told = {name: value for name, value in told.items() if name not in ("name", "root")}
    images = sorted(
        (entry.name, *sums)
        for shard in shards
        for entry, *sums in zip(shard.entries, shard.sums, shard.target_sums, strict=True)
    )
    return hashlib.md5(json.dumps([told, images]).encode()).hexdigest()


def _write_index(
    params: DataParams, folder: Path, shards: list[Shard], warnings: list[str]
) -> None:
    """Write the table and index.json, and summary.json for people."""
    entries = {
        split: [entry for shard in shards if shard.split == split for entry in shard.entries]
        for split in SPLITS
    }
    histograms = {split: _histogram(shards, split, len(params.classes)) for split in SPLITS}
    summary = {
        split: {
            "images": len(entries[split]),
            "pixels": dict(zip(params.classes, histograms[split][:-1].tolist(), strict=True)),
            "ignored_pixels": int(histograms[split][-1]),
        }
        for split in SPLITS
    }
    told = {"name": params.name, "splits": summary, "warnings": warnings}
    write_json(folder / SUMMARY, told)
    shown = np.sum([shard.shown for shard in shards if shard.split == "train"], axis=0)
    frequency = histograms["train"][:-1] / shown[: len(params.classes)].clip(min=1)
    index = Index(
        format=FORMAT,
        name=params.name,
        classes=params.classes,
        palette=params.palette,
        ignore_index=params.ignore_index,
        exif=params.exif,
        content=_content(params, shards),
        fold=params.format.fold,
        pixels=histograms["train"][:-1].tolist(),
        frequency=frequency.tolist(),
        shards={shard.name: shard.md5 for shard in shards},
        table=Entries.of(chain.from_iterable(entries.values())).write(folder),
        splits={split: len(own) for split, own in entries.items()},
    )
    write_index(folder, index)
