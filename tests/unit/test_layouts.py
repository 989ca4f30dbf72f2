"""The layouts of public data sets, and what `pairs` can be told: from folders to packed pixels."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import audit
from pipeline.data.formats import Record
from pipeline.data.params import DataParams
from pipeline.data.store import Store
from tests.unit.pairs import data_params, labels, photo, write


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack in threads: to start processes takes longer than all else here."""
    monkeypatch.setattr(audit, "ProcessPoolExecutor", lambda _, __: ThreadPoolExecutor(2))


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(seed, (2, 4))).save(path)


def target(path: Path, ids: list[list[int]], dtype: Any = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(ids, dtype)).save(path)


def layout(root: Path, name: str, **changes: Any) -> DataParams:
    return data_params(root, format=name, **changes)


def read_layout(params: DataParams) -> tuple[list[Record], list[str]]:
    records, problems = params.reader().records()
    return records, [line.replace(f"{params.root}/", "") for line in problems]


def prepared(params: DataParams) -> Store:
    folder = Path(params.root) / "prepared"
    audit.prepare(params, folder, lambda done, total: None)
    return Store(folder)


def refused(params: DataParams) -> list[str]:
    """The audit's findings, below the root."""
    with pytest.raises(ValueError, match=r"problems? in the data set") as caught:
        audit.prepare(params, Path(params.root) / "prepared", lambda done, total: None)
    return [
        line.strip().replace(f"{params.root}/", "") for line in str(caught.value).splitlines()[1:]
    ]


def ade20k(root: Path) -> None:
    for number, split in enumerate(("training", "validation")):
        picture(root / f"images/{split}/ADE_{split}_1.jpg", number)
        target(root / f"annotations/{split}/ADE_{split}_1.png", [[0, 1, 2, 3], [0, 3, 3, 255]])


def test_ade20k_begins_its_classes_at_id_1(tmp_path: Path):
    ade20k(tmp_path)
    store = prepared(layout(tmp_path, "ade20k", reduce_zero_label=True))
    assert [entry.name for entry in store.split("train").entries] == ["training/ADE_training_1"]
    assert [entry.name for entry in store.split("val").entries] == ["validation/ADE_validation_1"]
    assert len(store.split("test")) == 0
    assert store.split("val")[0][1].tolist() == [[255, 0, 1, 2], [255, 2, 2, 255]]
    assert store.pixels == [1, 1, 3]


def test_an_ignore_index_below_255_is_kept_by_reduce_zero_label(tmp_path: Path):
    ade20k(tmp_path)
    target(tmp_path / "annotations/training/ADE_training_1.png", [[0, 1, 2, 3], [9, 3, 3, 9]])
    target(tmp_path / "annotations/validation/ADE_validation_1.png", [[0, 1, 2, 3], [9, 3, 3, 9]])
    store = prepared(layout(tmp_path, "ade20k", reduce_zero_label=True, ignore_index=9))
    assert store.split("train")[0][1].tolist() == [[9, 0, 1, 2], [9, 2, 2, 9]]


def test_ids_are_judged_as_the_file_has_them(tmp_path: Path):
    ade20k(tmp_path)
    target(tmp_path / "annotations/validation/ADE_validation_1.png", [[0, 1, 2, 3], [4, 3, 3, 254]])
    assert refused(layout(tmp_path, "ade20k", reduce_zero_label=True)) == [
        "annotations/validation/ADE_validation_1.png: class ids 4, 254 are neither below 4 (the "
        "number of data.classes, and one for reduce_zero_label) nor data.ignore_index 255"
    ]
    assert refused(layout(tmp_path, "ade20k"))[0].startswith(
        "annotations/training/ADE_training_1.png: class ids 3 are neither below 3 (the number of "
        "data.classes) nor"
    )


def test_what_ade20k_lacks_is_named(tmp_path: Path):
    ade20k(tmp_path)
    picture(tmp_path / "images/training/ADE_training_2.jpg")
    target(tmp_path / "annotations/validation/ADE_validation_2.png", [[0]])
    picture(tmp_path / "images/testing/ADE_testing_1.jpg")
    records, problems = read_layout(layout(tmp_path, "ade20k"))
    assert len(records) == 2
    assert problems == [
        "images/training/ADE_training_2.jpg: no target",
        "annotations/validation/ADE_validation_2.png: no image",
    ]


NAMES = [f"class {number}" for number in range(19)]
CITY = {"classes": NAMES, "palette": [[number] * 3 for number in range(19)]}
# Every label id of https://github.com/mcordts/cityscapesScripts, and its train id.
LABEL_IDS = [[*range(17)], [*range(17, 34)]]
TRAIN_IDS = [
    [255, 255, 255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255],
    [5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18],
]


