"""EoMT: its outputs and loss are those of transformers; its draws and sums know no ranks."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import set_loss
from pipeline.models.backbones import BackboneParams, build_backbone
from pipeline.models.eomt import EoMT, EoMTParams, Outputs
from pipeline.models.eomt_names import from_eomt
from pipeline.models.keyed import uniform
from pipeline.models.linear import LinearHead, LinearParams
from pipeline.models.losses import LossParams
from pipeline.models.network import Labels
from pipeline.models.set_loss import Prediction, SetLoss, SetLossParams, match
from pipeline.models.vit import TINY, TINY_SIZES, ViT
from pipeline.training.checkpoint import fill

KINDS = ("dinov2", "dinov3")
NAMES = {kind: next(name for name in TINY if name.endswith(kind)) for kind in KINDS}
LABELS = Labels(num_classes=3, ignore_index=255, frequency=[0.4, 0.3, 0.3])


def backbone(kind: str, **changes: Any) -> BackboneParams:
    given = {"output_stride": 32, "pretrained": None, "with_cp": False, "drop_path": 0.0}
    return BackboneParams(**{"name": NAMES[kind], **given, **changes})


def build(kind: str = "dinov3", head: dict[str, Any] | None = None, **changes: Any) -> EoMT:
    """A network with weights that differ, on which masks and layer scales have an effect."""
    torch.manual_seed(0)
    given = {"num_queries": 7, "num_blocks": 2, "train_points": 64} | (head or {})
    network = EoMT.build(EoMTParams(name="eomt", **given), backbone(kind, **changes), None, LABELS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network


def batch(size: tuple[int, int] = (48, 64), count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, *size, generator=generator, dtype=torch.float64)
    blocks = torch.randint(0, 3, (count, 3, 3), generator=generator, dtype=torch.uint8)
    target = F.interpolate(blocks[:, None].float(), size, mode="nearest")[:, 0].to(torch.uint8)
    return images, target, torch.arange(count) * 7919 + 3


def theirs(kind: str, network: EoMT, grid: tuple[int, int], monkeypatch: Any) -> Any:
    """transformers' network, with our weights."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import (
        EomtConfig,
        EomtDinov3Config,
        EomtDinov3ForUniversalSegmentation,
        EomtForUniversalSegmentation,
    )

    options = {
        "hidden_size": TINY_SIZES["embed_dim"],
        "num_hidden_layers": TINY_SIZES["depth"],
        "num_attention_heads": TINY_SIZES["num_heads"],
        "num_labels": LABELS.num_classes,
        "num_queries": network.params.num_queries,
        "num_blocks": network.params.num_blocks,
        "train_num_points": network.params.train_points,
        "image_size": 16 * grid[0],
    }
    if kind == "dinov2":
        other: Any = EomtForUniversalSegmentation(EomtConfig(**options))
        count = grid[0] * grid[1]  # its configuration knows squares alone
        other.embeddings.position_embeddings = nn.Embedding(count, TINY_SIZES["embed_dim"])
        other.embeddings.position_ids = torch.arange(count)[None]
    else:
        hidden = 4 * TINY_SIZES["embed_dim"]
        config = EomtDinov3Config(**options, intermediate_size=hidden, layer_norm_eps=1e-5)
        config.pos_embed_rescale = None
        other = EomtDinov3ForUniversalSegmentation(config)
    other.grid_size = grid
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return other


def predictions_of(other: Any, images: Tensor) -> list[Prediction]:
    """All that it predicts, of which it returns the last alone."""
    found = []
    predict = other.predict

    def listen(tokens: Tensor) -> tuple[Tensor, Tensor]:
        masks, classes = predict(tokens)
        found.append(Prediction(classes, masks))
        return masks, classes

    other.predict = listen
    try:
        with torch.no_grad():
            other(images)
    finally:
        other.predict = predict
    return found


