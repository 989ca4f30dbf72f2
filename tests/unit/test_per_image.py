"""What an evaluation keeps of every image: its areas by hand, and its file."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.disk import file_md5
from pipeline.evaluation.metrics import image_areas
from pipeline.evaluation.per_image import Origin, PerImage

TARGETS = [[[0, 0, 1, 255]], [[1, 1], [2, 2]]]
PREDICTIONS = [[[0, 1, 1, 2]], [[1, 1], [1, 2]]]
ORIGIN = Origin(
    classes=["a", "b", "ü"],
    params={"train": {"seed": 0}},
    code="c" * 32,
    data="d" * 32,
    fold=None,
)


@pytest.fixture
def measured() -> PerImage:
    """Two images, told in the order in which two ranks might have measured them."""
    found = [
        image_areas(
            number,
            np.array(TARGETS[number], np.uint8),
            np.array(PREDICTIONS[number], np.uint8),
            num_classes=3,
            ignore_index=255,
        )
        for number in (1, 0)
    ]
    return PerImage.of(ORIGIN, ["left", "right"], ["patient", "patient"], found)


def test_areas_are_counted_in_both_maps_in_the_target_and_in_the_prediction(measured: PerImage):
    assert measured.areas().tolist() == [
        [[1, 1, 0], [2, 1, 0], [1, 2, 0]],
        [[0, 2, 1], [0, 2, 2], [0, 3, 1]],
    ]


def test_the_sum_of_all_images_is_the_confusion_matrix(measured: PerImage):
    assert measured.confusion().tolist() == [[1, 1, 0], [0, 3, 0], [0, 1, 1]]


def test_a_file_gives_back_what_was_saved(measured: PerImage, tmp_path: Path):
    path = tmp_path / "one" / "per_image.npz"
    measured.save(path)
    again = PerImage.load(path.read_bytes(), path)
    assert again.origin == ORIGIN
    assert again.names.tolist() == ["left", "right"]
    assert again.groups.tolist() == ["patient", "patient"]
    assert np.array_equal(again.areas(), measured.areas())
    assert np.array_equal(again.boundary, measured.boundary)
    assert again.boundary.shape == (2, 2, 3)


def test_equal_results_are_equal_files(measured: PerImage, tmp_path: Path):
    measured.save(tmp_path / "one.npz")
    PerImage.load((tmp_path / "one.npz").read_bytes(), tmp_path).save(tmp_path / "other.npz")
    assert file_md5(tmp_path / "one.npz") == file_md5(tmp_path / "other.npz")


def test_what_is_no_such_file_is_refused_by_name(measured: PerImage, tmp_path: Path):
    path = tmp_path / "per_image.npz"
    measured.save(path)
    with pytest.raises(ValueError, match=r"cut\.npz: not the results of an evaluation"):
        PerImage.load(path.read_bytes()[:-40], Path("cut.npz"))
    with pytest.raises(ValueError, match=r"text\.npz: not the results of an evaluation"):
        PerImage.load(b"text", Path("text.npz"))
    with pytest.raises(ValueError, match=r"empty.npz: not the results of an evaluation"):
        PerImage.load(b"", Path("empty.npz"))
    np.savez(path, names=np.array(["a"]))
    with pytest.raises(ValueError, match="not the results of an evaluation"):
        PerImage.load(path.read_bytes(), path)
