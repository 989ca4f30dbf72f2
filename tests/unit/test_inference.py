"""Whole images and windows, mirrored and resized, against plain loops."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.store import Split, spread
from pipeline.data.table import Entry
from pipeline.data.transforms import resized
from pipeline.evaluation import inference
from pipeline.evaluation.inference import (
    Predictor,
    View,
    evaluate,
    evaluate_images,
    predictions,
)
from pipeline.evaluation.metrics import boundary_areas, confusion_matrix
from pipeline.models import layers
from pipeline.models.network import Network
from pipeline.precision import PRECISIONS, Normalization
from tests.unit.largest import Largest
from tests.unit.sections import build
from tests.unit.test_models import HEADS_ON, options


class Stub(Network):
    """Logits that depend on the pixels around and, by the padding, on where a window ends."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, 5, 5, generator=generator))
        self.sizes: list[tuple[int, ...]] = []

        self.key_draws()

    def outputs(self, images: Tensor) -> Tensor:
        self.sizes.append(tuple(images.shape))
        return nn.functional.conv2d(images, self.weight.to(images.dtype), padding=2)

    def count(self, target: Tensor) -> Tensor:
        raise AssertionError("an evaluation learns nothing")

    def losses(self, *arguments: object) -> dict[str, Tensor]:
        raise AssertionError("an evaluation learns nothing")

    def scores(self, outputs: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
        assert outputs.shape[2:] == size
        return outputs[:, :, rows].to(torch.promote_types(outputs.dtype, torch.float32))


def image(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def predictor(model: nn.Module, **changes: object) -> Predictor:
    precision, cpu = PRECISIONS[changes.pop("precision", "fp64")], torch.device("cpu")
    normalize = Normalization((100, 110, 120), (50, 60, 70), precision=precision, device=cpu)
    given = {"precision": precision, "scale": None, "window": None}
    return Predictor(model, normalize, **(given | changes))


class AsIs(nn.Module):
    """For images that are normalised already."""

    mean = torch.zeros(3)

    def forward(self, images: Tensor) -> Tensor:
        return images.movedim(-1, 1)


def slide(
    model: nn.Module, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """The whole scores of normalised images, by a sliding window."""
    sliding = replace(predictor(model, window=(crop, stride)), normalize=AsIs())
    view = View(sliding, images.movedim(1, -1))
    return view.scores(view.size, slice(0, view.size[0]))


def whole_scores(predictor: Predictor, pictures: list[np.ndarray]) -> Tensor:
    return torch.cat(list(predictor.scores(pictures)), dim=2)


def as_input(picture: np.ndarray) -> Tensor:
    normal = (picture.astype(np.float64) - (100, 110, 120)) / (50, 60, 70)
    return torch.from_numpy(normal).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((20, 30), (8, 12), (5, 7)),
        ((20, 30), (8, 12), (8, 12)),
        ((8, 12), (8, 12), (5, 7)),
        ((9, 13), (8, 12), (8, 12)),
        ((5, 30), (8, 12), (3, 12)),  # lower than the window
        ((16, 24), (8, 12), (4, 6)),
    ],
)
def test_a_sliding_window_is_a_plain_loop(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
):
    model = Stub()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    ours = slide(model, images, crop, stride)
    # MMSegmentation's slide_inference
    rows, columns = (
        max(side - window + step - 1, 0) // step + 1
        for side, window, step in zip(size, crop, stride, strict=True)
    )
    assert len(model.sizes) == rows * columns
    total = torch.zeros(2, 4, *size, dtype=torch.float64)
    count = torch.zeros(size)
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride[0] + crop[0], size[0])
            right = min(column * stride[1] + crop[1], size[1])
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            total[:, :, top:bottom, left:right] += model(images[:, :, top:bottom, left:right])
            count[top:bottom, left:right] += 1
    assert count.min() >= 1
    assert torch.allclose(ours, total / count, rtol=0, atol=1e-12)


def test_a_whole_image_is_normalised_and_its_best_class_taken():
    model = Stub()
    pictures = [image(seed, 9, 14) for seed in range(3)]
    found = predictor(model).predict(pictures)
    assert model.sizes == [(3, 3, 9, 14)]
    for picture, prediction in zip(pictures, found, strict=True):
        assert prediction.dtype == np.uint8
        assert np.array_equal(prediction, model(as_input(picture))[0].argmax(0).numpy())


