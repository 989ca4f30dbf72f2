"""The audit: every finding by name, all at once, and nothing left behind."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.audit import id_counts, prepare
from pipeline.data.splits import SPLITS
from pipeline.data.store import Store
from tests.unit.pairs import MISSING_C, data_params, labels, photo, refusal, write


def test_every_problem_of_the_files_is_told_at_once(tmp_path: Path):
    for number, split in enumerate(("train", "val", "test")):
        write(tmp_path, f"{split}/good", photo(number), labels())
    truncated, _ = write(tmp_path, "train/truncated", photo(3, (60, 80)), labels((60, 80)), ".jpg")
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    _, empty = write(tmp_path, "val/empty", photo(4), labels())
    empty.write_bytes(b"")
    write(tmp_path, "test/small", photo(5), labels((11, 16)))
    strange = labels()
    strange[3, :3] = (3, 7, 254)
    write(tmp_path, "train/strange", photo(6), strange)
    write(tmp_path, "train/many", photo(7), np.arange(3, 195, dtype=np.uint8).reshape(12, 16))
    write(tmp_path, "train/high", photo(8), labels().astype(np.uint16) + 256)
    write(tmp_path, "test/coloured", photo(9), photo(9))
    write(tmp_path, "val/copy", photo(0), labels())
    write(tmp_path, "val/untargeted", photo(10), labels())[1].unlink()
    write(tmp_path, "val/unpictured", photo(11), labels())[0].unlink()
    write(tmp_path, "train/good", photo(0), labels(), ".bmp")

    found = refusal(tmp_path)
    bad_ids = "are neither below 3 (the number of data.classes) nor data.ignore_index 255"
    expected = [
        "images/train/truncated.jpg: can't be read as an image",
        "targets/val/empty.png: can't be read as a target",
        "images/test/small.png: 16x12 pixels, but its target targets/test/small.png has 16x11",
        f"targets/train/strange.png: class ids 3, 7, 254 {bad_ids}",
        f"targets/train/many.png: class ids 3, 4, 5, 6, 7, 8, 9, 10, ... {bad_ids}",
        f"targets/train/high.png: class ids 256, 257, 258, 511 {bad_ids}",
        "targets/test/coloured.png: a target holds one class id a pixel, and this is RGB",
        "the same image in train (train/good) and val (val/copy)",
        "images/val/untargeted.png: no target",
        "targets/val/unpictured.png: no image",
        "images/train/good.png: same stem as good.bmp; keep one of them",
    ]
    for line in expected:
        assert sum(one.startswith(line) for one in found) == 1, (line, found)
    assert len(found) == len(expected)


def test_a_class_without_a_pixel_in_train_is_let_through_where_that_is_asked_for(tmp_path: Path):
    write(tmp_path, "train/1", photo(0, (1, 4)), np.array([[0, 0, 1, 255]], np.uint8))
    write(tmp_path, "val/1", photo(1, (1, 4)), np.array([[2, 1, 0, 0]], np.uint8))
    assert refusal(tmp_path) == [MISSING_C]
    allowed = data_params(tmp_path, allow_missing_classes=True)
    prepare(allowed, tmp_path / "prepared", lambda done, total: None)
    store = Store(tmp_path / "prepared")
    assert store.classes == ("a", "b", "c")
    assert store.pixels == [2, 1, 0]
    assert store.frequency == [2 / 3, 1 / 3, 0]
    assert store.split("val")[0][1].tolist() == [[2, 1, 0, 0]]


@pytest.mark.parametrize("withheld", ["val", "test"])
def test_a_split_without_labels_is_left_out(withheld: str, tmp_path: Path):
    other = {"val": "test", "test": "val"}[withheld]
    write(tmp_path, "train/1", photo(1), labels())
    write(tmp_path, f"{other}/1", photo(2), labels())
    write(tmp_path, f"{withheld}/1", photo(3), np.full((12, 16), 255, np.uint8))
    prepare(data_params(tmp_path), tmp_path / "prepared", lambda done, total: None)
    store = Store(tmp_path / "prepared")
    assert {split: len(store.split(split)) for split in ("train", other, withheld)} == {
        "train": 1,
        other: 1,
        withheld: 0,
    }
    assert set(store.shards) == {"train-00000.bin", f"{other}-00000.bin"}
    assert not (tmp_path / f"prepared/{withheld}-00000.bin").exists()


def test_a_missing_folder_is_told_without_its_consequences(tmp_path: Path):
    found = refusal(tmp_path, images="pictures")
    assert len(found) == 2
    assert found[0].startswith("pictures: no such folder; data.root")
    assert found[1].startswith("targets: no such folder")


def test_a_good_data_set_is_packed_counted_and_summarized(tmp_path: Path):
    for number, split in enumerate(("train", "train", "val", "test")):
        write(tmp_path, f"{split}/{number}", photo(number), labels())
    calls: list[tuple[int, int]] = []
    params = data_params(tmp_path, name="shoes")
    prepare(params, tmp_path / "prepared", lambda done, total: calls.append((done, total)))
    assert calls[-1] == (4, 4)
    store = Store(tmp_path / "prepared")
    assert (store.name, store.classes, store.ignore_index) == ("shoes", ("a", "b", "c"), 255)
    assert store.palette == params.palette
    summary = (tmp_path / "prepared/summary.json").read_text(encoding="utf-8")
    counts = np.bincount(labels().ravel(), minlength=256)
    assert store.pixels == (2 * counts[:3]).tolist()
    assert [entry.classes for entry in store.split("train").entries] == [(0, 1, 2), (0, 1, 2)]
    for piece in (
        '"images": 2',
        f'"a": {2 * counts[0]}',
        f'"b": {2 * counts[1]}',
        f'"c": {2 * counts[2]}',
        '"ignored_pixels": 2',
    ):
        assert piece in summary


def test_a_class_is_as_frequent_as_in_the_images_of_train_that_show_it(tmp_path: Path):
    """Class a fills 3 of 5 and 4 of 4 labelled pixels, b 2 of 5, c 6 of 6."""
    targets = {
        "train/1": [[0, 0, 0, 255], [1, 1, 255, 255]],
        "train/2": [[0, 0, 0, 0], [255] * 4],
        "train/3": [[2, 2, 2, 2], [2, 2, 255, 255]],
        "val/1": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "test/1": [[2, 2, 2, 2], [1, 1, 1, 1]],
    }
    for number, (name, target) in enumerate(targets.items()):
        write(tmp_path, name, photo(number, (2, 4)), np.array(target, np.uint8))
    prepare(data_params(tmp_path), tmp_path / "prepared", lambda done, total: None)
    assert Store(tmp_path / "prepared").frequency == [7 / 9, 2 / 5, 1.0]


def test_masks_in_black_and_white_are_recognised_and_the_remedy_works(tmp_path: Path):
    two = {"classes": ["ground", "foot"], "palette": [[0, 0, 0], [255, 0, 0]]}
    white = np.where(labels() == 1, 255, 0).astype(np.uint8)
    for number, split in enumerate(("train", "val")):
        write(tmp_path, f"{split}/1", photo(number), white)
    *_, said = refusal(tmp_path, **two)
    assert "the targets hold the ids 0 and 255 alone, and 255 is data.ignore_index" in said
    assert "If white is 'foot', set data.format.color_map: [[0, 0, 0], [255, 255, 255]]" in said
    named = data_params(tmp_path, **two, color_map=[[0, 0, 0], [255, 255, 255]])
    prepare(named, tmp_path / "prepared", lambda done, total: None)
    packed = Store(tmp_path / "prepared").split("train")[0][1]
    assert np.array_equal(packed, labels() == 1)


def test_images_are_grouped_by_what_the_pattern_finds(tmp_path: Path):
    for number, name in enumerate(("train/p1_left", "train/p1_right", "train/p2", "val/other")):
        write(tmp_path, name, photo(number), labels())
    grouped = data_params(tmp_path, **{"splits.group_by": "p([0-9])"})
    prepare(grouped, tmp_path / "prepared", lambda done, total: None)
    store = Store(tmp_path / "prepared")
    entries = [*store.split("train").entries, *store.split("val").entries]
    assert [entry.group for entry in entries] == ["1", "1", "2", "val/other"]
    assert store.fold is None


def test_a_subset_is_so_many_images_of_each_split_at_equal_distances(tmp_path: Path):
    for number in range(6):
        write(tmp_path, f"train/{number}", photo(number), labels())
    write(tmp_path, "val/only", photo(6), labels())
    write(tmp_path, "train/9_broken", photo(7), labels())[0].write_bytes(b"")
    told: list[tuple[int, int]] = []
    folder = tmp_path / "prepared"
    prepare(data_params(tmp_path, subset=3), folder, lambda *counts: told.append(counts))
    store = Store(folder)
    names = {split: [entry.name for entry in store.split(split).entries] for split in SPLITS}
    assert names == {"train": ["train/0", "train/2", "train/4"], "val": ["val/only"], "test": []}
    assert told[-1] == (4, 4)
    assert any("train/9_broken" in line for line in refusal(tmp_path))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_pixels_of_each_id_are_counted(dtype: type[np.uint8 | np.uint16]):
    ids = np.array([[3, 0, 3], [1, 3, 1]], dtype)
    assert id_counts(ids).tolist() == [1, 2, 0, 3]
    assert id_counts(ids[:, ::-1]).tolist() == [1, 2, 0, 3]
    most = np.full((4097, 4097), 2, dtype)  # more than fp32 counts one by one
    assert id_counts(most).tolist() == [0, 0, 4097**2]
