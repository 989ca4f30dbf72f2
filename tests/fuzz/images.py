"""Photographs: files of every format that is read."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from pipeline.data.files import read_image
from tests.fuzz.door import RIGHT, Rng, encoded, main, mutated

LIMIT = 1_000_000


def files() -> list[tuple[str, bytes]]:
    """Formats and contents."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    rgb = Image.fromarray(coarse).resize((40, 30))
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    given = [
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("L"), "JPEG", {"restart_marker_blocks": 2}),
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
    return encoded(given)


def attempt(path: Path, whole: list[tuple[str, bytes]], rng: Rng) -> str:
    """Read a mutated file. PNG has checksums: what is accepted of it has every pixel."""
    kind, content = whole[int(rng.integers(len(whole)))]
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
    with TemporaryDirectory() as folder:
        main(partial(attempt, Path(folder) / "a.png", files()))
