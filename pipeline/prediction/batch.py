"""Many photographs -> masks, overlays and areas in a folder, where a killed run goes on."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from glob import iglob
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline import distributed
from pipeline.data.files import IMAGE_SUFFIXES, UNNAMED, is_utf8, read_image, stems, upright
from pipeline.data.table import Array
from pipeline.disk import FORMAT, write_atomically, write_bytes, write_json
from pipeline.errors import InputError, shown
from pipeline.evaluation.report import blend, png, shrunk, write_mask
from pipeline.prediction.model import WHOLE, Model, Sink, areas

LONGEST = 2048  # pixels of an overlay's longer side
IDENTITY = "predict.json"


class Photograph(NamedTuple):
    """A file, and the name of its results: a path without suffix."""

    path: Path
    name: str


@dataclass(frozen=True)
class Folder:
    """The folder of the results.

    `masks` (palette PNG of class ids) and `overlays` (JPEG) are always there, `confidence` (PNG,
    255 is 1) and `probabilities` (npy, (C,H,W) uint16, 65535 is 1) where they are asked for. Each
    process notes what it has done, line by line.
    """

    path: Path
    confidence: bool = False
    probabilities: bool = False

    def file(self, kind: str, name: str) -> Path:
        """A result of one kind, by the photograph's name."""
        suffix = {"overlays": ".jpg", "probabilities": ".npy"}.get(kind, ".png")
        return self.path / kind / f"{name}{suffix}"

    def claim(self, settings: dict[str, Any]) -> None:
        """Begin here, or go on where equal settings were at work.

        Raises:
            InputError: the folder holds results of other settings.
        """
        identity = settings | {
            "format": FORMAT,
            "confidence": self.confidence,
            "probabilities": self.probabilities,
        }
        path = self.path / IDENTITY
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file, and --out must be a folder")
        if path.is_file():
            try:
                held = dict(json.loads(path.read_bytes()))
            except (TypeError, ValueError) as error:
                raise InputError(f"{path} is broken ({error}); choose another --out") from None
            differing = [name for name in identity if held.get(name) != identity[name]]
            if differing:
                raise InputError(
                    f"{self.path}: holds predictions with another {', '.join(differing)}; choose "
                    "another --out, or delete it"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(path, identity)

    def done(self) -> dict[str, dict[str, Any]]:
        """What has been noted of each photograph by its name, the last note alone."""
        notes = {}
        for path in sorted(self.path.glob(".done-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    note = json.loads(line)
                except ValueError:  # a kill has cut it off
                    continue
                notes[note["name"]] = note
        return notes

    def notes(self, process: int) -> TextIO:
        """Where a process adds its notes, after what a kill may have cut off."""
        path = self.path / f".done-{process}.jsonl"
        whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
        file = path.open("a", encoding="utf-8")
        file.write("" if whole else "\n")
        return file

    def missing(self, photographs: Sequence[Photograph]) -> list[Photograph]:
        """Those without results, and those whose file has changed since."""
        done = self.done()
        return [
            one
            for one in photographs
            if done.get(one.name, {}).get("file") != _stamp(one.path)
            or not self.file("masks", one.name).is_file()
        ]

    def write_areas(self, classes: Sequence[str]) -> None:
        """areas.csv: the size of each photograph, and the pixels of each class."""
        sure = ["confidence"] if self.confidence else []
        done = self.done()

        def write(file: Any) -> None:
            lines = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            table = csv.writer(lines)
            table.writerow(["image", "height", "width", *sure, *classes])
            for name in sorted(done):
                note = done[name]
                shares = [note[key] for key in ("height", "width", *sure)]
                table.writerow([name, *shares, *note["pixels"]])
            lines.detach()

        write_atomically(self.path / "areas.csv", write)


def _stamp(path: Path) -> list[Any]:
    """By which a file is known to be the same."""
    try:
        status = path.stat()
    except OSError:
        return [str(path.resolve())]
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def find_photographs(inputs: Sequence[str]) -> list[Photograph]:
    """The photographs of files, folders and patterns such as `photos/*.jpg`.

    A file's results have its stem for a name; of a folder's files the path below the folder.

    Raises:
        InputError: there is nothing of a name, or two photographs would have results of one name.
    """
    found: dict[str, Photograph] = {}
    for given in inputs:
        path = Path(given)
        if path.is_file() or path.is_dir():
            own = _below(path)
        else:
            matches = sorted(map(Path, iglob(given, recursive=True)))  # noqa: PTH207 - from anywhere
            own = [
                one
                for match in matches
                for one in _below(match)
                if match.is_dir() or match.suffix.lower() in IMAGE_SUFFIXES
            ]
        if not own:
            raise InputError(
                f"{given}: no photograph: there must be a file, a folder with files of "
                f"{', '.join(IMAGE_SUFFIXES)}, or a pattern that files match"
            )
        for one in own:
            other = found.setdefault(one.name, one)
            if other.path.resolve() != one.path.resolve():
                raise InputError(
                    f"{other.path} and {one.path} would both become {one.name}; name a folder that "
                    "holds both, or give each an --out of its own"
                )
    return list(found.values())


def _below(path: Path) -> list[Photograph]:
    if path.is_dir():
        files, unclear = stems(path, IMAGE_SUFFIXES)
        if unclear:
            raise InputError(shown(unclear[0]))
        return [Photograph(file, stem) for stem, file in files.items()]
    if not is_utf8(path):
        raise InputError(f"{path}: {UNNAMED}")
    return [Photograph(path, path.stem)]


class Read(NamedTuple):
    """A photograph's pixels as they are stored, (H,W,3) uint8, and its EXIF orientation."""

    photograph: Photograph
    stored: Array
    orientation: int

    @property
    def large(self) -> bool:
        """Whether nothing is to lie in memory beside it."""
        height, width, _ = self.stored.shape
        return bool(height * width > WHOLE)


def predict_files(
    model: Model, photographs: Sequence[Photograph], folder: Folder, batch_size: int
) -> list[str]:
    """Predict this process's share of the photographs, and say which could not be read.

    While the network computes, the next photograph is read and the last results are written.
    """
    own = photographs[distributed.rank() :: distributed.world_size()]
    problems: list[str] = []
    bar = tqdm(total=len(own), desc="predict", disable=distributed.rank() > 0 or None)

    def fail(problem: str) -> None:
        problems.append(problem)
        bar.update()

    with bar, folder.notes(distributed.rank()) as log, ThreadPoolExecutor(2) as pool:
        last: Future[None] | None = None
        for batch in _batches(_read_ahead(pool, own, fail), batch_size):
            sinks = [_sink(one, model, folder) for one in batch]
            model.fill([(one.stored, one.orientation) for one in batch], sinks)
            if last:
                last.result()
            last = pool.submit(_write, batch, sinks, model, folder, log=log)
            if batch[0].large:
                last.result()
            bar.update(len(batch))
        if last:
            last.result()
    return problems


def _read_ahead(
    pool: ThreadPoolExecutor, photographs: Sequence[Photograph], fail: Callable[[str], None]
) -> Iterator[Read]:
    """The photographs that can be read; one is read while the one before it is at work."""
    following = None
    for place, one in enumerate(photographs):
        current = following or pool.submit(read_image, one.path)
        following = None
        try:
            read = Read(one, *current.result())
        except InputError as error:
            fail(str(error))
            continue
        if place + 1 < len(photographs) and not read.large:
            following = pool.submit(read_image, photographs[place + 1].path)
        yield read


def _batches(found: Iterator[Read], batch_size: int) -> Iterator[list[Read]]:
    """Neighbours of one size together: images of several sizes don't stack."""
    batch: list[Read] = []
    for one in found:
        alike = batch and _kind(batch[0]) == _kind(one)
        if batch and (not alike or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _kind(one: Read) -> tuple[int, ...]:
    return (*one.stored.shape, one.orientation)


def _sink(one: Read, model: Model, folder: Folder) -> Sink:
    """Arrays for the results of a photograph; probabilities go straight to the disk."""
    height, width = one.stored.shape[:2]
    probabilities = None
    if folder.probabilities:
        path = folder.file("probabilities", one.photograph.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(model.classes), height, width)
        probabilities = np.lib.format.open_memmap(path, "w+", np.uint16, shape)
    return Sink(
        np.empty((height, width), np.uint8),
        np.empty((height, width), np.uint8) if folder.confidence else None,
        probabilities,
    )


def _write(
    batch: Sequence[Read], sinks: Sequence[Sink], model: Model, folder: Folder, log: TextIO
) -> None:
    """Write the results of some photographs, and note each when it has all of them."""
    for one, sink in zip(batch, sinks, strict=True):
        log.write(json.dumps(_write_one(one, sink, model, folder)) + "\n")
        log.flush()


def _write_one(one: Read, sink: Sink, model: Model, folder: Folder) -> dict[str, Any]:
    """Write the results of a photograph; what is to be noted of them."""
    (path, name), ids = one.photograph, sink.ids
    note: dict[str, Any] = {"name": name, "file": _stamp(path)}
    note |= {"height": ids.shape[0], "width": ids.shape[1]}
    if sink.confidence is not None:
        content = png(sink.confidence)
        write_bytes(folder.file("confidence", name), content)
        note["confidence"] = round(float(sink.confidence.mean(dtype=np.float64)) / 255, 4)
    if isinstance(sink.probabilities, np.memmap):
        sink.probabilities.flush()
    small = shrunk(one.stored, LONGEST, cv2.INTER_AREA)
    over = blend(small, shrunk(ids, LONGEST, cv2.INTER_NEAREST), model.palette)
    picture = Image.fromarray(np.ascontiguousarray(upright(over, one.orientation)))
    write_atomically(folder.file("overlays", name), lambda file: picture.save(file, "JPEG"))
    masks = folder.file("masks", name)
    write_atomically(masks, lambda file: write_mask(file, ids, model.palette))
    return note | {"pixels": list(areas(ids, model.classes).values())}
