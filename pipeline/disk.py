"""Files that others rely on: written whole or not at all, locked, known by their content."""

import csv
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

# The version of every file that this tool writes for itself to read. Raise it with their content.
FORMAT = 6
MODEL = "model.safetensors"  # what predictions need of a training, beside its checkpoints

# Why a file can't be written, where that is for the user to mend, and how.
ROOM = "make room"
UNWRITABLE = {
    errno.ENOSPC: ("the disk is full", ROOM),
    errno.EDQUOT: ("the quota is used up", ROOM),
    errno.EFBIG: ("a file may not be so large here (`ulimit -f`)", "raise that limit"),
    errno.EROFS: ("the file system is read-only", "mount it for writing"),
}


def check_format(content: Mapping[str, Any], path: Path | str, remedy: str) -> None:
    """Refuse a file of another version of this tool.

    Raises:
        InputError: names the file, both versions and the remedy.
    """
    found = content.get("format")
    if found != FORMAT:
        raise InputError(
            f"{path} has format {found}, and this version of the tool reads format {FORMAT}; "
            f"{remedy}, or use the version that wrote it"
        )


def write_atomically(
    path: Path, write: Callable[[Any], object], *, size: int = 0, before: Path | None = None
) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then put it in place.

    A kill at any moment leaves the old file or the new one; an error leaves the old one alone.
    `size` is the number of bytes that are known to be needed. `before` is where the old file goes,
    which is else replaced: a kill may then leave the old one there, and none at `path`.

    Raises:
        InputError: there is no room for it, or it can't be written for another reason that is the
            user's to mend.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_room(path, size)
        try:
            _fill(temporary, write)
            if before is not None and path.exists():
                path.replace(before)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Raw(FileIO):
    """A file that remembers what went wrong with it."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write some of it, as `FileIO` does."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def _fill(temporary: Path, write: Callable[[Any], object]) -> None:
    raw = _Raw(temporary, "w")
    try:
        with BufferedWriter(raw) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except Exception:
        if raw.error is not None:  # of which torch.save makes a RuntimeError about its own insides
            raise raw.error from None
        raise


@contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """What goes wrong while `path` is written, and is the user's to mend, becomes an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(unwritable(error, path, size)) from None


def unwritable(error: OSError, path: Path, size: int = 0) -> str:
    """What stands in the way of a file of at least `size` bytes, and what to do."""
    reason, remedy = UNWRITABLE[error.errno or 0]
    told = f"{path} can't be written: {reason}"
    if remedy == ROOM:
        needed = f"{amount(size)} are needed and " if size else ""
        told += f"; {needed}{amount(_usage(path).free)} are left"
    return f"{told}; {remedy}, then run the same command again"


def _require_room(path: Path, size: int) -> None:
    usage = _usage(path)
    if usage.total and size > usage.free:  # some file systems tell nothing
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _usage(path: Path) -> Any:
    """The room where a file lies, or would."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder)


def amount(size: int) -> str:
    """A number of bytes for people, as df -H has it: 382.4 MB."""
    shown, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if shown < 999.95:
            break
        shown, unit = shown / 1000, larger
    return f"{shown:.0f} {unit}" if unit == "bytes" else f"{shown:.1f} {unit}"


def remove_temporary(folder: Path) -> None:
    """Delete what a kill while files of `folder` were written has left there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file of these bytes, atomically."""
    write_atomically(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_table(path: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write tab-separated values below the names of their columns, atomically."""
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(names)
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that people read, too, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def file_md5(path: Path) -> str:
    """md5 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