def cityscapes(root: Path, split: str, name: str, kind: str, ids: list[list[int]]) -> None:
    path = root / f"leftImg8bit/{split}/{name}_leftImg8bit.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(hash_of(split + name), (2, 17))).save(path)
    for suffix, content in ((kind, ids), ("instanceIds", [[0]]), ("color", [[0]])):
        target(root / f"gtFine/{split}/{name}_gtFine_{suffix}.png", content)


def hash_of(text: str) -> int:
    return sum(text.encode())


def test_cityscapes_label_ids_become_train_ids_where_these_are_not_there(tmp_path: Path):
    cityscapes(tmp_path, "train", "ulm/ulm_000000_000019", "labelIds", LABEL_IDS)
    cityscapes(tmp_path, "val", "bonn/bonn_000001_000019", "labelTrainIds", TRAIN_IDS)
    target(tmp_path / "gtFine/val/bonn/bonn_000001_000019_gtFine_labelIds.png", [[99]])
    void = [[0, 1, 2, 3] * 4 + [0]] * 2
    cityscapes(tmp_path, "test", "berlin/berlin_000000_000019", "labelIds", void)
    picture(tmp_path / "leftImg8bit/train_extra/nuremberg/nuremberg_0_leftImg8bit.png")
    store = prepared(layout(tmp_path, "cityscapes", **CITY))
    names = {split: [e.name for e in store.split(split).entries] for split in ("train", "val")}
    assert names == {
        "train": ["train/ulm/ulm_000000_000019"],
        "val": ["val/bonn/bonn_000001_000019"],
    }
    assert len(store.split("test")) == 0
    for split in ("train", "val"):
        assert store.split(split)[0][1].tolist() == TRAIN_IDS


def test_cityscapes_without_its_test_targets_is_whole(tmp_path: Path):
    cityscapes(tmp_path, "train", "ulm/ulm_0", "labelIds", LABEL_IDS)
    cityscapes(tmp_path, "val", "bonn/bonn_1", "labelIds", LABEL_IDS)
    picture(tmp_path / "leftImg8bit/test/berlin/berlin_0_leftImg8bit.png")
    records, problems = read_layout(layout(tmp_path, "cityscapes", **CITY))
    assert ([record.split for record in records], problems) == (["train", "val"], [])


def test_a_cityscapes_label_that_does_not_exist_is_refused(tmp_path: Path):
    cityscapes(tmp_path, "train", "ulm/ulm_0", "labelIds", LABEL_IDS)
    cityscapes(tmp_path, "val", "bonn/bonn_1", "labelIds", [[34, 7, *[99] * 15]] * 2)
    (line,) = refused(layout(tmp_path, "cityscapes", **CITY))
    assert line.startswith("gtFine/val/bonn/bonn_1_gtFine_labelIds.png: class ids 34, 99 are neith")


def test_a_cityscapes_image_without_labels_is_named(tmp_path: Path):
    cityscapes(tmp_path, "train", "ulm/ulm_0", "labelIds", LABEL_IDS)
    cityscapes(tmp_path, "train", "ulm/ulm_1", "polygons", LABEL_IDS)
    _, problems = read_layout(layout(tmp_path, "cityscapes", **CITY))
    assert problems == ["leftImg8bit/train/ulm/ulm_1_leftImg8bit.png: no target"]


def voc(root: Path) -> None:
    for number, name in enumerate(("2007_1", "2007_2", "2007_3")):
        picture(root / f"JPEGImages/{name}.jpg", number)
    for name in ("2007_1", "2007_2"):
        path = root / f"SegmentationClass/{name}.png"
        path.parent.mkdir(exist_ok=True)
        ids = Image.fromarray(np.array([[0, 1, 2, 255], [255, 2, 2, 2]], np.uint8))
        ids.putpalette([9, 9, 9, 128, 0, 0, 0, 128, 0, *[224] * 759])
        ids.save(path)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_2\n", encoding="utf-8")
    (lists / "val.txt").write_text("2007_1\n", encoding="utf-8")
    (lists / "test.txt").write_text("2008_1\n", encoding="utf-8")


def test_voc_is_read_by_its_lists(tmp_path: Path):
    voc(tmp_path)
    store = prepared(layout(tmp_path, "voc"))
    assert [e.name for e in store.split("train").entries] == ["2007_2"]
    assert [e.name for e in store.split("val").entries] == ["2007_1"]
    assert store.split("val")[0][1].tolist() == [[0, 1, 2, 255], [255, 2, 2, 2]]
    assert store.pixels == [1, 1, 4]


def test_what_voc_lacks_is_named(tmp_path: Path):
    voc(tmp_path)
    lists = tmp_path / "ImageSets/Segmentation"
    (lists / "val.txt").write_text("2007_1\n2007_3\n2007_4\n2007_2\n", encoding="utf-8")
    assert read_layout(layout(tmp_path, "voc"))[1] == [
        "JPEGImages/2007_3.jpg: no target",
        "ImageSets/Segmentation/val.txt: there is no image 2007_4",
        "ImageSets/Segmentation/val.txt: 2007_2 is listed in train.txt already",
    ]


