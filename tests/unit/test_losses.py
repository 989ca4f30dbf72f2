"""Every term of the loss by hand, and what the sums are divided by."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models import losses
from pipeline.models.losses import (
    Criterion,
    LossParams,
    cross_entropy_sum,
    map_cross_entropy_sum,
    median_frequency_weights,
)
from pipeline.training.loop import train_step
from tests.unit.largest import Largest
from tests.unit.sections import learner_of, params

TERMS = ("cross_entropy", "ohem", "dice", "focal", "lovasz", "tversky")


def criterion(*terms: str, **changes: Any) -> Criterion:
    given = {name: float(name in terms) for name in TERMS}
    given |= {"avg_non_ignore": True, "class_weights": None, "ohem_threshold": 0.7}
    given |= {"ohem_min_kept": 1} | changes
    return Criterion(LossParams.model_validate_json(json.dumps(given)), [0.5, 0.1], 255)


def total(one: Criterion, logits: Tensor, target: Tensor, divisors: Tensor) -> Tensor:
    """The sum of the terms."""
    return sum(one(logits, target, divisors).values(), torch.zeros(()))


def loss_of(one: Criterion, logits: Tensor, target: Tensor) -> float:
    """Of a batch that is the whole global one."""
    return total(one, logits, target, one.count(target)).item()


def classes(probability: list[float]) -> Tensor:
    """Logits (1,2,1,P) that give class 0 these probabilities and class 1 the rest."""
    logits = [[math.log(p / (1 - p)) for p in probability], [0.0] * len(probability)]
    return torch.tensor(logits, dtype=torch.float64)[None, :, None]


def labels(*ids: int) -> Tensor:
    return torch.tensor([[ids]], dtype=torch.uint8)


# Two pixels, each 3/4 class 0; the first is of class 0, the second of class 1.
LOGITS, TARGET = classes([0.75, 0.75]), labels(0, 1)
EASY, HARD = math.log(4 / 3), math.log(4)
FOCAL = [EASY / 16, math.log(2) / 4, HARD * 9 / 16, math.log(2) / 4]  # each class against the rest
BY_HAND = {
    "cross_entropy": (EASY + HARD) / 2,
    "ohem": HARD / 2,  # 3/4 is no less than 0.7
    # Class 0: true 0.75, false positive 0.75, false negative 0.25; class 1: 0.25, 0.25, 0.75.
    "dice": ((1 - 0.75 / 1.25) + (1 - 0.25 / 0.75)) / 2,
    "tversky": ((1 - 0.75 / (0.75 + 0.225 + 0.175)) + (1 - 0.25 / (0.25 + 0.075 + 0.525))) / 2,
    # Class 0: errors 0.75 and 0.25 by 1/2 each; class 1: error 0.75 by 1, 0.25 by 0.
    "lovasz": (0.5 + 0.75) / 2,
    "focal": sum(FOCAL) / 2 / 2,  # over classes, over pixels
}


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_what_one_computes_by_hand(term: str):
    assert loss_of(criterion(term), LOGITS, TARGET) == pytest.approx(BY_HAND[term])


def test_terms_are_summed_by_their_weights():
    expected = 0.5 * BY_HAND["cross_entropy"] + 2 * BY_HAND["dice"] + 0.25 * BY_HAND["lovasz"]
    both = criterion(cross_entropy=0.5, dice=2.0, lovasz=0.25)
    assert loss_of(both, LOGITS, TARGET) == pytest.approx(expected)


@pytest.mark.parametrize("term", TERMS)
def test_ignored_pixels_change_nothing(term: str):
    logits, target = classes([0.1, 0.75, 0.9, 0.75]), labels(255, 0, 255, 1)
    assert loss_of(criterion(term), logits, target) == pytest.approx(BY_HAND[term])


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_image_without_a_valid_pixel_has_no_loss_and_no_gradient(term: str, dtype: torch.dtype):
    logits = torch.randn(2, 2, 4, 4, dtype=dtype, requires_grad=True)
    target = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    one = criterion(term)
    loss = total(one, logits, target, torch.ones(3))
    loss.backward()
    assert loss.item() == 0
    assert one.count(target).tolist() == [0, 0, 2]
    assert not logits.grad.any()


@pytest.mark.parametrize("term", TERMS)
def test_parts_of_a_batch_add_up_to_its_loss_in_maps_and_in_points(term: str):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 5, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 2, (4, 5, 6), generator=generator).to(torch.uint8)
    target[0], target[1, :2] = 255, 255
    one = criterion(term, class_weights=[1.0, 2.0] if term in TERMS[:2] else None)
    divisors = one.count(target)
    whole = total(one, logits, target, divisors)
    parts = [total(one, x, y, divisors) for x, y in zip(logits.split([1, 3]), target.split([1, 3]))]
    points = total(one, logits.flatten(2), target.flatten(1).long(), divisors)
    assert torch.equal(sum(one.count(part) for part in target.split([1, 3])), divisors)
    assert whole.item() > 0.01
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)  # lovasz is fp32
    assert points.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("avg_non_ignore", "weights", "divisor"),
    [(True, None, 3), (False, None, 4), (True, [2.0, 5.0], 12), (False, [2.0, 5.0], 13)],
)
def test_cross_entropy_is_divided_by_valid_or_by_all_pixels_as_their_classes_weigh(
    avg_non_ignore: bool, weights: list[float] | None, divisor: int
):
    target = labels(0, 1, 1, 255)
    one = criterion("cross_entropy", avg_non_ignore=avg_non_ignore, class_weights=weights)
    expected = 2 * EASY + 10 * HARD if weights else EASY + 2 * HARD
    assert one.count(target).tolist() == [divisor, 3 if avg_non_ignore else 4, 1]
    assert loss_of(one, classes([0.75] * 4), target) == pytest.approx(expected / divisor)


@pytest.mark.parametrize("term", TERMS[2:])
def test_class_weights_leave_the_other_terms_alone(term: str):
    both = criterion("cross_entropy", term, class_weights=[2.0, 5.0])
    expected = (2 * EASY + 5 * HARD) / 7 + BY_HAND[term]
    assert loss_of(both, LOGITS, TARGET) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("threshold", "min_kept", "kept"),
    [(0.7, 1, 3), (0.95, 1, 5), (0.7, 4, 4), (0.1, 2, 2), (0.7, 100, 4)],
)
def test_ohem_keeps_the_improbable_pixels_of_each_image(threshold: float, min_kept: int, kept: int):
    own = [0.9, 0.2, 0.6, 0.8, 0.5]
    easy = classes([0.99] * 5)  # none of them below the limit, which is 0.99
    logits, target = torch.cat([classes(own), easy]), torch.zeros(2, 1, 5, dtype=torch.uint8)
    one = criterion("ohem", ohem_threshold=threshold, ohem_min_kept=min_kept)
    hard = -sum(math.log(p) for p in sorted(own)[:kept])
    assert loss_of(one, logits, target) == pytest.approx(hard / 10)


def test_balanced_weights_are_the_median_frequency_by_each():
    assert median_frequency_weights([0.5, 0.1, 0.2]) == pytest.approx([0.4, 2.0, 1.0])
    assert median_frequency_weights([0.1, 0.3]) == pytest.approx([2.0, 2 / 3])
    one = criterion("cross_entropy", class_weights="balanced")
    assert one.count(labels(0, 1, 255))[0].item() == pytest.approx(0.6 + 3)


def test_the_loss_of_bf16_logits_is_summed_in_fp32():
    logits = torch.zeros(1, 2, 32, 32, dtype=torch.bfloat16)
    target = torch.zeros(1, 32, 32, dtype=torch.uint8)
    loss = total(criterion("cross_entropy"), logits, target, torch.ones(3))
    assert loss.item() == pytest.approx(1024 * math.log(2), rel=1e-6)


def test_cross_entropy_alone_is_a_sum():
    assert cross_entropy_sum(LOGITS, TARGET, 255).item() == pytest.approx(EASY + HARD)


def test_every_term_has_a_name_and_its_weight():
    terms = criterion(cross_entropy=0.5, dice=2.0)(LOGITS, TARGET, torch.tensor([2, 2, 1]))
    assert {name: term.item() for name, term in terms.items()} == {
        "cross_entropy": pytest.approx(0.5 * BY_HAND["cross_entropy"]),
        "dice": pytest.approx(2 * BY_HAND["dice"]),
    }


def test_a_class_that_train_does_not_show_has_no_balanced_weight():
    assert median_frequency_weights([0.5, 0.0, 0.1]) == pytest.approx([0.6, 0.0, 3.0])


def small(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Logits, of which some differ by far."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 5 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def drawn_target(shape: tuple[int, int, int], num_classes: int) -> Tensor:
    """Class ids, a fifth of them ignored."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, num_classes, shape, generator=generator).to(torch.uint8)
    target[torch.rand(shape, generator=generator) < 0.2] = 255
    return target


