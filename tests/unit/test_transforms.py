"""Windows of the resized image against OpenCV's resize of the whole; every step of a draw."""

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from scipy.stats import ks_2samp

from pipeline.data.transforms import (
    AugmentationParams,
    Window,
    augment,
    distort,
    draw_window,
    fill_of,
    nearest_window,
    one_class_fills,
    pad,
    resize_window,
    resized,
)
from tests.unit.sections import params


def augmentation(**changes: object) -> AugmentationParams:
    still = {
        "crop_size": [24, 32],
        "scale": None,
        "ratio_range": [1.0, 1.0],
        "cat_max_ratio": 1.0,
        "flip": {"horizontal": 0.0, "vertical": 0.0},
        "photometric": False,
    }
    tree = {f"augmentation.{name}": value for name, value in (still | changes).items()}
    return params(tree).augmentation


def pictures() -> Iterator[tuple[np.random.Generator, np.ndarray, np.ndarray]]:
    for seed in range(150):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(2, 90, 2)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield rng, image, rng.integers(0, 256, (height, width), dtype=np.uint8)


def cases() -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int], Window]]:
    """Images, sizes to resize to (of a ratio, free and multiples), and windows inside."""
    for rng, image, target in pictures():
        free = (int(rng.integers(1, 150)), int(rng.integers(1, 150)))
        double = (2 * target.shape[0], 3 * target.shape[1])
        of_a_ratio = resized(target.shape, None, rng.uniform(0.3, 3))
        for size in (of_a_ratio, free, double, target.shape):
            height, width = (int(rng.integers(1, side + 1)) for side in size)
            top, left = (
                int(rng.integers(source * (side - window) // side + 1))
                for source, side, window in zip(target.shape, size, (height, width), strict=True)
            )
            yield image, target, size, Window(top, left, height, width)


def beginning(source: int, side: int, place: int) -> float:
    """Where a window begins in the stored image."""
    magnifies = place > 0 and side > source
    return place - 1 + side // source * source / side if magnifies else place


def taps(source: int, side: int, place: int, count: int) -> np.ndarray:
    """(count, source): how much each stored pixel weighs in each of a window."""
    at = beginning(source, side, place) + (np.arange(count) + 0.5) * source / side - 0.5
    return np.maximum(0, 1 - np.abs(at.clip(0, source - 1)[:, None] - np.arange(source)))


def test_a_window_of_the_image_is_the_bilinear_value_within_one_grey_level():
    for image, _, size, window in cases():
        rows, columns = (
            taps(image.shape[axis], size[axis], window[axis], window[2 + axis]) for axis in (0, 1)
        )
        exact = np.einsum("ih,hwc,jw->ijc", rows, image, columns, optimize=True)
        ours = resize_window(image, size, window)
        assert ours.dtype == np.uint8
        assert np.abs(ours - exact).max() < 1


def test_a_window_is_a_part_of_opencvs_resize_of_the_whole():
    seen = 0
    for image, target, size, window in cases():
        corner = [
            beginning(source, side, place) * side / source
            for source, side, place in zip(target.shape, size, window[:2], strict=True)
        ]
        top, left = (round(place) for place in corner)
        if max(abs(corner[0] - top), abs(corner[1] - left)) > 1e-9:
            continue  # it begins between two pixels of the resized image
        seen += 1
        part = np.s_[top : top + window.height, left : left + window.width]
        whole = cv2.resize(image, size[::-1])[part].astype(int)
        assert np.abs(resize_window(image, size, window) - whole).max() <= 1
        nearest = cv2.resize(target, size[::-1], interpolation=cv2.INTER_NEAREST)[part]
        assert np.mean(nearest_window(target, size, window) != nearest) < 0.1  # see below
    assert seen > 300


def test_a_window_of_the_target_has_the_pixel_at_the_same_place():
    for _, target, size, window in cases():
        places = []
        for source, side, place, count in zip(
            target.shape, size, window[:2], window[2:], strict=True
        ):
            magnifies = place > 0 and side > source
            dropped = side // source if magnifies else 0
            # The inverse of the inverse: OpenCV's rounding.
            steps = (dropped + np.arange(count)) * (1 / (side / source))
            places.append(np.minimum(place - magnifies + steps.astype(int), source - 1))
        assert np.array_equal(nearest_window(target, size, window), target[np.ix_(*places)])


def test_nearest_at_a_half_and_a_double_size_by_hand():
    target = np.arange(16, dtype=np.uint8).reshape(4, 4)
    half = nearest_window(target, (2, 2), Window(0, 0, 2, 2))
    assert half.tolist() == [[0, 2], [8, 10]]
    double = nearest_window(target, (8, 8), Window(1, 2, 2, 3))
    assert double.tolist() == [[6, 6, 7], [6, 6, 7]]
    # 2.5 times: the window begins at 2 - 1 + 2 * 0.4 = 1.8.
    assert nearest_window(target, (10, 10), Window(0, 2, 1, 3)).tolist() == [[1, 2, 2]]


def test_bilinear_at_a_double_size_by_hand():
    image = np.repeat(np.array([[0, 100, 200]], np.uint8)[..., None], 3, axis=-1)
    double = resize_window(image, (1, 6), Window(0, 0, 1, 6))
    assert double[0, :, 0].tolist() == [0, 25, 75, 125, 175, 200]
    assert resize_window(image, (1, 6), Window(0, 1, 1, 2))[0, :, 0].tolist() == [75, 125]


@pytest.mark.parametrize(
    ("shape", "scale", "ratio", "size"),
    [
        # MMSegmentation on ADE20K: a scale of (2048, 512), ratios from 0.5 to 2
        ((512, 683), (2048, 512), 0.5, (256, 342)),
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((512, 683), (2048, 512), 2.0, (1024, 1366)),
        ((683, 512), (2048, 512), 0.5, (342, 256)),
        ((256, 342), (2048, 512), 1.0, (512, 684)),
        ((100, 1000), (2048, 512), 1.0, (205, 2048)),  # the long side binds: a factor of 2.048
        ((512, 683), (2048, 512), 0.7501, (384, 512)),  # int(384.05) / 512
        ((512, 683), (512, 2048), 1.0, (512, 683)),
        ((75, 51), None, 0.5, (38, 26)),
        ((2, 90), None, 0.1, (1, 9)),
    ],
)
def test_sizes_are_those_of_mmsegmentation(
    shape: tuple[int, int], scale: tuple[int, int] | None, ratio: float, size: tuple[int, int]
):
    assert resized(shape, scale, ratio) == size


def test_windows_lie_anywhere_inside_and_nowhere_else():
    target = np.zeros((10, 12), np.uint8)
    options = augmentation(crop_size=[8, 9])
    rng = np.random.default_rng(0)
    drawn = {draw_window(target, (10, 12), options, 255, rng)[0] for _ in range(500)}
    assert drawn == {Window(top, left, 8, 9) for top in range(3) for left in range(4)}
    # At half the size a window of 4 x 5 covers 8 x 10 stored pixels.
    options = augmentation(crop_size=[4, 5])
    drawn = {draw_window(target, (5, 6), options, 255, rng)[0] for _ in range(500)}
    assert drawn == {Window(top, left, 4, 5) for top in range(3) for left in range(3)}


def test_windows_spread_as_evenly_as_mmsegmentations():
    # Its crops begin on every pixel of the resized image alike; here in shares of the stored one.
    target = np.zeros((200, 300), np.uint8)
    options = augmentation(crop_size=[128, 128])
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for ratio in rng.uniform(0.7, 3, 4000):
        size = resized(target.shape, None, ratio)
        window, _ = draw_window(target, size, options, 255, rng)
        ours.append([beginning(*axis) for axis in zip(target.shape, size, window[:2], strict=True)])
        steps = [rng.integers(side - 128 + 1) for side in size]
        theirs.append(np.array(steps) * target.shape / size)
    for own, other in zip(np.transpose(ours), np.transpose(theirs), strict=True):
        assert ks_2samp(own, other).pvalue > 0.01


def test_a_window_is_redrawn_while_one_class_fills_it():
    # A stripe of class 1 down the middle of class 0, and ignored pixels that do not count.
    target = np.zeros((16, 160), np.uint8)
    target[:, 70:90] = 1
    target[:8] = 255
    rng = np.random.default_rng(0)

    def filled(limit: float) -> float:
        options = augmentation(crop_size=[16, 16], cat_max_ratio=limit)
        over = 0
        for _ in range(300):
            window, _ = draw_window(target, target.shape, options, 255, rng)
            ones = (nearest_window(target, target.shape, window)[8:] == 1).mean()
            over += max(ones, 1 - ones) >= 0.75
        return over / 300

    # A window crosses an edge with at most 75 % of a class in 14 of the 145 places: p = 0.0966.
    # Eleven windows, of which the last is kept whatever it holds: (1 - p) ** 11 = 0.33.
    assert filled(1.0) == pytest.approx(0.90, abs=0.06)
    assert filled(0.75) == pytest.approx(0.33, abs=0.09)


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_whether_one_class_fills_a_crop_is_as_if_all_were_counted(share: float):
    rng = np.random.default_rng(0)
    filled = 0
    for _ in range(2000):
        classes = rng.choice([0, 1, 2, 3, 7, 255], rng.integers(1, 6))
        chances = rng.dirichlet(np.full(len(classes), 0.4))
        labels = rng.choice(classes, rng.integers(1, 40, 2), p=chances).astype(np.uint8)
        counts = np.bincount(labels.ravel(), minlength=256)[:255]
        filled += (expected := counts.max() >= share * counts.sum())
        assert one_class_fills(labels, share, 255) == expected
    assert 500 < filled < 2000


def test_an_image_smaller_than_the_crop_is_padded():
    image, target = np.full((2, 3, 3), 9, np.uint8), np.full((2, 3), 1, np.uint8)
    padded, labels = pad(image, target, (3, 5), (10, 20, 30), 255)
    assert labels.tolist() == [[1, 1, 1, 255, 255], [1, 1, 1, 255, 255], [255] * 5]
    assert (padded[:2, :3] == 9).all()
    assert (padded[2] == (10, 20, 30)).all()
    assert (padded[:, 3:] == (10, 20, 30)).all()


def test_a_sample_always_has_the_crop_size():
    options = augmentation(ratio_range=[0.2, 3.0], cat_max_ratio=0.75, photometric=True)
    for rng, image, target in pictures():
        sample, labels = augment(image, target, options, (1, 2, 3), 255, rng)
        assert sample.shape == (24, 32, 3)
        assert labels.shape == (24, 32)
        assert sample.dtype == labels.dtype == np.uint8


@pytest.mark.parametrize(
    ("horizontal", "vertical", "step"),
    [(0, 0, (1, 1)), (1, 0, (1, -1)), (0, 1, (-1, 1)), (1, 1, (-1, -1))],
)
def test_a_flip_moves_image_and_target_together(
    horizontal: float, vertical: float, step: tuple[int, int]
):
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, (24, 32), dtype=np.uint8)
    image = np.stack([target * 50] * 3, axis=-1)
    options = augmentation(flip={"horizontal": horizontal, "vertical": vertical})
    sample, labels = augment(image, target, options, (0, 0, 0), 255, rng)
    assert np.array_equal(labels, target[:: step[0], :: step[1]])
    assert np.array_equal(sample, image[:: step[0], :: step[1]])


def test_a_flip_happens_as_often_as_asked():
    target = np.arange(24 * 32, dtype=np.uint32).astype(np.uint8).reshape(24, 32)
    image = np.stack([target] * 3, axis=-1)
    options = augmentation(flip={"horizontal": 0.25, "vertical": 0.0})
    rng = np.random.default_rng(0)
    flipped = [
        augment(image, target, options, (0, 0, 0), 255, rng)[1][0, 0] != target[0, 0]
        for _ in range(400)
    ]
    assert np.mean(flipped) == pytest.approx(0.25, abs=0.07)


def test_the_same_seed_draws_the_same_sample_and_another_seed_another():
    options = augmentation(
        ratio_range=[0.5, 2.0],
        cat_max_ratio=0.75,
        flip={"horizontal": 0.5, "vertical": 0.5},
        photometric=True,
    )
    _, image, target = list(pictures())[7]
    draws = [
        augment(image, target, options, (0, 0, 0), 255, np.random.default_rng(seed))
        for seed in (3, 3, 4)
    ]
    assert np.array_equal(draws[0][0], draws[1][0])
    assert np.array_equal(draws[0][1], draws[1][1])
    assert not np.array_equal(draws[0][0], draws[2][0])


class Draws:
    """A generator whose draws are given: five coins, then shift, gain, saturation and hue."""

    def __init__(self, coins: str, shift: float, gain: float, saturation: float, hue: int) -> None:
        self.coins = np.array([0.25 if coin == "y" else 0.75 for coin in coins])
        self.values = [shift, gain, saturation]
        self.hue = hue

    def random(self, count: int) -> np.ndarray:
        assert count == len(self.coins)
        return self.coins

    def uniform(self, low: float, high: float) -> float:
        value = self.values.pop(0)
        assert low <= value <= high
        return value

    def integers(self, low: int, high: int) -> int:
        assert low <= self.hue < high
        return self.hue


IMAGE = np.array([[[10, 60, 250], [100, 100, 100], [200, 40, 40]]], np.uint8)


@pytest.mark.parametrize("draws", [("nnnnn", 20, 1.4, 1.3, 7), ("yyynn", 0, 1.0, 1.0, 0)])
def test_photometric_draws_of_the_identity_leave_the_image(draws: tuple):
    assert np.array_equal(distort(IMAGE, Draws(*draws)), IMAGE)


@pytest.mark.parametrize(
    ("coins", "expected"),
    [
        ("ynnnn", [[20, 70, 255], [110, 110, 110], [210, 50, 50]]),
        ("nynnn", [[15, 90, 255], [150, 150, 150], [255, 60, 60]]),
        ("nyynn", [[15, 90, 255], [150, 150, 150], [255, 60, 60]]),
        ("yyynn", [[30, 105, 255], [165, 165, 165], [255, 75, 75]]),  # brightness comes first
    ],
)
def test_brightness_and_contrast_by_hand(coins: str, expected: list[list[int]]):
    assert distort(IMAGE, Draws(coins, 10, 1.5, 1.0, 0)).tolist() == [expected]


def test_contrast_before_saturation_is_not_contrast_after_it():
    first = distort(IMAGE, Draws("nyyyn", 0, 1.5, 0.5, 0))
    after = distort(IMAGE, Draws("nynyn", 0, 1.5, 0.5, 0))
    assert first[0, 0].tolist() == [135, 171, 255]  # (15, 90, 255), half the way to 255
    assert after[0, 0].tolist() == [195, 231, 255]  # (130, 154, 250) times 1.5


def test_hue_turns_round_the_circle():
    red = np.array([[[200, 0, 0]]], np.uint8)
    turned = distort(red, Draws("nnnny", 0, 1.0, 1.0, -15))  # 30 degrees towards blue
    assert turned.tolist() == [[[200, 0, 100]]]


def test_brightness_alone_is_mmsegmentations_float_arithmetic():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    ours = distort(image, Draws("ynnnn", -17.3, 1.0, 1.0, 0))
    theirs = np.clip(image.astype(np.float32) - np.float32(17.3), 0, 255).astype(np.uint8)
    assert np.array_equal(ours, theirs)


def test_every_photometric_change_happens_half_the_time():
    rng = np.random.default_rng(0)
    same = [np.array_equal(distort(IMAGE, rng), IMAGE) for _ in range(800)]
    assert np.mean(same) == pytest.approx(1 / 16, abs=0.035)


def test_the_padding_normalises_to_nearly_zero():
    assert fill_of((123.675, 116.28, 300.0)) == (124, 116, 255)
