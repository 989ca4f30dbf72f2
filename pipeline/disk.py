"""Files that others rely on: written whole or not at all, locked, known by their content."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

# The version of every file that this tool writes for itself to read. Raise it with their content.
FORMAT = 3
MODEL = "model.safetensors"  # what predictions need of a training, beside its checkpoints


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


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then put it in place.

    A kill at any moment leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that people read, too."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_md5(path: Path) -> str:
    """md5 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
