"""Generated images and targets, so that no row needs a download; numpy and OpenCV alone."""

import shutil
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

WORK = Path(__file__).parent / ".work"  # git ignores it

Array = NDArray[np.uint8]


def photograph(rng: np.random.Generator, height: int, width: int) -> Array:
    """(H,W,3): smooth colours, coarse and fine texture, and noise; as a JPEG 60 KB at 683x512."""
    image = np.zeros((height, width, 3), np.float32)
    for cell, strength in ((96, 90.0), (24, 40.0), (6, 14.0)):
        coarse = rng.standard_normal((height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        image += strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image += 3 * rng.standard_normal(image.shape).astype(np.float32)
    return np.clip(image + 120, 0, 255).astype(np.uint8)


def blobs(rng: np.random.Generator, height: int, width: int, classes: int) -> Array:
    """(H,W): ellipses of random classes over halves of two others, as regions of a scene."""
    target = np.full((height, width), rng.integers(classes), np.uint8)
    target[: height // 2] = rng.integers(classes)
    for _ in range(24):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (int(rng.integers(8, width // 5)), int(rng.integers(8, height // 4)))
        colour = int(rng.integers(classes))
        cv2.ellipse(target, centre, axes, int(rng.integers(180)), 0, 360, colour, -1)
    return target


def folder(name: str, sizes: dict[str, list[tuple[int, int]]], num_ids: int) -> Path:
    """`name` with images/<split>/*.jpg and targets/<split>/*.png, of the sizes (H,W) of each split.

    Made once; targets hold ids below num_ids. What was left half made by a killed run is made anew.
    """
    path, draft = WORK / name, WORK / f"{name}.new"
    if path.is_dir():
        return path
    shutil.rmtree(draft, ignore_errors=True)
    for split, shapes in sizes.items():
        images, targets = draft / "images" / split, draft / "targets" / split
        for place in (images, targets):
            place.mkdir(parents=True)
        for number, shape in enumerate(shapes):
            rng = np.random.default_rng((len(split), number, *shape))
            image, target = photograph(rng, *shape), blobs(rng, *shape, num_ids)
            cv2.imwrite(str(images / f"{number:04}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 85])
            cv2.imwrite(str(targets / f"{number:04}.png"), target)
    draft.rename(path)
    return path