# Small logits, the size they are resized to, the size of the target.
SIZES = {
    "stride 8": ((2, 5, 8, 12), (64, 96), (64, 96)),
    "odd": ((3, 4, 9, 13), (65, 97), (65, 97)),
    "padded": ((2, 5, 6, 7), (84, 98), (75, 97)),
    "one row": ((1, 3, 1, 5), (33, 20), (33, 20)),
    "smaller": ((2, 3, 40, 50), (17, 23), (17, 23)),
    "the same": ((2, 5, 37, 41), (37, 41), (37, 41)),
    "the same, cut": ((2, 5, 37, 41), (37, 41), (30, 33)),
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0, 0.0, 3.0)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_cross_entropy_of_a_map_is_torchs_of_the_resized_one(
    sizes: tuple[tuple[int, ...], tuple[int, int], tuple[int, int]],
    dtype: torch.dtype,
    error: float,
    weights: tuple[float, ...] | None,
    memory: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
):
    shape, size, cut = sizes
    monkeypatch.setattr(losses, "TILE_ON_CPU", 32 * 32 * shape[1])  # several, the last ones smaller
    logits = small(*shape, dtype=dtype)
    target = drawn_target((shape[0], *cut), shape[1])
    by_class = None if weights is None else torch.tensor(weights[: shape[1]], dtype=torch.float64)
    given = logits.contiguous(memory_format=memory)
    ours = map_cross_entropy_sum(given, target, 255, by_class, size=size)
    (gradient,) = torch.autograd.grad(3 * ours, logits)

    exact = logits.detach().double().requires_grad_()
    resized = F.interpolate(exact, size, mode="bilinear")[:, :, : cut[0], : cut[1]]
    theirs = F.cross_entropy(resized, target.long(), by_class, ignore_index=255, reduction="sum")
    (expected,) = torch.autograd.grad(3 * theirs, exact)
    assert (ours.dtype, gradient.dtype) == (torch.float64, dtype)
    assert ours.item() == pytest.approx(theirs.item(), rel=error)
    assert (gradient - expected).abs().max() < error * expected.abs().max()
    with torch.no_grad():
        assert torch.equal(map_cross_entropy_sum(given, target, 255, by_class, size=size), ours)


