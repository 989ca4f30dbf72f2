"""What an evaluation found in every image: scores, intervals and comparisons follow without it.

A file is a few arrays, of which the largest holds the cells of the images' confusion matrices that
are not zero: 2,000 images of 150 classes take about a megabyte.
"""

import io
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from pipeline.disk import FORMAT, check_format, write_atomically
from pipeline.errors import InputError
from pipeline.evaluation.metrics import ImageAreas, Matrix

PER_IMAGE = Path("evaluation/per_image.npz")  # below work_dir, and below a run's artifacts

# What reading a file raises that is not one of ours, or is cut off.
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile, zlib.error)


class Origin(TypedDict):
    """What was measured, and by what.

    `params` are the parameters that change the result: those of the training, as its checkpoint has
    them, and the section `evaluation`. `code` is a digest of what else it follows from, the code
    and the weights that the training started from; `data` is the identity of the data set, and
    `fold` the part of it that was val, if it was cut into folds.
    """

    classes: Sequence[str]
    params: dict[str, Any]
    code: str
    data: str
    fold: int | None


@dataclass(frozen=True)
class PerImage:
    """The areas of every image of a split, N images of C classes.

    Images of one of the `groups` are no independent ones. `owners` (K,) says to which image each of
    the `cells` and `pixels` belongs; `boundary` is (N,2,C). See `ImageAreas`.
    """

    origin: Origin
    names: NDArray[np.str_]
    groups: NDArray[np.str_]
    owners: Matrix
    cells: Matrix
    pixels: Matrix
    boundary: Matrix

    @classmethod
    def of(
        cls,
        origin: Origin,
        names: Sequence[str],
        groups: Sequence[str],
        found: Iterable[ImageAreas],
    ) -> Self:
        """Put together what was found in all images, in their order."""
        images = sorted(found, key=lambda one: one.image)
        assert [one.image for one in images] == list(range(len(names))), "each image once"
        return cls(
            origin,
            np.array(names),
            np.array(groups),
            owners=np.repeat(np.arange(len(images)), [len(image.cells) for image in images]),
            cells=np.concatenate([image.cells for image in images]),
            pixels=np.concatenate([image.pixels for image in images]),
            boundary=np.stack([image.boundary for image in images]),
        )

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.origin["classes"])

    def confusion(self) -> Matrix:
        """The confusion matrix of all images together, (C,C) int64."""
        return _summed(self.cells, self.pixels, (self.num_classes, self.num_classes))

    def areas(self) -> Matrix:
        """Of every image and class the pixels of both maps, the target and the prediction: (N,3,C).

        IoU is the first of them over the sum of the others less the first.
        """
        shape = (len(self.names), self.num_classes)
        target, prediction = np.divmod(self.cells, self.num_classes)
        right = target == prediction
        rows = self.owners * self.num_classes
        return np.stack(
            [
                _summed((rows + target)[right], self.pixels[right], shape),
                _summed(rows + target, self.pixels, shape),
                _summed(rows + prediction, self.pixels, shape),
            ],
            axis=1,
        )

    def save(self, path: Path) -> None:
        """Write the file. Equal content gives equal bytes."""
        origin = json.dumps({"format": FORMAT, **self.origin}, ensure_ascii=False)
        arrays = {name: value for name, value in vars(self).items() if name != "origin"}
        write_atomically(
            path, lambda file: np.savez_compressed(file, origin=np.array(origin), **arrays)
        )

    @classmethod
    def load(cls, content: bytes, path: Path | str) -> Self:
        """From the content of a file, which `path` names in errors.

        Raises:
            InputError: it is no such file, or one of another version.
        """
        try:
            with np.load(io.BytesIO(content)) as file:
                arrays = dict(file)
            origin = json.loads(str(arrays.pop("origin")))
            check_format(dict(origin), path, "evaluate anew")
            del origin["format"]
            return cls(origin=origin, **arrays)
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(f"{path}: not the results of an evaluation ({error})") from None


def _summed(places: Matrix, pixels: Matrix, shape: tuple[int, int]) -> Matrix:
    """Pixels added up by place, int64."""
    total = np.zeros(shape, np.int64)
    np.add.at(total.ravel(), places, pixels)
    return total
