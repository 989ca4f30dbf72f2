"""What a layout on disk says: the tiles of Blue Marble, and splits."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.formats import BlueMarble, Reader, Record
from tests.unit.pairs import data_params, labels, photo, write
from tests.unit.sections import params


@pytest.fixture(scope="module")
def earth() -> tuple[Reader, list[Record]]:
    reader = params({}).data.reader()
    assert isinstance(reader, BlueMarble)
    records, problems = reader.records()
    assert problems == []
    return reader, records


def corner(record: Record) -> tuple[int, int]:
    row, column = re.fullmatch(r"r(\d{4})_c(\d{4})", record.name).groups()
    return int(row), int(column)


def test_blue_marble_has_112_37_and_81_tiles(earth: tuple[Reader, list[Record]]):
    assert Counter(r.split for r in earth[1]) == {"train": 112, "val": 37, "test": 81}


def test_no_pixel_of_the_earth_is_in_two_tiles(earth: tuple[Reader, list[Record]]):
    seen = np.zeros((2700, 5400), int)
    for row, column in map(corner, earth[1]):
        seen[row : row + 128, column : column + 128] += 1
    assert seen.max() == 1
    assert seen.sum() == len(earth[1]) * 128**2


def test_splits_are_bands_of_longitude(earth: tuple[Reader, list[Record]]):
    bands = {"train": (-180, 20), "val": (20, 60), "test": (60, 180)}
    for record in earth[1]:
        row, column = corner(record)
        west, east = bands[record.split]
        assert west <= column / 15 - 180
        assert (column + 128) / 15 - 180 <= east
        assert 90 - row / 15 <= 75
        assert 90 - (row + 128) / 15 >= -60


def test_every_tile_holds_a_coast_or_a_lake(earth: tuple[Reader, list[Record]]):
    reader, records = earth
    for record in records:
        image, target = reader.read(record)
        assert image.shape == (128, 128, 3)
        assert target.shape == (128, 128)
        assert set(np.unique(target)) <= {0, 1, 2}
        land, lake = (target == 1).mean(), (target == 2).mean()
        assert 0.03 <= land <= 0.97 or lake > 0.01


def test_the_ocean_is_bluer_than_the_land(earth: tuple[Reader, list[Record]]):
    # The image is RGB, and image and mask lie on each other.
    reader, records = earth
    blueness: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for record in records:
        image, target = reader.read(record)
        for label, found in blueness.items():
            pixels = image[target == label].astype(int)
            found.append(pixels[:, 2] - pixels[:, 0])
    ocean, land = (np.concatenate(blueness[label]) for label in (0, 1))
    assert (ocean > 5).mean() > 0.9
    assert (land > 5).mean() < 0.3


def test_given_splits_are_the_first_folder(tmp_path: Path):
    for name in ("val/x/1", "train/2", "train/1", "test/1"):
        write(tmp_path, name, photo(0), labels())
    records, problems = data_params(tmp_path).reader().records()
    assert problems == []
    assert [(r.name, r.split) for r in records] == [
        ("train/1", "train"),
        ("train/2", "train"),
        ("val/x/1", "val"),
        ("test/1", "test"),
    ]


def test_drawn_splits_need_no_folders(tmp_path: Path):
    for number in range(10):
        write(tmp_path, f"{number}", photo(0), labels())
    drawn = data_params(tmp_path, **{"splits.source": "drawn", "splits.val": 0.2})
    records, problems = drawn.reader().records()
    assert problems == []
    assert Counter(r.split for r in records) == {"train": 6, "val": 2, "test": 2}


def test_layout_problems_are_named(tmp_path: Path):
    write(tmp_path, "train/a", photo(0), labels())
    write(tmp_path, "elsewhere/b", photo(0), labels())
    image_only = write(tmp_path, "train/c", photo(0), labels())
    image_only[1].unlink()
    target_only = write(tmp_path, "train/d", photo(0), labels())
    target_only[0].unlink()
    write(tmp_path, "train/a", photo(0), labels(), ".jpg")
    (tmp_path / "images/train/.hidden.png").write_bytes(b"")
    (tmp_path / "images/train/notes.txt").write_bytes(b"")
    records, problems = data_params(tmp_path).reader().records()
    assert [r.name for r in records] == ["train/a"]
    images = tmp_path / "images"
    assert problems == [
        f"{images}/train/a.png: same stem as a.jpg; keep one of them",
        f"{images}/train/c.png: no target",
        f"{tmp_path}/targets/train/d.png: no image",
        f"{images}/elsewhere/b.png: with given splits the folder must be train, val or test",
    ]


def test_a_missing_folder_is_named(tmp_path: Path):
    records, problems = data_params(tmp_path).reader().records()
    assert records == []
    assert [line.split(": ")[:2] for line in problems] == [
        [
            str(tmp_path / "images"),
            "no such folder; data.root and, for pairs, data.format.images and "
            "targets name it, and in a --temp or queued run it must be tracked by git or "
            "`dvc add`",
        ],
        [str(tmp_path / "targets"), problems[1].split(": ")[1]],
    ]


def test_jpeg_targets_are_named_as_what_they_are(tmp_path: Path):
    for number in range(3):
        write(tmp_path, f"train/{number}", photo(number), labels(), ".jpg")[1].rename(
            tmp_path / f"targets/train/{number}.jpg"
        )
    _, (said,) = data_params(tmp_path).reader().records()
    assert said.startswith(f"{tmp_path / 'targets'}: no .png, ")
    assert "file, but 3 .jpg; JPEG changes ids along every edge: save" in said