@pytest.mark.parametrize(("size", "cut"), [((12, 15), (11, 13)), ((4, 5), (4, 5))])
def test_the_gradient_of_a_map_is_that_of_finite_differences(
    size: tuple[int, int], cut: tuple[int, int]
):
    target, weights = drawn_target((2, *cut), 3), torch.tensor([1.0, 0.5, 2.0])
    assert torch.autograd.gradcheck(
        lambda logits: map_cross_entropy_sum(logits, target, 255, weights, size=size),
        small(2, 3, 4, 5),
    )


def test_an_image_has_the_same_part_in_the_loss_in_any_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(losses, "TILE_ON_CPU", 32 * 32 * 5)
    logits, target = small(3, 5, 8, 12, dtype=torch.float32), drawn_target((3, 64, 96), 5)

    def gradient(part: slice) -> Tensor:
        loss = map_cross_entropy_sum(logits[part], target[part], 255, size=(64, 96))
        return torch.autograd.grad(loss, logits)[0][part]

    assert torch.equal(gradient(slice(0, 3))[1:], gradient(slice(1, 3)))


def test_autocast_changes_nothing_about_the_cross_entropy_of_a_map():
    logits, target = small(2, 5, 8, 12, dtype=torch.bfloat16), drawn_target((2, 64, 96), 5)
    one, counts = criterion("cross_entropy"), torch.ones(3)
    (plain,) = one(logits, target, counts, (64, 96)).values()
    with torch.autocast("cpu", torch.bfloat16):
        (under,) = one(logits, target, counts, (64, 96)).values()
    assert torch.equal(plain, under)
    (gradient,) = torch.autograd.grad(under, logits)
    assert gradient.dtype == torch.bfloat16


def test_terms_of_whole_maps_and_those_that_need_none_see_the_same_map():
    logits, target = small(2, 2, 4, 6), drawn_target((2, 29, 47), 2)
    one = criterion("cross_entropy", "dice", "focal", "ohem", ohem_threshold=1.0)
    terms = one(logits, target, one.count(target), (32, 48))
    resized = F.interpolate(logits, (32, 48), mode="bilinear")[:, :, :29, :47]
    for name, term in one(resized, target, one.count(target)).items():
        assert terms[name].item() == pytest.approx(term.item(), rel=1e-12), name
    assert terms["ohem"].item() == pytest.approx(terms["cross_entropy"].item(), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        ({}, False),
        ({"model.loss.class_weights": "balanced"}, False),
        ({"model.head.name": "pointrend", "model.head.train_points": 64}, False),
        ({"model.loss.dice": 1.0}, True),
    ],
)
def test_a_step_makes_no_tensor_of_the_size_of_the_whole_logits(
    changes: dict[str, Any], whole: bool
):
    fcn = {"model.head.name": "fcn", "model.head.aux_weight": 0.4, "model.head.channels": 8}
    resnet = {"model.backbone.name": "resnet18", "model.backbone.pretrained": None}
    learner = learner_of(params(fcn | resnet | changes), 150)
    side = 192
    batch = (
        torch.zeros(2, side, side, 3, dtype=torch.uint8),
        drawn_target((2, side, side), 150),
        torch.arange(2),
    )
    with Largest() as largest:
        train_step(learner, batch, accumulation=1)
    logits = 2 * 150 * side * side
    # The weights of a convolution have 2.4 million elements, the logits 11.
    assert (largest.elements >= logits) == whole
    assert whole or largest.elements < logits / 4
