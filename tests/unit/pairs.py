"""Small folders of images and targets, in the layout of the `pairs` format."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.audit import prepare
from pipeline.data.formats import FormatParams, PairsParams
from pipeline.data.params import DataParams
from tests.unit.sections import params

MISSING_C = (
    "class 'c' has no pixel in train; take it out of data.classes, label it, or set "
    "data.allow_missing_classes"
)
OF_PAIRS = PairsParams.model_fields.keys() - FormatParams.model_fields.keys()


def data_params(root: Path, **changes: Any) -> DataParams:
    """The section `data`, with changes by the names below it.

    `format` is the format's name, and what is the format's own stands without it: `splits.source`.
    """
    given = {
        "format": "pairs",
        "root": str(root),
        "classes": ["a", "b", "c"],
        "palette": [[0, 0, 0], [255, 0, 0], [0, 255, 0]],
        "ignore_index": 255,
    }
    return params({_dotted(name): value for name, value in (given | changes).items()}).data


def _dotted(name: str) -> str:
    if name == "format":
        return "data.format.name"
    return f"data.format.{name}" if name.split(".")[0] in OF_PAIRS else f"data.{name}"


def photo(seed: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def labels(size: tuple[int, int] = (12, 16)) -> np.ndarray:
    """All three classes, and one ignored pixel."""
    target = np.resize(np.array([0, 1, 2], np.uint8), size)
    target[0, 0] = 255
    return target


def write(
    root: Path, name: str, image: np.ndarray, target: np.ndarray, suffix: str = ".png"
) -> tuple[Path, Path]:
    paths = root / "images" / f"{name}{suffix}", root / "targets" / f"{name}.png"
    for path, data in zip(paths, (image, target), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data).save(path)
    return paths


def refusal(root: Path, **changes: object) -> list[str]:
    """The lines of the refusal, below `root`; checks that nothing is left."""
    folder = root / "prepared"
    with pytest.raises(ValueError, match=r"problems? in the data set") as caught:
        prepare(data_params(root, **changes), folder, lambda done, total: None)
    assert list(folder.iterdir()) == []
    first, *lines = str(caught.value).splitlines()
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert first == f"{root}: {count} in the data set:"
    return [line.strip().replace(f"{root}/", "") for line in lines]