def difference(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def load(network: EoMT, other: Any) -> None:
    missing = network.load_state_dict(from_eomt(other.state_dict()))
    assert not missing.missing_keys


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (7, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_transformers(
    kind: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(kind).eval()
    other = theirs(kind, network, grid, monkeypatch).eval()
    if kind == "dinov2" and grid[0] != grid[1]:  # learned on a square, used on another grid
        network.backbone.adopt_grid(torch.zeros(1, 9, TINY_SIZES["embed_dim"]))
        nn.init.normal_(network.backbone.pos_embed)
        with torch.no_grad():
            positions = network.backbone._positions(network.backbone.pos_embed, grid)
            other.embeddings.position_embeddings.weight.copy_(positions[0])
        weights = from_eomt(other.state_dict())
        weights["backbone.pos_embed"] = network.backbone.pos_embed.detach().clone()
        network.load_state_dict(weights)
    else:
        load(network, other)
    images = torch.randn(2, 3, 16 * grid[0], 16 * grid[1])
    for probabilities in ([1.0, 1.0], [0.0, 1.0], [0.0, 0.0]):
        for each in (network, other):
            each.attn_mask_probs.copy_(torch.tensor(probabilities))
        with torch.no_grad():
            ours = network(images)
        reference = predictions_of(other, images)
        assert len(ours.predictions) == len(reference) == 1 + sum(p > 0 for p in probabilities)
        for mine, their in zip(ours.predictions, reference, strict=True):
            assert difference(mine.classes, their.classes) < 1e-5
            assert difference(mine.masks, their.masks) < 1e-5


def test_masks_make_a_difference() -> None:
    network = build().eval()
    images = batch()[0].float()
    with torch.no_grad():
        masked = network(images).predictions[-1]
        network.attn_mask_probs.zero_()
        assert difference(network(images).predictions[-1].masks, masked.masks) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_transformers_is_read(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from safetensors.torch import load_file

    network = build(kind).eval()
    other = theirs(kind, network, (3, 3), monkeypatch).eval()
    other.save_pretrained(tmp_path)
    network.load_state_dict(from_eomt(load_file(tmp_path / "model.safetensors")))
    images = torch.randn(1, 3, 48, 48)
    (*_, reference) = predictions_of(other, images)
    with torch.no_grad():
        assert difference(network(images).predictions[-1].masks, reference.masks) < 1e-5


def test_names_of_others_stay() -> None:
    weights = {"backbone.conv1.weight": torch.zeros(1), "query.weight": torch.zeros(1)}
    assert from_eomt(weights) is weights
    ours = build().state_dict()
    assert from_eomt(ours) is ours


def test_weights_of_the_authors_fit() -> None:
    network = build("dinov2")
    given = {
        f"network.{name.replace('backbone.', 'encoder.backbone.')}": value
        for name, value in network.state_dict().items()
    }
    given |= {"criterion.empty_weight": torch.ones(4), "network.encoder.pixel_mean": torch.ones(3)}
    renamed = from_eomt(given)
    assert renamed.keys() == network.state_dict().keys()


@pytest.mark.parametrize("rotary", [False, True])
def test_gated_perceptrons_get_timm_s_names(rotary: bool) -> None:
    one, two, three = torch.ones(4, 2), 2 * torch.ones(4, 2), torch.ones(2, 4)
    given = {"query.weight": torch.zeros(7, 2), "class_predictor.weight": torch.zeros(4, 2)}
    if not rotary:
        given["embeddings.position_embeddings.weight"] = torch.zeros(9, 2)
    for kind in ("weight", "bias"):
        given |= {
            f"layers.0.mlp.gate_proj.{kind}": one,
            f"layers.0.mlp.up_proj.{kind}": two,
            f"layers.0.mlp.down_proj.{kind}": three,
        }
    found = from_eomt(given)
    if rotary:
        assert found["backbone.blocks.0.mlp.fc1_g.weight"] is one
        assert found["backbone.blocks.0.mlp.fc1_x.weight"] is two
    else:
        assert torch.equal(found["backbone.blocks.0.mlp.fc1.weight"], torch.cat([one, two]))
    assert found["backbone.blocks.0.mlp.fc2.bias"] is three


def masks_of(target: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    present = [[c for c in range(LABELS.num_classes) if (one == c).any()] for one in target]
    masks = [
        torch.stack([(one == c).double() for c in classes])
        for one, classes in zip(target, present, strict=True)
    ]
    return masks, [torch.tensor(classes) for classes in present]


def random_predictions(count: int = 3, queries: int = 7) -> Prediction:
    generator = torch.Generator().manual_seed(5)
    classes = torch.randn(count, queries, 4, generator=generator, dtype=torch.float64)
    masks = 3 * torch.randn(count, queries, 12, 16, generator=generator, dtype=torch.float64)
    return Prediction(classes, masks)


def test_the_loss_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("dinov2")
    other = theirs("dinov2", network, (3, 3), monkeypatch).double()
    criterion = other.criterion
    _, target, keys = batch()
    prediction = random_predictions()
    points = uniform(keys, set_loss.zlib.crc32(b"matching"), 128).double().view(3, 1, 64, 2)
    drawn = iter(points)
    chosen = []
    choose = SetLoss._points

    def listen(self: SetLoss, *arguments: Any, **named: Any) -> Tensor:
        chosen.append(choose(self, *arguments, **named))
        return chosen[-1]

    monkeypatch.setattr(SetLoss, "_points", listen)
    divisors = network.count(target)
    ours = network.losses(Outputs([prediction], (1.0, 1.0)), target, keys, divisors)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(drawn))
    monkeypatch.setattr(criterion, "sample_points_using_uncertainty", lambda *_: chosen[0])
    masks, classes = masks_of(target)
    found = other.get_loss_dict(prediction.masks, prediction.classes, masks, classes, None)
    assert ours["class"].item() == pytest.approx(found["loss_cross_entropy"].item(), rel=1e-9)
    assert ours["mask"].item() == pytest.approx(found["loss_mask"].item(), rel=1e-9)
    assert ours["dice"].item() == pytest.approx(found["loss_dice"].item(), rel=1e-9)


def test_the_cost_of_a_match_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("dinov2")
    matcher = theirs("dinov2", network, (3, 3), monkeypatch).double().criterion.matcher
    _, target, keys = batch()
    prediction = random_predictions()
    drawn = iter(uniform(keys, set_loss.zlib.crc32(b"matching"), 128).double().view(3, 1, 64, 2))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(drawn))
    masks, classes = masks_of(target)
    reference = matcher(prediction.masks, prediction.classes, masks, classes)
    rows = network.loss._match(
        [prediction], (1.0, 1.0), target, keys, present=network.loss._present(target)
    )[0]
    for image, (queries, places) in enumerate(reference):
        own = rows[rows[:, 0] == image]
        assert own[:, 1].tolist() == queries.tolist()
        assert own[:, 2].tolist() == classes[image][places].tolist()


def test_matches_are_the_cheapest_of_all() -> None:
    generator = np.random.default_rng(0)
    costs = torch.from_numpy(generator.standard_normal((2, 2, 3, 5)))
    costs[:, 0, :, 2:] = torch.inf  # two classes in the first image, five in the second
    rows = match(costs)
    assert rows.shape == (2, 5, 3)
    for level in range(2):
        first, second = (rows[level][rows[level][:, 0] == image] for image in (0, 1))
        assert sorted(first[:, 2].tolist()) == [0, 1]
        assert sorted(second[:, 1].tolist()) == [0, 1, 2]  # more classes than queries
        total = costs[level, 1, second[:, 1], second[:, 2]].sum().item()
        best = linear_sum_assignment(costs[level, 1].numpy())
        assert total == pytest.approx(costs[level, 1].numpy()[best].sum())
    assert match(torch.full((2, 1, 3, 4), torch.inf)).shape == (2, 0, 3)


def test_count_is_that_of_the_queries_and_masks() -> None:
    network = build()
    target = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    target[0, :4], target[0, 4:] = 0, 2
    target[1, 0, 0] = 1
    # Two masks and five queries without, one and six; the last image has no label.
    assert network.count(target).tolist() == pytest.approx([2 + 0.5 + 1 + 0.6, 3])
    few = SetLoss(SetLossParams(name="eomt"), 1, LABELS)
    assert few.count(target).tolist() == [2, 2]


def test_the_loss_by_hand() -> None:
    """One image, one class everywhere, a mask of one logit: nothing depends on the points."""
    loss = SetLoss(SetLossParams(name="eomt", train_points=50), 2, LABELS)
    target = torch.ones(1, 8, 8, dtype=torch.uint8)
    classes = torch.tensor([[[0.0, 0.0, 0.0, 2.0], [0.0, 3.0, 0.0, 0.0]]], dtype=torch.float64)
    masks = torch.full((1, 2, 4, 4), 1.5, dtype=torch.float64)
    inner = torch.rand(1, 50, 2, dtype=torch.float64) * 0.7 + 0.15
    loss._points = lambda *_, **__: inner  # type: ignore[method-assign]  # not where zeros lie outside
    divisors = loss.count(target)
    assert divisors.tolist() == [1.1, 1]
    found = loss([Prediction(classes, masks)], (1.0, 1.0), target, torch.tensor([1]), divisors)
    nothing = math.log(3 + math.exp(2)) - 2
    right = math.log(3 + math.exp(3)) - 3
    chance = 1 / (1 + math.exp(-1.5))
    assert found["class"].item() == pytest.approx(2 * (right + 0.1 * nothing) / 1.1)
    assert found["mask"].item() == pytest.approx(5 * math.log(1 + math.exp(-1.5)))
    dice = 1 - (2 * 50 * chance + 1) / (50 * chance + 50 + 1)
    assert found["dice"].item() == pytest.approx(5 * dice)


def test_what_is_ignored_teaches_nothing() -> None:
    """Masks may say what they like where the pixels are ignored; so may all of an image's."""
    network = build().double()
    _, target, keys = batch()
    target[:, :, :32] = 255  # the left half
    target[2] = 255
    prediction = random_predictions()
    masks, classes = prediction.masks.clone(), prediction.classes.clone()
    masks[..., :6], masks[2] = -masks[..., :6], 9  # points of the other half reach a cell further
    classes[2] = 4
    divisors = network.count(target)
    first, second = (
        network.losses(Outputs([one], (1.0, 1.0)), target, keys, divisors)
        for one in (prediction, Prediction(classes, masks))
    )
    assert first["class"].item() == pytest.approx(second["class"].item(), rel=1e-12)
    assert first["mask"].item() == pytest.approx(second["mask"].item(), rel=1e-12)
    assert first["dice"].item() == pytest.approx(second["dice"].item(), rel=1e-12)


def test_uncertain_points_are_chosen_among_the_labelled() -> None:
    loss = SetLoss(SetLossParams(name="eomt", train_points=40), 1, LABELS)
    target = torch.zeros(1, 16, 16, dtype=torch.uint8)
    target[:, :8] = 255
    logits = torch.linspace(-4, 4, 16, dtype=torch.float64).expand(1, 1, 16, 16)
    images, keys = torch.tensor([0]), torch.tensor([11])
    points = loss._points(logits, images, (1.0, 1.0), target, keys, 0)
    assert points.shape == (1, 40, 2)
    assert (points[:, :30, 1] > 7.5 / 16).all()
    assert (points[:, :30, 0] - 0.5).abs().max() < (points[:, 30:, 0] - 0.5).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_batch_add_up(kind: str) -> None:
    network = build(kind, drop_path=0.3).double().train()
    network.advance(0.25)
    images, target, keys = batch()
    target[0, :20] = 255
    divisors = network.count(target)
    halves = network.count(target[:1]) + network.count(target[1:])
    assert torch.allclose(divisors, halves, rtol=1e-14)

    def losses(part: slice) -> dict[str, Tensor]:
        outputs = network(images[part], keys[part])
        return network.losses(outputs, target[part], keys[part], divisors)

    whole, *parts = (losses(part) for part in (slice(0, 3), slice(0, 1), slice(1, 3)))
    assert list(whole) == ["class", "mask", "dice"]
    for name, value in whole.items():
        assert value.dtype == torch.float64
        assert value.shape == ()
        assert value.item() == pytest.approx(sum(p[name].item() for p in parts), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter_with_and_without_recomputing(kind: str) -> None:
    gradients = []
    for with_cp in (False, True):
        network = build(kind, with_cp=with_cp, drop_path=0.2).double().train()
        network.advance(0.25)
        images, target, keys = batch()
        outputs = network(images, keys)
        torch.stack(
            list(network.losses(outputs, target, keys, network.count(target)).values())
        ).sum().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []
        gradients.append([p.grad for p in network.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
        assert plain.abs().sum() > 0


def test_without_a_label_every_gradient_is_zero() -> None:
    network = build().train()
    images, target, keys = batch()
    outputs = network(images.float(), keys)
    divisors = network.count(torch.full_like(target, 255)) + 1
    terms = network.losses(outputs, torch.full_like(target, 255), keys, divisors)
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.item() == 0 for term in terms.values())
    assert all((p.grad == 0).all() for p in network.parameters())


def test_draws_follow_from_keys() -> None:
    network = build().train()
    network.advance(0.25)
    assert 0 < network.attn_mask_probs[0] < 1
    images, _, keys = batch()
    images = images.float()
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again = (network(images, keys).predictions[-1].masks for _ in range(2))
        other = network(images, keys + 1).predictions[-1].masks
        alone = network(images[1:2], keys[1:2]).predictions[-1].masks
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.allclose(first[1:2], alone, atol=1e-4)


def test_annealing_is_that_of_the_published_configurations() -> None:
    """tue-mps/eomt: ADE20K large 512 takes 31 epochs of 1263 steps, COCO small 12 of 7392."""
    published = {
        39120: ([6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600]),
        88692: ([14782, 36955, 59128], [29564, 51737, 73910]),
    }
    for steps, (starts, ends) in published.items():
        intervals = EoMTParams(name="eomt", num_blocks=len(starts)).intervals()
        for (start, end), first, last in zip(intervals, starts, ends, strict=True):
            assert start * steps == pytest.approx(first, abs=2)
            assert end * steps == pytest.approx(last, abs=2)
    giant = EoMTParams(name="eomt", num_blocks=5).intervals()
    starts = [14782, 25869, 36955, 48042, 59128]
    assert [start * 88692 for start, _ in giant] == pytest.approx(starts, abs=2)


def test_a_mask_s_probability_falls_as_a_polynomial() -> None:
    network = build(head={"annealing": ((0.0, 0.5), (0.25, 0.75))})
    found = {}
    for done in (0.0, 0.25, 0.5, 0.9):
        network.advance(done)
        found[done] = network.attn_mask_probs.tolist()
    assert found[0.0] == [1, 1]
    assert found[0.25] == pytest.approx([0.5**0.9, 1])
    assert found[0.5] == pytest.approx([0, 0.5**0.9])
    assert found[0.9] == [0, 0]
    copied = build(head={"annealing": ((0.0, 0.5), (0.25, 0.75))})
    copied.load_state_dict(network.state_dict())
    assert copied.attn_mask_probs.tolist() == [0, 0]
    with pytest.raises(ValueError, match="1 pairs for 2 blocks"):
        EoMTParams(name="eomt", num_blocks=2, annealing=((0.0, 0.5),))
    with pytest.raises(ValueError, match="must rise"):
        EoMTParams(name="eomt", num_blocks=1, annealing=((0.5, 0.5),))


def test_evaluation_masks_while_that_is_the_likelier() -> None:
    network = build().eval()
    images = batch()[0].float()
    results = {}
    with torch.no_grad():
        for probability in (0.0, 0.4, 0.6, 1.0):
            network.attn_mask_probs.fill_(probability)
            results[probability] = network(images).predictions[-1].masks
    assert torch.equal(results[0.0], results[0.4])
    assert torch.equal(results[0.6], results[1.0])


@pytest.mark.parametrize("size", [(48, 64), (50, 33), (16, 16), (5, 70)])
def test_scores_are_those_of_a_plain_loop(size: tuple[int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr("pipeline.models.layers.BAND", 20 * 2 * 7 * 64)  # about 20 rows
    network = build("dinov2").eval()
    images = batch(size, 2)[0].float()
    with torch.no_grad():
        outputs = network(images)
        scores = network.scores(outputs, size, slice(0, size[0]))
    classes, masks = outputs.predictions[-1]
    padded = [-(-side // 16) * 16 for side in size]
    whole = F.interpolate(masks, padded, mode="bilinear")[:, :, : size[0], : size[1]].sigmoid()
    expected = torch.zeros(2, 3, *size)
    for image in range(2):
        for query in range(7):
            shares = classes[image, query].softmax(0)
            for c in range(3):
                expected[image, c] += shares[c] * whole[image, query]
    assert torch.allclose(scores, expected, atol=1e-5)
    probabilities = network.probabilities(scores)
    assert torch.allclose(probabilities.sum(1), torch.ones(2, *size), atol=1e-6)
    larger = network.scores(outputs, (2 * size[0], 3 * size[1]), slice(0, 2 * size[0]))
    assert larger.shape == (2, 3, 2 * size[0], 3 * size[1])


def test_a_loss_of_an_image_with_padding_reads_the_image_s_part_of_the_masks() -> None:
    """40 of 48 rows are the image; the same masks cut to them give the same loss."""
    network = build().double()
    _, target, keys = batch((40, 64))
    prediction = random_predictions()
    masks = prediction.masks.clone()
    masks[:, :, 10:] = 0  # zeros, as they are outside of a map that is cut
    divisors = network.count(target)
    cut = Prediction(prediction.classes, masks[:, :, :10])
    given = Outputs([Prediction(prediction.classes, masks)], (40 / 48, 1.0))
    padded, reference = (
        network.losses(one, target, keys, divisors) for one in (given, Outputs([cut], (1.0, 1.0)))
    )
    for name, value in padded.items():
        assert value.item() == pytest.approx(reference[name].item(), rel=1e-9)
    outputs = build().eval()(torch.randn(1, 3, 40, 64))
    assert outputs.extent == (40 / 48, 1.0)


def test_bf16_keeps_points_and_losses_exact() -> None:
    network = build().train()
    images, target, keys = batch()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(images.float(), keys)
        terms = network.losses(outputs, target, keys, network.count(target))
    assert all(term.dtype == torch.float64 for term in terms.values())
    with torch.no_grad():
        exact = network(images.float(), keys)
        reference = network.losses(exact, target, keys, network.count(target))
    assert terms["class"].item() == pytest.approx(reference["class"].item(), rel=0.1)
    network.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs = network(images.float())
        scores = network.scores(outputs, (48, 64), slice(0, 48))
    assert scores.dtype == torch.float32
    assert torch.equal(scores, network.scores(outputs, (48, 64), slice(0, 48)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_backbone_stays(kind: str) -> None:
    network = build(kind, freeze=True, drop_path=0.5).train()
    images, target, keys = batch()
    assert not any(module.training for module in network.backbone.modules())
    outputs = network(images.float(), keys)
    terms = network.losses(outputs, target, keys, network.count(target))
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone.")
    averaged = copy.deepcopy(network)
    averaged.train()
    assert not averaged.backbone.blocks[0].training


def test_other_backbones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name 'resnet18' is unknown; did you"):
        EoMT.check(EoMTParams(name="eomt"), backbone("dinov2", name="resnet18"), None)
    with pytest.raises(ValueError, match="the backbone has 4"):
        EoMT.build(EoMTParams(name="eomt", num_blocks=5), backbone("dinov2"), None, LABELS)


def test_terms_of_other_networks_are_refused() -> None:
    loss = LossParams(cross_entropy=1.0)
    with pytest.raises(ValueError, match="eomt learns by terms of its own"):
        EoMT.check(EoMTParams(name="eomt"), backbone("dinov2"), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vit_is_that_of_timm(kind: str) -> None:
    import timm

    vit, channels = build_backbone(backbone(kind))
    assert isinstance(vit, ViT)
    assert channels == [32]
    options = {"patch_size": 16, "img_size": 592} if kind == "dinov2" else {}
    network = timm.create_model(
        TINY[NAMES[kind]], num_classes=0, dynamic_img_size=True, **TINY_SIZES, **options
    ).eval()
    network.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 64, 112)
    with torch.no_grad():
        (features,) = vit.eval()(images)
        tokens = network.forward_features(images)[:, 5:]
    assert features.shape == (2, 32, 4, 7)
    assert difference(features.flatten(2).transpose(1, 2), tokens) < 1e-5
    (padded,) = vit(torch.randn(1, 3, 50, 17))
    assert padded.shape == (1, 32, 4, 2)


def published(kind: str, meta: bool) -> dict[str, Tensor]:
    """Weights as timm publishes them, or Meta: under other names, DINOv2's for patches of 14."""
    import timm

    network = timm.create_model(TINY[NAMES[kind]], num_classes=0, **TINY_SIZES)
    weights = network.state_dict()
    if not meta:
        return weights
    weights = dict(weights, mask_token=torch.zeros(1, 32))
    if kind == "dinov2":
        weights["register_tokens"] = weights.pop("reg_token")
        positions = torch.cat([torch.zeros(1, 1, 32), weights["pos_embed"]], dim=1)
        return weights | {"pos_embed": positions}
    weights["storage_tokens"] = weights.pop("reg_token")
    for name in [name for name in weights if name.endswith("q_bias")]:
        query, value = weights.pop(name), weights.pop(name.replace("q_bias", "v_bias"))
        both = torch.cat([query, torch.zeros(32), value])
        weights[name.replace("q_bias", "qkv.bias")] = both
    for name in [name for name in weights if ".gamma_" in name]:
        weights[name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = weights.pop(
            name
        )
    return weights


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_published_weights_fit(kind: str, meta: bool, tmp_path: Any) -> None:
    given = published(kind, meta)
    torch.save(given, tmp_path / "weights.pth")
    vit, _ = build_backbone(backbone(kind, pretrained=str(tmp_path / "weights.pth")))
    own = vit.state_dict()
    assert torch.equal(own["blocks.3.mlp.fc1.weight"], given["blocks.3.mlp.fc1.weight"])
    kernels = [weights["patch_embed.proj.weight"] for weights in (own, given)]
    if kind == "dinov2":
        assert given["patch_embed.proj.weight"].shape[2:] == (14, 14)
        assert torch.equal(own["pos_embed"], given["pos_embed"][:, -37 * 37 :])
        # A flat image means the same to a patch of any size.
        assert torch.allclose(*(kernel.sum(dim=(2, 3)) for kernel in kernels), atol=1e-3)
    else:
        assert torch.equal(*kernels)


def test_weights_of_another_backbone_are_refused(tmp_path: Any) -> None:
    torch.save(published("dinov3", meta=False), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="missing or have another shape"):
        build_backbone(backbone("dinov2", pretrained=str(tmp_path / "weights.pth")))


def test_depths_and_rates_are_those_of_eomt() -> None:
    vit = ViT(NAMES["dinov3"])
    assert [vit.depth_of(name) for name in ("cls_token", "patch_embed.proj.bias")] == [0, 0]
    assert [vit.depth_of(f"blocks.{i}.norm1.weight") for i in range(4)] == [1, 2, 3, 4]
    assert vit.depth_of("norm.weight") == 5
    rates = {name: vit.lr_mult(name, 0.8) for name, _ in vit.named_parameters()}
    assert rates["reg_token"] == rates["blocks.0.gamma_1"] == pytest.approx(0.8**3)
    assert rates["blocks.2.mlp.fc1.bias"] == pytest.approx(0.8)
    assert rates["blocks.3.attn.q_bias"] == rates["norm.bias"] == 1


@pytest.mark.parametrize("shape", [(1, 1370, 32), (1, 9, 64), (9, 32)])
def test_positions_that_do_not_fit_are_told(shape: tuple[int, ...]) -> None:
    network = build("dinov2")
    weights = dict(network.state_dict())
    weights["backbone.pos_embed"] = torch.zeros(shape)
    with pytest.raises(
        ValueError, match=r"backbone\.pos_embed: .* in the file, \(1, 1369, 32\) in"
    ):
        fill(network, weights, "the file")
    weights["backbone.pos_embed"] = torch.ones(1, 9, 32)  # another grid fits
    fill(network, weights, "the file")
    assert network.backbone.pos_embed.shape == (1, 9, 32)


def test_a_loss_without_a_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="class_weight, mask_weight and dice_weight are 0"):
        EoMTParams(name="eomt", class_weight=0.0, mask_weight=0.0, dice_weight=0.0)


def test_the_linear_head_is_dropout_norm_and_a_convolution() -> None:
    head = LinearHead([3, 8], 5, LinearParams(name="linear", dropout=0.0)).train()
    features = torch.randn(4, 8, 3, 3)
    (output,) = head([features, features])
    normed = (features - features.mean((0, 2, 3), keepdim=True)) / torch.sqrt(
        features.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5
    )
    assert torch.allclose(output.logits, head.conv_seg(normed), atol=1e-5)
