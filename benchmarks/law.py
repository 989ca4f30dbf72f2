"""Whether both draw training samples by the same law: 10,000 draws of each side, compared.

The image is two gradients, of rows and of columns, 256x192, and the law ADE20K's at 3/8 of its
sizes. So scale, centre and flip of a window are read off the sample itself, by a fitted line, and
no side has to tell what it drew; the class content is read off the target. Equal: the two-sample
Kolmogorov-Smirnov statistic of each is below its critical value at 1%. Seeds are fixed, so the
answer is the same each time. The distortion of colours would hide the gradients and is left out.
"""

import time

import numpy as np

from benchmarks.images import Array, blobs
from benchmarks.protocol import Case, Metrics, Round

DRAWS, CLASSES = 10_000, 12
HEIGHT, WIDTH = 192, 256
SCALE, CROP, RATIOS, MOST = (768, 192), (192, 192), (0.5, 2.0), 0.75
NAMES = ("scale", "centre row", "centre column", "flip", "largest class", "classes")
CASES = [Case("10,000 draws", rounds=1, warm=False)]


def pair(number: int) -> tuple[Array, Array]:
    """One of 20 images, grey in its third channel, and their targets: blobs of few classes."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    image = np.stack([rows, columns, np.full_like(rows, 128)], axis=-1).astype(np.uint8)
    return image, blobs(np.random.default_rng(number % 20), HEIGHT, WIDTH, CLASSES)


def read(image: Array, target: Array) -> list[float]:
    """What was drawn, from a sample (H,W,3), (H,W); 255 is padding, in the image's colour too."""
    height, width = (int((target != 255).any(axis=axis).sum()) for axis in (1, 0))
    window = image[:height, :width].astype(np.float64)
    down, row = np.polyfit(np.arange(height) - (height - 1) / 2, window[:, :, 0].mean(axis=1), 1)
    along, column = np.polyfit(np.arange(width) - (width - 1) / 2, window[:, :, 1].mean(axis=0), 1)
    counts = np.bincount(target[:height, :width].ravel(), minlength=CLASSES)
    shares = counts / counts.sum()
    # To half a pixel: a window as high as the image has one centre, and no last digit is to tell
    # one side's from the other's.
    row, column = round(2 * row) / 2, round(2 * column) / 2
    drawn = [1 / down, row, column, float(along < 0), shares.max(), np.count_nonzero(shares)]
    return [round(float(value), 2) for value in drawn]


def equal(ours: list[list[float]], theirs: list[list[float]]) -> str:
    """Every statistic against the critical value."""
    from scipy.stats import ks_2samp

    critical = 1.628 * np.sqrt(2 / DRAWS)
    found = {
        name: ks_2samp(first, second, method="asymp").statistic
        for name, first, second in zip(NAMES, zip(*ours), zip(*theirs), strict=True)
    }
    worst = max(found, key=lambda name: found[name])
    verdict = "yes" if found[worst] < critical else "NO"
    return f"{verdict}: KS {found[worst]:.4f} ({worst}) of {critical:.4f}"


def ours(case: str) -> Round:
    """`augment` with the keys of the section `augmentation`."""
    from pipeline.data.transforms import AugmentationParams, augment

    params = AugmentationParams(
        crop_size=CROP, scale=SCALE, ratio_range=RATIOS, cat_max_ratio=MOST, photometric=False
    )

    def measure() -> tuple[Metrics, list[list[float]]]:
        begin, drawn = time.perf_counter(), []
        for number in range(DRAWS):
            rng = np.random.default_rng((1, number))
            sample = augment(*pair(number), params, fill=(0, 0, 0), ignore_index=255, rng=rng)
            drawn.append(read(*sample))
        return {"draws/s": DRAWS / (time.perf_counter() - begin)}, drawn

    return measure


def theirs(case: str) -> Round:
    """The transforms of its configuration, those between loading and packing."""
    from benchmarks import theirs

    config = theirs.config("pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py")
    from mmcv.transforms import Compose
    from mmseg.registry import TRANSFORMS

    _, _, resize, crop, flip, *_ = config.train_pipeline
    resize |= {"scale": SCALE, "ratio_range": RATIOS}
    crop |= {"crop_size": CROP, "cat_max_ratio": MOST}
    transform = Compose([TRANSFORMS.build(one) for one in (resize, crop, flip)])

    def measure() -> tuple[Metrics, list[list[float]]]:
        np.random.seed(1)
        begin, drawn = time.perf_counter(), []
        for number in range(DRAWS):
            image, target = pair(number)
            sample = transform(
                {
                    "img": image,
                    "img_shape": image.shape[:2],
                    "gt_seg_map": target,
                    "seg_fields": ["gt_seg_map"],
                }
            )
            drawn.append(read(sample["img"], sample["gt_seg_map"]))
        return {"draws/s": DRAWS / (time.perf_counter() - begin)}, drawn

    return measure
