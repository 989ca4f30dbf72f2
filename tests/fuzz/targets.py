"""Targets: PNG, whose ids must not change by one, and the formats that have no checksum."""

import struct
import zlib
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from pipeline.data.files import read_ids
from tests.fuzz.door import RIGHT, encoded, main, mutated
from tests.fuzz.images import chunk

LIMIT = 1_000_000
UNCHECKED = "accepted as ids, where no checksum holds any"


def files() -> list[tuple[str, bytes]]:
    """Formats and contents."""
    ids = np.random.default_rng(0).integers(0, 3, (30, 40), dtype=np.uint8)
    grey, few = Image.fromarray(ids), Image.fromarray(ids)
    few.putpalette([0, 0, 0, 9, 9, 9, 255, 0, 0])
    many = Image.fromarray(ids * 80)
    many.putpalette(list(range(256)) * 3)
    given = [
        (grey, "PNG", {}),
        (Image.fromarray(ids.astype(np.uint16) * 300), "PNG", {}),
        (Image.fromarray(ids > 0), "PNG", {}),
        (few, "PNG", {}),
        (many, "PNG", {}),
        (grey, "BMP", {}),
        (few, "BMP", {}),
        (grey, "TIFF", {}),
        (grey, "TIFF", {"compression": "tiff_lzw"}),
        (grey, "TIFF", {"compression": "tiff_deflate"}),
    ]
    return encoded(given)


def forged(content: bytes, rng: Random) -> bytes:
    """A PNG of which header, palette or data are changed, and all checksums made to fit."""
    place, made = 8, content[:8]
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        data = content[place + 8 : place + 8 + length]
        place += 12 + length
        if data and rng.random() < 0.5:
            rows = zlib.decompress(data) if kind == b"IDAT" else data
            data = mutated(rows, rng)
            data = zlib.compress(data) if kind == b"IDAT" else data
        made += chunk(kind, data)
    return made


def attempt(whole: list[tuple[str, bytes]], rng: Random, folder: Path) -> str:
    """Read a mutated file, or one whose checksums were made to fit."""
    kind, content = rng.choice(whole)
    path = folder / "a.png"
    forge = kind == "PNG" and rng.random() < 0.2
    path.write_bytes(forged(content, rng) if forge else mutated(content, rng))
    ids = read_ids(path, LIMIT)
    assert ids.dtype in (np.uint8, np.uint16)
    assert ids.ndim == 2
    assert 0 < ids.size <= LIMIT
    if forge or kind != "PNG":
        return UNCHECKED
    path.write_bytes(content)
    assert np.array_equal(ids, read_ids(path, LIMIT))
    return RIGHT


if __name__ == "__main__":
    main(partial(attempt, files()))