COLOURS = {"color_map": [[0, 0, 0], [255, 0, 128], [1, 2, 3]]}


def coloured(root: Path, name: str, pixels: list[list[list[int]]], mode: str = "RGB") -> None:
    picture(root / f"images/{name}.png", hash_of(name))
    path = root / f"targets/{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(pixels, np.uint8))
    (image.quantize(8) if mode == "P" else image.convert(mode)).save(path)


PIXELS = [[[0, 0, 0], [255, 0, 128], [1, 2, 3], [1, 2, 3]]] * 2


def test_coloured_targets_are_read_by_the_colour_map(tmp_path: Path):
    for name, mode in (("train/a", "RGB"), ("train/b", "RGBA"), ("val/c", "P")):
        coloured(tmp_path, name, PIXELS, mode)
    store = prepared(data_params(tmp_path, **COLOURS))
    for split in (store.split("train"), store.split("val")):
        for _, ids in split:
            assert ids.tolist() == [[0, 1, 2, 2]] * 2
    assert store.pixels == [4, 4, 8]


def test_the_first_colour_is_ignored_with_reduce_zero_label(tmp_path: Path):
    coloured(tmp_path, "train/a", PIXELS)
    coloured(tmp_path, "val/b", PIXELS)
    changes = {"classes": ["a", "b"], "palette": [[0] * 3, [1] * 3], "reduce_zero_label": True}
    store = prepared(data_params(tmp_path, **COLOURS, **changes))
    assert store.split("val")[0][1].tolist() == [[255, 0, 1, 1]] * 2


def test_a_colour_outside_the_map_is_named_with_its_file(tmp_path: Path):
    coloured(tmp_path, "train/a", PIXELS)
    coloured(tmp_path, "val/b", [[[0, 0, 0], [255, 0, 129], [3, 2, 1], [255, 255, 255]]] * 2)
    coloured(
        tmp_path, "val/c", [[[n, 0, 0] for n in range(1, 5)], [[0, n, 0] for n in range(5, 9)]]
    )
    write(tmp_path, "train/grey", photo(77), labels())
    assert refused(data_params(tmp_path, **COLOURS)) == [
        "targets/train/grey.png: colours [1, 1, 1], [2, 2, 2], [255, 255, 255] are not in "
        "data.format.color_map; if it holds ids, set that to null",
        "targets/val/b.png: colours [3, 2, 1], [255, 0, 129], [255, 255, 255] are not in "
        "data.format.color_map",
        "targets/val/c.png: colours [0, 5, 0], [0, 6, 0], [0, 7, 0], [0, 8, 0], [1, 0, 0], "
        "[2, 0, 0], [3, 0, 0], [4, 0, 0] are not in data.format.color_map",
    ]


def test_16_bit_targets_work_from_the_file_to_the_shard(tmp_path: Path):
    for name in ("train/a", "val/b"):
        picture(tmp_path / f"images/{name}.png", hash_of(name))
        target(tmp_path / f"targets/{name}.png", [[0, 1, 2, 255], [2, 2, 2, 2]], np.uint16)
    store = prepared(data_params(tmp_path))
    assert store.split("train")[0][1].tolist() == [[0, 1, 2, 255], [2, 2, 2, 2]]
    target(tmp_path / "targets/val/b.png", [[0, 1, 2, 256], [2, 2, 65535, 3]], np.uint16)
    (line,) = refused(data_params(tmp_path))
    assert line.startswith("targets/val/b.png: class ids 3, 256, 65535 are neither below 3")


def test_the_first_target_suffix_that_exists_wins(tmp_path: Path):
    for name in ("train/a", "train/b", "val/c", "val/d"):
        picture(tmp_path / f"images/{name}.jpg")
    for name in ("train/a_mask", "train/a", "train/b", "val/c_mask", "val/e_mask", "val/d_map"):
        target(tmp_path / f"targets/{name}.png", [[0]])
    records, problems = read_layout(data_params(tmp_path, target_suffixes=["_mask", ""]))
    assert [(r.name, Path(r.target).name) for r in records] == [
        ("train/a", "a_mask.png"),
        ("train/b", "b.png"),
        ("val/c", "c_mask.png"),
    ]
    assert problems == [
        "images/val/d.jpg: no target",
        "targets/val/d_map.png: no image",
        "targets/val/e_mask.png: no image",
    ]


