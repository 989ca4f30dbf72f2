"""PointRend's points: where they are taken, what is read there, and how the map is refined."""

import torch
from torch.nn import functional as F

from pipeline.models.losses import labels_at
from pipeline.models.pointrend import sample, uncertainty
from tests.unit.sections import build
from tests.unit.test_models import options


def test_the_uncertainty_is_second_best_minus_best():
    logits = torch.tensor([[3.0, 1.0], [0.5, 1.0], [-1.0, 0.0]])[None]  # three classes, two points
    assert uncertainty(logits).tolist() == [[-2.5, 0.0]]


def test_sampling_is_bilinear_between_the_centres_of_pixels():
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[None, None]
    points = torch.tensor([[[0.25, 0.25], [0.5, 0.25], [0.5, 0.5], [0.0, 0.25]]])
    # The last lies half a pixel outside, where there are zeros.
    assert sample(x, points).tolist() == [[[0.0, 0.5, 1.5, 0.0]]]


def test_sampling_is_that_of_torch_forth_and_back():
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 500, 2, dtype=torch.float64)
    theirs = F.grid_sample(x, (points * 2 - 1)[:, :, None], align_corners=False)[..., 0]
    ours = sample(x, points)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, theirs)]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


def test_labels_are_those_of_the_nearest_pixels():
    target = torch.randint(0, 9, (2, 7, 9), dtype=torch.uint8)
    points = torch.rand(2, 500, 2, dtype=torch.float64)
    points[:, 0] = 0
    theirs = F.grid_sample(
        target[:, None].double(), (points * 2 - 1)[:, :, None], mode="nearest", align_corners=False
    )
    assert torch.equal(labels_at(target, points).double(), theirs[:, 0, :, 0])


def point_head(**changes: object):
    model = build(options("pointrend", **changes), 4)
    return model, model.decode_head[1]


def test_most_points_are_the_least_certain_of_the_candidates():
    _, head = point_head(train_points=40, oversample_ratio=3, importance_ratio=0.75)
    head.keys = torch.tensor([3, 8])
    coarse = torch.randn(2, 4, 16, 16)
    points = head.draw(coarse)
    assert points.shape == (2, 40, 2)
    assert ((points >= 0) & (points < 1)).all()
    drawn = head.uniform(2 * (120 + 10)).view(2, 130, 2)
    doubt = uncertainty(sample(coarse, drawn[:, :120]))
    least = doubt.sort(dim=1, descending=True).values[:, 29]
    assert (uncertainty(sample(coarse, points[:, :30])) >= least[:, None] - 1 / 1024).all()
    assert torch.equal(points[:, 30:], drawn[:, 120:])


def test_points_and_refinement_keep_their_places_in_bf16():
    model, head = point_head(subdivision_steps=1, subdivision_points=10**6, train_points=2048)
    head.keys = torch.tensor([3])
    coarse = torch.randn(1, 4, 128, 128)
    points = head.draw(coarse.bfloat16())
    assert points.dtype == torch.float32
    assert points.max() < 1
    assert len(points[0, :, 0].unique()) > 2000
    fine = torch.linspace(0, 1, 128).expand(1, 256, 128, 128)  # tells the column
    with torch.autocast("cpu", torch.bfloat16):
        refined = model.decode_head._refine(fine.bfloat16(), coarse.bfloat16())
    with torch.no_grad():
        exact = model.decode_head._refine(fine, coarse)
    assert (refined - exact).norm() < 0.05 * exact.norm()


def test_the_points_of_a_sample_follow_from_its_key_and_its_own_map():
    _, head = point_head()
    head.keys = torch.tensor([3, 8])
    coarse = torch.randn(2, 4, 16, 16)
    both = head.draw(coarse)
    head.keys = torch.tensor([8])
    assert torch.equal(head.draw(coarse[1:]), both[1:])
    head.keys = torch.tensor([9])
    assert not torch.equal(head.draw(coarse[1:]), both[1:])


def test_refining_every_point_replaces_the_whole_map():
    model, head = point_head(subdivision_steps=1, subdivision_points=10**6)
    fine, coarse = torch.randn(1, 256, 8, 8), torch.randn(1, 4, 8, 8)
    refined = model.decode_head._refine(fine, coarse)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    centres = (torch.stack([columns, rows], dim=2).flatten(0, 1)[None] + 0.5) / 16
    expected = head(fine, coarse, centres).view(1, 4, 16, 16)
    assert torch.allclose(refined, expected, atol=1e-6)


def test_refining_touches_the_least_certain_points_alone():
    model, _ = point_head(subdivision_steps=1, subdivision_points=10)
    fine, coarse = torch.randn(1, 256, 8, 8), torch.randn(1, 4, 8, 8)
    before = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    changed = (model.decode_head._refine(fine, coarse) != before).any(dim=1).flatten()
    least = uncertainty(before.flatten(2))[0].topk(10).indices
    assert changed.nonzero().flatten().tolist() == sorted(least.tolist())


def test_without_subdivision_the_coarse_map_is_the_result():
    model, _ = point_head(subdivision_steps=0)
    fine, coarse = torch.randn(1, 256, 8, 8), torch.randn(1, 4, 8, 8)
    assert torch.equal(model.decode_head._refine(fine, coarse), coarse)


def test_the_coarse_head_runs_once_a_step():
    model, _ = point_head()
    calls = []
    model.decode_head[0].register_forward_hook(lambda *_: calls.append(1))
    model.train()(torch.randn(2, 3, 64, 64), torch.arange(2))
    assert len(calls) == 1