def test_a_predictor_slides_where_a_window_is_given():
    model, picture = Stub(), image(0, 20, 30)
    (found,) = predictor(model, window=((8, 12), (5, 7))).predict([picture])
    logits = slide(model, as_input(picture), (8, 12), (5, 7))
    assert np.array_equal(found, logits[0].argmax(0).numpy())
    (whole,) = predictor(model).predict([picture])
    assert not np.array_equal(found, whole)


@pytest.mark.parametrize("window", [None, ((8, 12), (5, 7))])
def test_a_flip_averages_the_probabilities_of_both_views(window: tuple | None):
    model, picture = Stub(), image(1, 20, 31)

    def view(x: Tensor) -> Tensor:
        return model(x) if window is None else slide(model, x, *window)

    x = as_input(picture)
    both = (view(x).softmax(1) + view(x.flip(3)).flip(3).softmax(1)) / 2
    (found,) = predictor(model, window=window, flip=True).predict([picture])
    assert np.array_equal(found, both[0].argmax(0).numpy())
    (unflipped,) = predictor(model, window=window).predict([picture])
    assert not np.array_equal(found, unflipped)
    (mirrored,) = predictor(model, window=window, flip=True).predict([picture[:, ::-1]])
    assert np.array_equal(mirrored, found[:, ::-1])


def test_a_scale_resizes_and_predicts_at_the_stored_size():
    model, picture = Stub(), image(2, 12, 20)
    (found,) = predictor(model, scale=(60, 24)).predict([picture])
    assert model.sizes == [(1, 3, 24, 40)]
    logits = model(as_input(cv2.resize(picture, (40, 24))))
    stored = nn.functional.interpolate(logits, (12, 20), mode="bilinear", align_corners=False)
    assert found.shape == (12, 20)
    assert np.array_equal(found, stored[0].argmax(0).numpy())


@pytest.mark.parametrize("window", [None, ((8, 12), (5, 7))])
@pytest.mark.parametrize("scale", [None, (40, 24)])
@pytest.mark.parametrize("flip", [False, True])
def test_scales_and_flips_are_averaged_as_a_plain_loop_does(
    flip: bool, scale: tuple[int, int] | None, window: tuple | None
):
    model, picture, ratios = Stub(), image(3, 15, 21), (0.5, 1.0, 1.75)
    # MMSegmentation: each view's logits, unflipped and resized to the stored image, then softmax.
    # The sizes by hand: int(side * ratio + 0.5), and within (40, 24) a short side of 24 * ratio.
    sizes = {
        None: [(8, 11), (15, 21), (26, 37)],
        (40, 24): [(12, 17), (24, 34), (42, 59)],
    }[scale]
    total = torch.zeros(1, 4, 15, 21, dtype=torch.float64)
    for height, width in sizes:
        resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
        for mirrored in (False, True) if flip else (False,):
            x = as_input(resized[:, ::-1] if mirrored else resized)
            logits = model(x) if window is None else slide(model, x, *window)
            logits = logits.flip(3) if mirrored else logits
            logits = nn.functional.interpolate(logits, (15, 21), mode="bilinear")
            total += logits.softmax(1)
    total /= len(sizes) * (2 if flip else 1)
    averaging = predictor(model, scale=scale, window=window, scales=ratios, flip=flip)
    assert torch.allclose(whole_scores(averaging, [picture]), total, rtol=0, atol=1e-5)
    (found,) = averaging.predict([picture])
    assert np.array_equal(found, total[0].argmax(0).numpy())
    (single,) = predictor(model, scale=scale, window=window).predict([picture])
    assert not np.array_equal(found, single)


def test_one_view_has_its_logits_for_scores_and_several_have_probabilities():
    model, picture = Stub(), image(4, 9, 14)
    (scores,) = whole_scores(predictor(model), [picture])
    assert torch.allclose(scores, model(as_input(picture))[0], rtol=0, atol=1e-12)
    averaging = predictor(model, precision="bf16", scales=(1.0, 0.5))
    (scores,) = whole_scores(averaging, [picture])
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.sum(0), torch.ones(9, 14))


