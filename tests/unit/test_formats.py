"""What a layout on disk says: the tiles of Blue Marble, splits, and ids kept as they are stored."""

import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.data.files import read_ids
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


def read(folder: Path, target: Image.Image, suffix: str = ".png") -> np.ndarray:
    Image.fromarray(photo(0)).save(folder / "image.png")
    target.save(folder / f"target{suffix}")
    record = Record("x", str(folder / "image.png"), str(folder / f"target{suffix}"), "train")
    image, ids = data_params(folder).reader().read(record)
    assert np.array_equal(image, photo(0))
    return ids


def test_a_palette_target_keeps_its_indices(tmp_path: Path):
    target = Image.fromarray(labels())
    target.putpalette([90, 90, 90, 0, 0, 0, *range(250, 256), *[7] * 756])
    assert target.mode == "P"
    assert np.array_equal(read(tmp_path, target), labels())


def test_a_palette_target_of_few_bits_keeps_its_indices(tmp_path: Path):
    ids = labels() % 3
    target = Image.fromarray(ids)
    target.putpalette([90, 90, 90, 0, 0, 0, 255, 255, 255])
    assert np.array_equal(read(tmp_path, target), ids)
    assert (tmp_path / "target.png").read_bytes()[24] == 2  # bits a pixel


def test_a_16_bit_target_is_exact(tmp_path: Path):
    ids = np.array([[0, 1, 255], [256, 40000, 65535]], np.uint16)
    found = read(tmp_path, Image.fromarray(ids))
    assert found.dtype == np.uint16
    assert np.array_equal(found, ids)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_a_one_bit_target_has_ids_0_and_1(suffix: str, tmp_path: Path):
    ids = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    assert np.array_equal(read(tmp_path, Image.fromarray(ids > 0), suffix), ids)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_an_8_bit_grey_target_is_taken_as_it_is(suffix: str, tmp_path: Path):
    assert np.array_equal(read(tmp_path, Image.fromarray(labels()), suffix), labels())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_a_coloured_target_is_refused_by_its_name(mode: str, tmp_path: Path):
    suffix = ".tif" if mode == "F" else ".png"
    with pytest.raises(ValueError, match=rf"target\{suffix}: a target holds one class id a pixel"):
        read(tmp_path, Image.fromarray(photo(0)).convert(mode), suffix)


def test_32_bit_ids_out_of_range_are_refused(tmp_path: Path):
    ids = np.array([[0, 70000]], np.int32)
    with pytest.raises(ValueError, match=r"target\.tif: ids from 0 to 70000 are out of range"):
        read(tmp_path, Image.fromarray(ids), ".tif")


@pytest.mark.parametrize("policy", ["apply", "ignore"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_by_exif_as_viewers_do_unless_it_is_not_to(
    orientation: int, policy: str, tmp_path: Path
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "images/train/a.png"
    write(tmp_path, "train/a", photo(0), labels())
    Image.fromarray(photo(0)).save(path, exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    image = shown if policy == "apply" else photo(0)
    Image.fromarray(labels(image.shape[:2])).save(tmp_path / "targets/train/a.png")
    reader = data_params(tmp_path, exif=policy).reader()
    read, ids = reader.read(reader.records()[0][0])
    assert np.array_equal(read, image)
    assert ids.shape == image.shape[:2]


@pytest.mark.parametrize(
    ("policy", "size", "drawn"),
    [("apply", (12, 16), "stored"), ("ignore", (16, 12), "shown")],
)
def test_a_target_of_the_other_orientation_is_refused_with_the_remedy(
    policy: str, size: tuple[int, int], drawn: str, tmp_path: Path
):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, _ = write(tmp_path, "train/a", photo(0), labels(size))
    Image.fromarray(photo(0)).save(image, exif=exif)
    reader = data_params(tmp_path, exif=policy).reader()
    other = "ignore" if policy == "apply" else "apply"
    message = f"drawn for the photograph as it is {drawn}, .* set data.exif: {other}"
    with pytest.raises(ValueError, match=message):
        reader.read(reader.records()[0][0])


def test_a_target_that_viewers_turn_is_refused(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 3
    _, target = write(tmp_path, "train/a", photo(0), labels())
    Image.fromarray(labels()).save(target, exif=exif)
    reader = data_params(tmp_path).reader()
    with pytest.raises(ValueError, match=r"targets/train/a\.png: its orientation tag turns it"):
        reader.read(reader.records()[0][0])


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.97])
def test_a_truncated_image_is_refused_by_its_name(suffix: str, kept: float, tmp_path: Path):
    image, target = write(tmp_path, "train/a", photo(0, (60, 80)), labels((60, 80)), suffix)
    image.write_bytes(image.read_bytes()[: int(image.stat().st_size * kept)])
    record = Record("train/a", str(image), str(target), "train")
    with pytest.raises(ValueError, match=f"train/a{suffix}: can't be read as an image"):
        data_params(tmp_path).reader().read(record)


@pytest.mark.parametrize("kept", [0, 0.1, 0.5, 0.9])
def test_a_truncated_target_is_refused_by_its_name(kept: float, tmp_path: Path):
    ids = photo(1, (60, 80))[..., 0] % 3
    image, target = write(tmp_path, "train/a", photo(0, (60, 80)), ids)
    target.write_bytes(target.read_bytes()[: int(target.stat().st_size * kept)])
    record = Record("train/a", str(image), str(target), "train")
    with pytest.raises(ValueError, match=r"train/a\.png: can't be read as a target"):
        data_params(tmp_path).reader().read(record)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_grey_target_of_few_bits_keeps_its_ids(bits: int, tmp_path: Path):
    ids = np.array([[0, 1, 2, 3]], np.uint8)
    packed = "".join(format(i, f"0{bits}b") for i in ids[0])
    row = b"\0" + bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    assert read_ids(tmp_path / "a.png").tolist() == ids.tolist()
