"""What runs have to say, on disk, until MLflow has taken it.

A run's spool is the folder `.dvc/tmp/instep-spool/<key>` of the main checkout. Each process that
has something to say of the run writes a session into it: a file of records, one a line, and copies
of artifacts. A line is the crc32 of its text, and the text: a JSON list of the record's number,
kind and content. A kill leaves an incomplete last line, which does not count.

| kind | content |
|---|---|
| start | what the session is about: see `Start` |
| points | {"time": milliseconds, "step": number, "values": {metric: value}} |
| tags | {name: value} |
| score | the number that goes before the run's name |
| file | {"file": its name here, "name": its name in MLflow, "folder": there, "crc": of its bytes} |
| end | {"status": as MLflow has them, "time": milliseconds, "reason": text or null} |
"""

import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from filelock import FileLock, Timeout

from pipeline.errors import one_line
from pipeline.params import main_checkout

log = logging.getLogger("instep")

LINKED = 1_000_000  # bytes: larger files are linked where that is possible, and not copied
KEYS = r"\d{8}-\d{6}-[0-9a-f]{8}"
CHUNK = 1 << 20
DAMAGED = "damaged"
ENCODER = json.JSONEncoder(separators=(",", ":"))  # in ASCII


class Start(TypedDict):
    """The first record of a session: the run, and what MLflow's page says of it.

    `uri` and `experiment` say where it goes, `dataset` is a name, an md5 and a place, `evaluation`
    the fingerprint of an evaluation, None for a training. An evaluation's scores go to the run of
    its training, which has the id `run_id`, if that is known, and `training` as its key.
    """

    uri: str
    experiment: str
    name: str
    time: int
    params: dict[str, str]
    tags: dict[str, str]
    dataset: tuple[str, str, str]
    evaluation: str | None
    run_id: str | None
    training: str | None


class Record(NamedTuple):
    """A line of a session, and where the next one begins."""

    number: int
    kind: str
    content: Any
    end: int


class Mark(NamedTuple):
    """How far MLflow has taken a session, in bytes: files, which are slow, and all else.

    `number` is that of the next record, `status` what the session ended with, if that is taken.
    """

    position: int = 0
    files: int = 0
    number: int = 0
    status: str | None = None


def new_key() -> str:
    """A name for a run that no other has, and which says when the run began."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def valid(key: str | None) -> str | None:
    """The key, or None where it is no such name."""
    return key if key and re.fullmatch(KEYS, key) else None


def began(key: str) -> float:
    """When the run of this key began, in seconds since 1970."""
    return datetime.strptime(key[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC).timestamp()


def spools_folder() -> Path:
    """Where the spools are."""
    return main_checkout() / ".dvc" / "tmp" / "instep-spool"


def all_spools() -> "list[Spool]":
    """The spools that are there, the oldest first."""
    folder = spools_folder()
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [Spool(name) for name in names if valid(name)]


class Spool:
    """All that the processes of a run had to say which is still here; `key` names the run."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.folder = spools_folder() / key
        self.lock = FileLock(self.folder / "lock", blocking=False, thread_local=False)

    @contextmanager
    def delivered_here(self) -> Iterator[bool]:
        """Be the only one that sends from this spool, if it is there; says whether that is so."""
        try:
            self.lock.acquire()
        except (Timeout, OSError):
            yield False
            return
        try:
            yield True
        finally:
            self.lock.release()

    def sessions(self) -> "list[Session]":
        """Those of the spool, in the order of their beginnings."""
        found = self.folder.glob("*.jsonl") if self.folder.is_dir() else []
        return [Session(path) for path in sorted(found)]

    def begin(self, start: Start) -> "Writer":
        """A new session, the last so far.

        Raises:
            OSError: it can't be written.
        """
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.stem) for path in self.folder.glob("[0-9]*.jsonl")]
            path = self.folder / f"{max(numbers, default=0) + 1:04}.jsonl"
            # Another process may be quicker, or delete the folder with the sessions that are sent.
            with suppress(Timeout, FileExistsError, FileNotFoundError):
                return Writer(path, start)

    def points(self) -> set[tuple[str, int]]:
        """Metric and step of every point that the sessions hold."""
        records = (record for session in self.sessions() for record in session.records())
        return {
            (metric, record.content["step"])
            for record in records
            if record.kind == "points"
            for metric in record.content["values"]
        }

    def forget_sent(self) -> None:
        """Delete the sessions that MLflow has taken, unless their training may go on.

        What a training has said is kept until it is finished: by that the next attempt knows which
        points are told, and a run that has vanished from MLflow can be told anew.
        """
        sessions = self.sessions()
        statuses = [session.mark.status for session in sessions if session.of_training]
        if not statuses or statuses[-1] == "FINISHED":
            for session in sessions:
                session.remove()
            if not self.sessions():
                with suppress(OSError):  # a new session may be there by now
                    (self.folder / "lock").unlink(missing_ok=True)
                    self.folder.rmdir()

    @property
    def age(self) -> float:
        """Days since something was written here."""
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (self.folder, *self.folder.iterdir()))
            return (time.time() - newest) / 86400
        return 0.0


