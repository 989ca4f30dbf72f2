"""Outlines of COCO, LabelMe, CVAT and YOLO, against ids that were counted by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.audit import prepare
from pipeline.data.outlines import drawings
from pipeline.data.params import DataParams
from pipeline.data.store import Store
from tests.unit.pairs import photo
from tests.unit.sections import params

CLASSES = ["background", "foot", "arch"]
FOOT = [[2, 1], [10, 1], [10, 7], [2, 7]]  # x from 2 to 9, y from 1 to 6
ARCH = [[4, 3], [6, 3], [6, 9], [4, 9]]  # later, and so on top
SIZE = (12, 16)


def expected() -> np.ndarray:
    ids = np.zeros(SIZE, np.uint8)
    ids[1:7, 2:10] = 1
    ids[3:9, 4:6] = 2
    return ids


def flat(points: list[list[int]]) -> list[int]:
    return [x for point in points for x in point]


def coco(names: list[str]) -> dict[str, str]:
    runs = [4 * 12 + 3, 6, 6, 6, 16 * 12 - 4 * 12 - 3 - 18]  # down the columns: off, on, off, on
    images, annotations = [], []
    for number, name in enumerate(names):
        images.append({"id": number, "file_name": name, "height": 12, "width": 16})
        annotations.append({"image_id": number, "category_id": 7, "segmentation": [flat(FOOT)]})
        drawn = {"counts": runs, "size": [12, 16]}
        annotations.append({"image_id": number, "category_id": 9, "segmentation": drawn})
    categories = [{"id": 7, "name": "foot"}, {"id": 9, "name": "arch"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return {"annotations.json": json.dumps(content)}


def labelme(names: list[str]) -> dict[str, str]:
    shapes = [
        {"label": "foot", "points": [FOOT[0], FOOT[2]], "shape_type": "rectangle"},
        {"label": "arch", "points": ARCH, "shape_type": "polygon"},
    ]
    content = {"imageHeight": 12, "imageWidth": 16, "imagePath": "x.png", "shapes": shapes}
    return {f"annotations/{Path(name).with_suffix('.json')}": json.dumps(content) for name in names}


def cvat(names: list[str]) -> dict[str, str]:
    points = ";".join(f"{x},{y}" for x, y in ARCH)
    drawn = f'<polygon label="arch" points="{points}" z_order="1"/>'
    drawn += '<box label="foot" xtl="2" ytl="1" xbr="10" ybr="7" z_order="0"/>'
    images = [f'<image name="{name}" width="16" height="12">{drawn}</image>' for name in names]
    return {"annotations.xml": f"<annotations>{''.join(images)}</annotations>"}


def yolo(names: list[str]) -> dict[str, str]:
    lines = [
        " ".join([str(number), *(f"{x / 16} {y / 12}" for x, y in points)])
        for number, points in enumerate((FOOT, ARCH))
    ]
    return {f"annotations/{Path(name).with_suffix('.txt')}": "\n".join(lines) for name in names}


KINDS = {"coco": coco, "labelme": labelme, "cvat": cvat, "yolo": yolo}
PLACES = {"coco": "annotations.json", "cvat": "annotations.xml"}


def section(root: Path, kind: str, **changes: object) -> DataParams:
    given = {
        "name": kind,
        "annotations": PLACES.get(kind, "annotations"),
        "splits.source": "given",
    }
    section = {f"data.format.{name}": value for name, value in given.items()}
    section |= {"data.root": str(root), "data.classes": CLASSES, "data.palette": [[0, 0, 0]] * 3}
    return params(section | changes).data


def draw(root: Path, kind: str, names: list[str]) -> None:
    for name in names:
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(sum(map(ord, name)), SIZE)).save(path)
    for name, content in KINDS[kind](names).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_outlines_become_ids(kind: str, tmp_path: Path):
    draw(tmp_path, kind, ["train/a.png", "val/b.png"])
    reader = section(tmp_path, kind).reader()
    records, problems = reader.records()
    assert problems == []
    assert [(one.name, one.split) for one in records] == [("train/a", "train"), ("val/b", "val")]
    for record in records:
        image, ids = reader.read(record)
        assert image.shape == (*SIZE, 3)
        assert np.array_equal(ids, expected())


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_has_drawn_is_ignored_without_a_background(kind: str, tmp_path: Path):
    draw(tmp_path, kind, ["train/a.png", "val/b.png"])
    classes = ["foot", "arch"]
    given = {"data.format.background": None, "data.classes": classes}
    reader = section(tmp_path, kind, **given, **{"data.palette": [[0, 0, 0]] * 2}).reader()
    (record, _), _ = reader.records()
    _, ids = reader.read(record)
    assert np.array_equal(ids, np.array([255, 0, 1], np.uint8)[expected()])


def test_a_set_of_outlines_is_prepared_with_all_its_problems(tmp_path: Path):
    draw(tmp_path, "labelme", ["train/a.png", "val/b.png", "train/c.png"])
    folder = tmp_path / "prepared"
    prepare(section(tmp_path, "labelme"), folder, lambda done, total: None)
    _, target = Store(folder).split("train")[0]
    assert np.array_equal(target, expected())

    drawing = tmp_path / "annotations/train/a.json"
    content = json.loads(drawing.read_text())
    content["shapes"][0]["label"] = "toe"
    drawing.write_text(json.dumps(content))
    (tmp_path / "annotations/val/b.json").write_text('{"shapes": [')
    (tmp_path / "annotations/train/c.json").unlink()
    drawings.cache_clear()
    with pytest.raises(ValueError, match="3 problems in the data set") as caught:
        prepare(section(tmp_path, "labelme"), folder, lambda done, total: None)
    said = str(caught.value)
    assert "train/a.json: label 'toe' is not in data.classes: background, foot, arch" in said
    assert "val/b.json: can't be read as a file of labelme (JSONDecodeError" in said
    assert "images/train/c.png: no target" in said

    shutil.rmtree(tmp_path / "annotations")
    missing = "annotations: no .json file of labelme; data.format.annotations names it"
    with pytest.raises(ValueError, match=missing):
        prepare(section(tmp_path, "labelme"), folder, lambda done, total: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.format.background": "floor"}, "'floor' is unknown"),
        ({"data.reduce_zero_label": True}, "reduce_zero_label is for files of ids"),
        ({"data.format.annotations": "../x"}, "must be a folder below data.root"),
        ({"data.format.targets": "x"}, "it belongs to pairs"),
    ],
)
def test_keys_that_do_not_suit_outlines_are_refused(
    changes: dict[str, object], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        section(tmp_path, "coco", **changes)