VIEWS: dict[str, dict[str, object]] = {
    "whole": {},
    "slide": {"window": ((32, 48), (21, 31))},
    "scaled": {"scale": (90, 64)},
    "several": {"scales": (0.5, 1.0, 1.75), "flip": True},
    "slide several": {"window": ((32, 48), (32, 48)), "scales": (0.5, 1.3), "flip": True},
}


def network(head: str, classes: int) -> Network:
    """Of double precision, in evaluation mode; its logits are smaller than the image."""
    model = build(options(head, **{"backbone.name": HEADS_ON[head]}), classes)
    return model.double().eval()


@torch.no_grad()
def plain_scores(predictor: Predictor, pictures: list[np.ndarray]) -> Tensor:
    """What `Predictor.scores` gives, from the whole scores of every window and view."""
    model, shape = predictor.network, pictures[0].shape[:2]

    def whole(images: Tensor) -> Tensor:
        size, outputs = tuple(images.shape[2:]), model(images)
        if isinstance(outputs, list):  # a map of logits
            logits = outputs[0].logits
            padded = [-(-side // model.multiple) * model.multiple for side in size]
            assert logits.shape[2] < size[0]
            return F.interpolate(logits, padded, mode="bilinear")[..., : size[0], : size[1]]
        return model.scores(outputs, size, slice(0, size[0]))

    def view(images: Tensor) -> Tensor:
        if predictor.window is None:
            return whole(images)
        size, (crop, stride) = images.shape[2:], predictor.window
        total, count = 0.0, torch.zeros(*size)
        for top in sorted({min(y, max(size[0] - crop[0], 0)) for y in range(0, 999, stride[0])}):
            for left in sorted(
                {min(x, max(size[1] - crop[1], 0)) for x in range(0, 999, stride[1])}
            ):
                scores = whole(images[..., top : top + crop[0], left : left + crop[1]])
                right = size[1] - left - scores.shape[3]
                total = total + F.pad(scores, (left, right, top, size[0] - top - scores.shape[2]))
                count[top : top + crop[0], left : left + crop[1]] += 1
        return total / count

    found = []
    for ratio in predictor.scales:
        size = resized(shape, predictor.scale, ratio)
        images = torch.cat([as_input(cv2.resize(one, size[::-1])) for one in pictures])
        for mirrored in (False, True) if predictor.flip else (False,):
            scores = view(images.flip(3)).flip(3) if mirrored else view(images)
            found.append(F.interpolate(scores, shape, mode="bilinear"))
    if len(found) == 1:
        return found[0]
    return torch.stack([model.probabilities(scores) for scores in found]).mean(dim=0)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("head", ["pspnet", "linear", "eomt"])
def test_a_prediction_by_bands_is_that_of_whole_scores(
    head: str, views: str, monkeypatch: pytest.MonkeyPatch
):
    height, width, classes = 45, 67, 5  # linear and eomt pad this
    pictures = [image(seed, height, width) for seed in (5, 6)]
    averaging = predictor(network(head, classes), **VIEWS[views])
    expected = plain_scores(averaging, pictures)
    for rows in (1, 7, height):
        monkeypatch.setattr(layers, "BAND", rows * 2 * classes * width)
        bands = list(averaging.scores(pictures))
        assert [band.shape[2] for band in bands[:-1]] == [rows] * ((height - 1) // rows)
        assert torch.allclose(torch.cat(bands, dim=2), expected, rtol=0, atol=1e-9)
        found = averaging.predict(pictures)
        assert np.array_equal(found, expected.argmax(dim=1).numpy())


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("head", ["pspnet", "segformer", "eomt"])
def test_no_tensor_of_a_prediction_is_as_large_as_the_whole_scores(
    head: str, views: str, monkeypatch: pytest.MonkeyPatch
):
    classes, height, width = 150, 64, 96
    monkeypatch.setattr(layers, "BAND", classes * 4 * width)
    pictures = [image(7, height, width)]
    averaging = predictor(network(head, classes), **VIEWS[views])
    averaging.predict(pictures)  # makes the weights that are kept
    with Largest() as largest:
        averaging.predict(pictures)
    assert largest.elements < classes * height * width / 2
    with Largest() as largest:
        whole_scores(averaging, pictures)
    assert largest.elements == classes * height * width


SIZES = [(9, 14), (9, 14), (9, 14), (14, 9), (9, 14), (5, 5), (5, 5)]


@pytest.fixture
def split(tmp_path: Path) -> Split:
    entries, offset = [], 0
    with (tmp_path / "a.bin").open("wb") as file:
        for number, (height, width) in enumerate(SIZES):
            entries.append(Entry(f"{number}", f"{number}", "a.bin", offset, height, width))
            target = np.full((height, width), number % 4, np.uint8)
            target[0, 0] = 255
            offset += file.write(image(number, height, width).tobytes() + target.tobytes())
    return Split(tmp_path, entries)


def test_batches_hold_one_size_and_change_no_prediction(split: Split):
    model = Stub().train()
    indices = [0, 1, 2, 3, 4, 5, 6]
    batched = list(predictions(predictor(model, batch_size=2), split, indices))
    assert not model.training
    assert model.sizes == [
        (n, 3, h, w) for n, h, w in [(2, 9, 14), (1, 9, 14), (1, 14, 9), (1, 9, 14), (2, 5, 5)]
    ]
    assert [index for index, _, _ in batched] == indices
    for index, target, prediction in batched:
        assert np.array_equal(target, split[index][1])
        (alone,) = predictor(model).predict([image(index, *SIZES[index])])
        assert np.array_equal(prediction, alone)


def test_an_evaluation_sums_every_image_once(split: Split):
    model = Stub()
    pairs = [(split[i][1], predictor(model).predict([split[i][0]])[0]) for i in range(7)]
    expected = sum(confusion_matrix(*pair, 4, 255) for pair in pairs)
    assert np.array_equal(evaluate(predictor(model, batch_size=2), split, 4, 255), expected)
    assert expected.sum() == sum(height * width - 1 for height, width in SIZES)


def test_an_evaluation_finds_the_areas_of_each_image(split: Split):
    model, kept, seen = Stub(), {}, []
    found = evaluate_images(
        predictor(model, batch_size=2),
        split,
        num_classes=4,
        ignore_index=255,
        keep=kept.__setitem__,
        look=lambda *given: seen.append(given),
    )
    assert [areas.image for areas in found] == list(range(7)) == sorted(kept)
    for index, cells, pixels, boundary in found:
        target = split[index][1]
        (alone,) = predictor(model).predict([split[index][0]])
        assert np.array_equal(kept[index], alone)
        confusion = np.zeros(16, np.int64)
        confusion[cells] = pixels
        assert pixels.all()
        assert np.array_equal(confusion.reshape(4, 4), confusion_matrix(target, alone, 4, 255))
        assert np.array_equal(boundary, boundary_areas(target, alone, 4, 255))
        probabilities, labels = seen[index]
        assert np.array_equal(labels, target[target != 255])
        assert np.array_equal(probabilities.argmax(dim=1).numpy(), alone[target != 255])


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5)])
def test_it_is_asked_at_some_pixels_of_each_image_how_sure_a_network_is(
    split: Split, monkeypatch: pytest.MonkeyPatch, scales: tuple[float, ...]
):
    monkeypatch.setattr(inference, "PIXELS", 20)
    monkeypatch.setattr(layers, "BAND", 30)  # several bands an image
    model, seen = Stub(), []
    evaluate_images(
        predictor(model, scales=scales),
        split,
        num_classes=4,
        ignore_index=255,
        keep=lambda *_: None,
        look=lambda *given: seen.append(given),
    )
    assert [len(labels) for _, labels in seen] == [20] * 7
    for index, (probabilities, labels) in enumerate(seen):
        picture, target = split[index]
        whole = torch.cat(list(predictor(model, scales=scales).probabilities([picture])), dim=2)[0]
        labelled = np.flatnonzero(target != 255)
        places = labelled[spread(len(labelled), 20)]
        assert np.array_equal(labels, target.ravel()[places])
        assert torch.allclose(probabilities, whole.flatten(1)[:, places].T)


def test_bf16_computes_in_bf16_and_fp32_in_fp32():
    seen = {}
    for precision in ("fp32", "bf16"):
        model = Stub()
        model.register_forward_hook(lambda _, __, out, p=precision: seen.update({p: out.dtype}))
        (found,) = predictor(model, precision=precision).predict([image(0, 9, 14)])
        assert found.dtype == np.uint8
    assert seen == {"fp32": torch.float32, "bf16": torch.bfloat16}