class Session:
    """What one process had to say of a run, for a reader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = path.with_suffix("")
        self._mark = path.with_suffix(".sent")

    @property
    def live(self) -> bool:
        """Whether its process may still write."""
        try:
            FileLock(self.path.with_suffix(".lock"), blocking=False).acquire().lock.release()
        except (Timeout, OSError):
            return True
        return False

    @property
    def mark(self) -> Mark:
        """How far MLflow has taken it; a mark that is damaged or of a longer file says nothing."""
        with suppress(OSError, ValueError):
            mark = Mark(*_parse(self._mark.read_bytes().rstrip(b"\n")))
            if max(mark.position, mark.files) <= self.path.stat().st_size:
                return mark
        return Mark()

    def set_mark(self, mark: Mark) -> None:
        """Keep how far MLflow has taken it."""
        temporary = self._mark.with_suffix(".tmp")
        temporary.write_bytes(_line(mark))
        temporary.replace(self._mark)

    def rewind(self) -> None:
        """Nothing is taken, after all."""
        self._mark.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Never send it: it can't be known what it is about."""
        self.path.rename(self.path.with_suffix(".damaged"))
        self.rewind()  # the next session may get its number

    @property
    def start(self) -> Start | None:
        """Its first record; None where that is damaged."""
        first = next(self.records(), None)
        if first is None or first.number != 0 or first.kind != "start":
            return None
        content: Start = first.content
        return content

    @property
    def of_training(self) -> bool:
        """Whether a training wrote it."""
        start = self.start
        return start is not None and start["evaluation"] is None

    @property
    def unsent(self) -> bool:
        """Whether there is a record that MLflow has not taken."""
        return next(self.pending(), None) is not None

    def records(self, position: int = 0) -> Iterator[Record]:
        """The records from a position on; of a line that is damaged, one of the kind DAMAGED."""
        for line, end in _lines(self.path, position):
            try:
                number, kind, content = _parse(line)
            except ValueError:
                number, kind, content = -1, DAMAGED, None
            yield Record(number, kind, content, end)

    def pending(self) -> Iterator[Record]:
        """The records that MLflow has not taken, and the damaged ones, which may be of a file."""
        mark = self.mark
        for record in self.records(min(mark.position, mark.files)):
            words = record.kind not in ("file", DAMAGED)
            if record.end > (mark.position if words else mark.files):
                yield record

    def waiting(self) -> dict[str, int]:
        """How many points and files, and what else, MLflow has not taken."""
        found: dict[str, int] = {}
        for record in self.pending():
            match record.kind:
                case "points":
                    what, count = "points", len(record.content["values"])
                case "file":
                    what, count = "files", 1
                case "end":
                    what, count = "end", 0
                case _:
                    what, count = "parameters and tags", 0
            found[what] = found.get(what, 0) + count
        return found

    def remove(self) -> None:
        """Delete it, unless its process may still write or MLflow has not taken all of it."""
        if not self.live and not self.unsent:
            shutil.rmtree(self.files, ignore_errors=True)
            for suffix in (".lock", ".sent", ".jsonl"):
                self.path.with_suffix(suffix).unlink(missing_ok=True)


class Writer:
    """Writes a session: its `start` at once, each record as it comes.

    Where the disk is full, records wait in memory for room.
    """

    def __init__(self, path: Path, start: Start) -> None:
        self.session = Session(path)
        self._lock = FileLock(path.with_suffix(".lock"), blocking=False, thread_local=False)
        self._lock.acquire()
        try:
            self._file = path.open("xb", buffering=0)
        except OSError:
            self._lock.release()
            raise
        self._writing = threading.Lock()
        self._number = 0
        self._unwritten = b""
        self._trouble = False
        self.write("start", start)

    def write(self, kind: str, content: Any) -> None:
        """Add a record; it is the system's when this returns, whatever happens to the process."""
        with self._writing:
            if self._file.closed:
                return
            self._unwritten += _line([self._number, kind, content])
            self._number += 1
            try:
                while self._unwritten:
                    self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            except OSError as error:  # no reason to end a training
                if not self._trouble:
                    log.warning("what MLflow is told can't be kept: %s", one_line(error))
                self._trouble = True

    def keep(self, content: Path | bytes, folder: str, name: str) -> None:
        """Add a copy of a file, or some bytes, as an artifact of this name in a folder."""
        kept = self.session.files / f"{self._number:06}-{secrets.token_hex(4)}"
        try:
            self.session.files.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                kept.write_bytes(content)
            else:
                _link_or_copy(content, kept)
            crc = _crc_of(kept)
        except OSError as error:
            log.warning("%s can't be kept for MLflow: %s", name, one_line(error))
            with suppress(OSError):
                kept.unlink(missing_ok=True)
        else:
            self.write(
                "file", {"file": kept.name, "name": name, "folder": folder, "crc": f"{crc:08x}"}
            )

    def close(self) -> None:
        """Nothing more is written."""
        with self._writing:
            self._file.close()
            self._lock.release()


def undamaged(path: Path, crc: str) -> bool:
    """Whether a kept file is there, as it was kept."""
    try:
        return f"{_crc_of(path):08x}" == crc
    except OSError:
        return False


def _link_or_copy(source: Path, target: Path) -> None:
    """A large file costs no time and no room; a small one may be changed where it lies."""
    if source.stat().st_size > LINKED and source.suffix != ".log":  # which may still grow
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _line(content: Any) -> bytes:
    text = ENCODER.encode(content).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Any:
    """What a line says.

    Raises:
        ValueError: it is damaged.
    """
    crc, _, text = line.partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        raise ValueError
    return json.loads(text)


def _lines(path: Path, position: int) -> Iterator[tuple[bytes, int]]:
    """The whole lines from a position on, each with where it ends."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            yield line[:-1], position
