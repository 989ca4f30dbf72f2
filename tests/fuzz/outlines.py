"""Outlines of COCO, LabelMe, CVAT and YOLO: files with changed bytes, and with changed values."""

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from pipeline.data.formats import Record
from pipeline.data.outlines import PARSERS, by_image
from pipeline.errors import InputError
from tests.fuzz.door import RIGHT, forge, main, mutated
from tests.unit.pairs import data_params, labels, photo, write

SHAPE = [[2, 2], [9.5, 2], [9, 8]]
RUNS: dict[str, Any] = {"size": [12, 16]}
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 12, "width": 16}],
    "categories": [{"id": 3, "name": "b"}],
    "annotations": [
        {"image_id": 1, "category_id": 3, "segmentation": [[2, 2, 9, 2, 9, 8]]},
        {
            "image_id": 1,
            "category_id": 3,
            "segmentation": {"size": [12, 16], "counts": [9, 9, 174]},
        },
        {
            "image_id": 1,
            "category_id": 3,
            "segmentation": {"size": [12, 16], "counts": "V139000000000b2"},
        },
    ],
}
LABELME = {
    "imageHeight": 12,
    "imageWidth": 16,
    "shapes": [
        {"label": "b", "points": SHAPE},
        {"label": "c", "points": SHAPE[:2], "shape_type": "rectangle"},
    ],
}
WHOLE: dict[str, Any] = {
    "coco": COCO,
    "labelme": LABELME,
    "cvat": """<annotations><image name="a.png" width="16" height="12">
        <box label="b" xtl="1" ytl="1" xbr="5" ybr="6" z_order="1"/>
        <polygon label="c" points="2,2;9.5,2;9,8"/></image></annotations>""",
    "yolo": "0 0.1 0.1 0.5 0.1 0.5 0.8\n1 0.2 0.2 0.5 0.1 0.5 0.8\n",
}


def attempt(rng: Random, root: Path) -> str:
    """Read the drawing of an image as ids: all of them are of the classes."""
    kind, content = rng.choice([*WHOLE.items()])
    if isinstance(content, str) or rng.random() < 0.3:
        text = content if isinstance(content, str) else json.dumps(content)
        broken = mutated(text.encode(), rng)
    else:
        tree = copy.deepcopy(content)
        forge(tree, rng)
        broken = json.dumps(tree).encode()
    path = root / f"annotations/a{PARSERS[kind][0]}"
    path.parent.mkdir()
    path.write_bytes(broken)
    image, _ = write(root, "a", photo(0), labels())
    found, problems = by_image(kind, path.parent, {"a": image})
    if problems or "a" not in found:
        raise InputError(*problems[:1] or ["a.png: no target"])
    reader = data_params(root, **{"format": kind, "format.background": "a"}).reader()
    _, ids = reader.read(Record("a", str(image), str(found["a"]), "train"))
    assert ids.shape == (12, 16)
    assert set(np.unique(ids)) <= {0, 1, 2}
    return RIGHT


if __name__ == "__main__":
    main(attempt)
