"""Where wrong pixels are, on maps small enough to count."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.store import Split
from pipeline.data.table import Array, Entry
from pipeline.evaluation.errors import Part, by_size, confused, near_boundary, places


def split_of(folder: Path, *targets: Array) -> Split:
    entries, offset = [], 0
    with (folder / "a.bin").open("wb") as file:
        for number, target in enumerate(targets):
            height, width = target.shape
            shown = tuple(label for label in np.unique(target).tolist() if label != 255)
            entry = Entry(f"{number}", f"{number}", "a.bin", offset, height, width, shown)
            entries.append(entry)
            offset += file.write(bytes(3 * height * width) + target.tobytes())
    return Split(folder, entries)


def test_a_boundary_is_where_another_class_is_near_and_nothing_else():
    target = np.zeros((6, 8), np.uint8)
    target[:, 4:] = 1
    near = near_boundary(target, 1, 255)
    assert near.tolist() == [[False, False, False, True, True, False, False, False]] * 6
    target[:, 4] = 255  # what is not labelled is no other class, and hides the one behind it
    assert not near_boundary(target, 1, 255).any()
    assert (
        near_boundary(target, 2, 255)[0].tolist() == [*[False] * 3, True, False, True] + [False] * 2
    )


def test_errors_are_found_near_and_inside_and_by_region(tmp_path: Path):
    target = np.zeros((20, 30), np.uint8)  # a width of 1 pixel: 2% of 36
    target[:, 20:] = 1
    target[2, 2] = 1
    target[0] = 255
    prediction = target.copy()
    prediction[2, 2] = 0  # a region of one pixel, missed, and near itself
    prediction[5, 19] = 1  # at the boundary
    prediction[10, 5] = 1  # inside
    prediction[0, 5] = 1  # not labelled
    found = places(split_of(tmp_path, target), [prediction].__getitem__, 255)
    assert found.widths == (1, 1)
    assert found.near == Part(2 * 19 + 9, 2)
    assert found.inside == Part(19 * 30 - 47, 1)
    assert found.wrong == 3
    sizes = [(one.size, one.number, one.missed, one.part) for one in found.regions]
    assert sizes == [
        ("small", 1, 1, Part(1, 1)),
        ("medium", 1, 0, Part(190, 0)),
        ("large", 1, 0, Part(379, 2)),
    ]
    assert found.near.rate == pytest.approx(2 / 47)


def test_regions_touch_over_corners(tmp_path: Path):
    target = np.eye(6, dtype=np.uint8)
    found = places(split_of(tmp_path, target), [target].__getitem__, 255)
    assert sum(one.number for one in found.regions) == 2  # of class 1, and of class 0 through it


def test_regions_of_one_size_stay_together():
    assert [(one.size, one.number) for one in by_size(np.array([[4, 0]] * 5))] == [("small", 5)]
    assert by_size(np.zeros((0, 2), np.int64)) == []


def test_the_most_confused_pairs_come_first():
    confusion = np.array([[9, 2, 0], [5, 9, 0], [1, 0, 9]])
    pairs = confused(confusion, ["a", "b", "c"], 2)
    assert [(one.target, one.prediction, one.pixels) for one in pairs] == [
        ("b", "a", 5),
        ("a", "b", 2),
    ]
    assert [one.share for one in pairs] == [5 / 8, 2 / 8]
    assert confused(np.diag([1, 2]), ["a", "b"], 3) == []
