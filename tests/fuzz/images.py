"""Photographs: files of every format that is read."""

import struct
import zlib
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from pipeline.data.files import read_image
from tests.fuzz.door import RIGHT, encoded, main, mutated

LIMIT = 1_000_000


def photographs() -> list[tuple[str, bytes]]:
    """Formats and contents."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    rgb = Image.fromarray(coarse).resize((40, 33))
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(np.arange(1320, dtype=np.uint16).reshape(33, 40) * 49)
    return encoded(
        [
            (rgb, "JPEG", {"exif": exif}),
            (rgb, "JPEG", {"progressive": True}),
            (rgb.convert("L"), "JPEG", {"restart_marker_blocks": 2}),
            (rgb.convert("L"), "JPEG", {"progressive": True}),
            (rgb.convert("CMYK"), "JPEG", {}),
            (rgb, "MPO", {"save_all": True, "append_images": [rgb]}),
            (rgb, "PNG", {"exif": exif}),
            (rgb.convert("RGBA"), "PNG", {}),
            (rgb.quantize(), "PNG", {}),
            (deep, "PNG", {}),
            (rgb, "BMP", {}),
            (rgb.quantize(), "BMP", {}),
            (rgb, "TIFF", {}),
            (rgb, "TIFF", {"compression": "tiff_lzw"}),
            (rgb, "TIFF", {"compression": "tiff_deflate"}),
            (rgb, "TIFF", {"compression": "jpeg"}),
            (deep, "TIFF", {}),
            (rgb, "WEBP", {"exif": exif}),
            (rgb, "WEBP", {"lossless": True}),
        ]
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG, whose checksum fits."""
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def attempt(whole: list[tuple[str, bytes]], rng: Random, folder: Path) -> str:
    """Read a mutated file. PNG has checksums: what is accepted of it has every pixel."""
    kind, content = rng.choice(whole)
    path = folder / "a.png"
    path.write_bytes(mutated(content, rng))
    image, orientation = read_image(path, LIMIT)
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    assert 0 < image.size <= 3 * LIMIT
    assert orientation in range(1, 9)
    if kind == "PNG":
        path.write_bytes(content)
        assert np.array_equal(image, read_image(path, LIMIT)[0])
    return RIGHT


if __name__ == "__main__":
    main(partial(attempt, photographs()))
