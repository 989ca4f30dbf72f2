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
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.formats import FORMATS, SPLITS, Reader, Record
from pipeline.data.store import SUMMARY, Entry, write_index
from pipeline.params import DataParams

RECORDS_PER_SHARD = 128


@dataclass
class Shard:
    """What the packing of one shard found.

    `histogram` counts the pixels of each id, `shown` the labelled ones of the images that show it.
    """

    name: str
    split: str
    md5: str
    entries: list[Entry] = field(default_factory=list)
    image_md5: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    shown: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))


def prepare(params: DataParams, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Audit the data set and write its shards, index.json and summary.json into `folder`.

    The index also holds each class's frequency in train: its share of the labelled pixels of the
    images that show it.

    `progress(done, total)` is called with the number of records.

    Raises:
        ValueError: the audit's findings, all of them, a line each; no index is written then.
    """
    reader: Reader = FORMATS[params.format](params)
    records, problems = reader.records()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    jobs = []
    for split in SPLITS:
        own = [record for record in records if record.split == split]
        for start in range(0, len(own), RECORDS_PER_SHARD):
            batch = own[start : start + RECORDS_PER_SHARD]
            jobs.append((f"{split}-{start // RECORDS_PER_SHARD:05}.bin", batch))
    pack = partial(_pack, reader, folder, len(params.classes), params.ignore_index)
    shards = []
    context = get_context("spawn")  # a fork copies OpenCV's threads in the middle of their work
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for shard in pool.map(pack, *zip(*jobs, strict=True)) if jobs else ():
            shards.append(shard)
            progress(sum(len(one.image_md5) for one in shards), len(records))

    problems += [problem for shard in shards for problem in shard.problems]
    problems += _shared_images(shards)
    splits = {split: [shard for shard in shards if shard.split == split] for split in SPLITS}
    histograms = {split: _histogram(splits[split]) for split in SPLITS}
    if not problems:  # else an empty split only follows from them
        problems += _empty(params, histograms)
    if problems:
        for shard in shards:
            (folder / shard.name).unlink()
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{params.root}: {len(problems)} problems in the data set:\n{listed}")

    classes = dict(enumerate(params.classes))
    summary = {
        split: {
            "images": sum(len(shard.entries) for shard in splits[split]),
            "pixels": {name: int(histograms[split][index]) for index, name in classes.items()},
            "ignored_pixels": int(histograms[split][params.ignore_index]),
        }
        for split in SPLITS
    }
    (folder / SUMMARY).write_text(
        json.dumps({"name": params.name, "splits": summary}, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    shown = np.sum([shard.shown for shard in splits["train"]], axis=0)
    frequency = (histograms["train"] / shown.clip(min=1))[: len(classes)]
    index: dict[str, Any] = {
        "name": params.name,
        "classes": params.classes,
        "palette": params.palette,
        "ignore_index": params.ignore_index,
        "frequency": frequency.tolist(),
        "shards": {shard.name: shard.md5 for shard in shards},
    }
    entries = {
        split: [entry for shard in splits[split] for entry in shard.entries] for split in SPLITS
    }
    write_index(folder, index, entries)


def _pack(
    reader: Reader,
    folder: Path,
    num_classes: int,
    ignore_index: int,
    name: str,
    records: list[Record],
) -> Shard:
    """Read, judge and write the records of one shard. Runs in a worker process."""
    cv2.setNumThreads(1)
    shard = Shard(name, records[0].split, "")
    digest = hashlib.md5()
    offset = 0
    with (folder / name).open("wb") as file:
        for record in records:
            try:
                image, target = reader.read(record)
                histogram = _judge(record, image, target, num_classes, ignore_index)
            except ValueError as error:
                shard.problems.append(str(error))
                continue
            height, width = target.shape
            shard.entries.append(Entry(record.name, name, offset, height, width))
            shard.image_md5[record.name] = _pixels_md5(image)
            shard.histogram += histogram
            shard.shown += (histogram > 0) * histogram[:num_classes].sum()
            for part in (image.tobytes(), target.astype(np.uint8).tobytes()):
                digest.update(part)
                offset += file.write(part)
    shard.md5 = digest.hexdigest()
    return shard


def _pixels_md5(image: NDArray[np.uint8]) -> str:
    digest = hashlib.md5(str(image.shape).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _judge(
    record: Record,
    image: NDArray[np.uint8],
    target: NDArray[np.uint8 | np.uint16],
    num_classes: int,
    ignore_index: int,
) -> NDArray[np.int64]:
    """Pixels of each id, (256,) int64; a ValueError where the pair can't be used."""
    if image.shape[:2] != target.shape:
        (height, width), (rows, columns) = image.shape[:2], target.shape
        raise ValueError(
            f"{record.image}: {width}x{height} pixels, but its target {record.target} has "
            f"{columns}x{rows}"
        )
    counts = np.bincount(target.ravel(), minlength=256).astype(np.int64)
    bad = [int(i) for i in np.flatnonzero(counts) if i >= num_classes and i != ignore_index]
    if bad:
        raise ValueError(
            f"{record.target}: class ids {_some(bad)} are neither below {num_classes} (the number "
            f"of data.classes) nor data.ignore_index {ignore_index}"
        )
    return counts


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")


def _shared_images(shards: list[Shard]) -> list[str]:
    """Images that are the same, pixel for pixel, in more than one split."""
    places: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for shard in shards:
        for name, md5 in shard.image_md5.items():
            places[md5].setdefault(shard.split, name)
    return [
        "the same image in " + " and ".join(f"{split} ({name})" for split, name in found.items())
        for found in places.values()
        if len(found) > 1
    ]


def _histogram(shards: list[Shard]) -> NDArray[np.int64]:
    total = np.zeros(256, np.int64)
    for shard in shards:
        total += shard.histogram
    return total


def _empty(params: DataParams, histograms: dict[str, NDArray[np.int64]]) -> list[str]:
    """Splits with nothing to learn or measure, and classes that train can't teach."""
    num_classes = len(params.classes)
    empty = [split for split in SPLITS if not histograms[split][:num_classes].any()]
    problems = [f"split {split} has no labelled pixel" for split in empty]
    if "train" not in empty:
        problems += [
            f"class {name!r} has no pixel in train; take it out of data.classes, or label it"
            for name, count in zip(params.classes, histograms["train"], strict=False)
            if not count
        ]
    return problems