def test_the_suffix_that_all_targets_have_is_named(tmp_path: Path):
    for name in ("train/a", "train/a 2", "val/b"):
        picture(tmp_path / f"images/{name}.jpg")
        target(tmp_path / f"targets/{name}_mask.png", [[0]])
    assert read_layout(data_params(tmp_path)) == (
        [],
        [
            "targets: the targets' names add '_mask' to their images'; "
            "set data.format.target_suffixes: [_mask]"
        ],
    )
    assert len(read_layout(data_params(tmp_path, target_suffixes=["_mask"]))[0]) == 3


def test_files_list_the_splits_of_pairs(tmp_path: Path):
    for number in range(5):
        write(tmp_path, f"{number}", photo(number), labels())
    (tmp_path / "targets/4.png").unlink()
    (tmp_path / "train.txt").write_text("2\n0.png\n", encoding="utf-8")
    (tmp_path / "val.txt").write_text("3\n", encoding="utf-8")
    listed = data_params(tmp_path, **{"splits.source": "files"})
    records, problems = read_layout(listed)
    assert [(r.name, r.split) for r in records] == [("0", "train"), ("2", "train"), ("3", "val")]
    assert problems == []
    (tmp_path / "test.txt").write_text("3\n4\n5\n", encoding="utf-8")
    assert read_layout(listed)[1] == [
        "images/4.png: no target",
        "test.txt: 3 is listed in val.txt already",
        "test.txt: there is no image 5",
    ]


def test_pairs_without_test_targets_are_whole_and_train_ones_are_not(tmp_path: Path):
    for name in ("train/a", "val/b", "test/c"):
        write(tmp_path, name, photo(0), labels())
    (tmp_path / "targets/test/c.png").unlink()
    assert read_layout(data_params(tmp_path))[1] == []
    (tmp_path / "targets/train/a.png").unlink()
    assert read_layout(data_params(tmp_path))[1] == ["images/train/a.png: no target"]


def test_a_folder_without_a_usable_file_is_named(tmp_path: Path):
    write(tmp_path, "train/a", photo(0), labels())
    (tmp_path / "targets/train/a.png").rename(tmp_path / "targets/train/a.jpg")
    assert read_layout(data_params(tmp_path)) == (
        [],
        [
            "targets: no .png, .bmp, .tif, .tiff file, but 1 .jpg; JPEG changes ids along every "
            "edge: save the targets' source as PNG"
        ],
    )


def test_without_images_the_lists_are_not_blamed(tmp_path: Path):
    voc(tmp_path)
    (tmp_path / "JPEGImages").rename(tmp_path / "JPEGs")
    (line,) = read_layout(layout(tmp_path, "voc"))[1]
    assert line.startswith("JPEGImages: no such folder; data.root and, for pairs")


def test_the_folds_of_a_data_set_cover_it(tmp_path: Path):
    for number in range(10):
        write(tmp_path, f"{number}", photo(number), labels())
    seen = []
    for fold in range(3):
        changes = {"source": "drawn", "test": 0.1, "folds": 3, "fold": fold}
        params = data_params(tmp_path, **{f"splits.{k}": v for k, v in changes.items()})
        records, problems = read_layout(params)
        assert (len(records), problems) == (10, [])
        seen += [record.name for record in records if record.split != "train"]
    tested = [name for name in set(seen) if seen.count(name) == 3]
    assert len(tested) == 1
    assert sorted(set(seen)) == [str(number) for number in range(10)]
    assert len(seen) == 9 + 3


def test_a_tiff_that_would_be_turned_is_refused(tmp_path: Path):
    for name in ("train/a", "val/b", "test/c"):
        picture(tmp_path / f"images/{name}.png", len(name) + ord(name[-1]))
        target(tmp_path / f"targets/{name}.png", [[0, 1, 2, 0], [0, 1, 2, 0]])
    turned = tmp_path / "images/train/a.tif"
    Image.fromarray(photo(0, (2, 4))).save(turned, tiffinfo={274: 3})
    (tmp_path / "images/train/a.png").unlink()
    assert refused(layout(tmp_path, "pairs")) == [
        "images/train/a.tif: its orientation tag turns it; save it upright, without the tag"
    ]


def test_links_that_dvc_does_not_follow_are_refused(tmp_path: Path):
    root = tmp_path / "root"
    for name in ("train/a", "val/b", "test/c"):
        picture(root / f"images/{name}.png", ord(name[-1]))
        target(root / f"targets/{name}.png", [[0, 1, 2, 0], [0, 1, 2, 0]])
    (root / "images/test").rename(tmp_path / "elsewhere")
    (root / "images/test").symlink_to(tmp_path / "elsewhere")
    (root / "targets/val/gone.png").symlink_to(tmp_path / "nothing")
    _, problems = read_layout(layout(root, "pairs"))
    assert problems[:2] == [
        "images/test: a link to a folder, which DVC does not follow; put the files there",
        "targets/val/gone.png: a link to nothing, which DVC does not follow; put the files there",
    ]
