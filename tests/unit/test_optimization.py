"""Learning rates against the reference's, parameter groups by name, and an optimizer's memory."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.training.optimization import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    restore_optimizer,
)
from pipeline.training.params import TrainParams
from tests.unit.sections import params


def recipe(lr: float, iterations: int, **schedule: Any) -> TrainParams:
    known = {"policy": "poly", "power": 0.9, "min_lr": 1e-4, "warmup_iters": 0, "warmup_ratio": 0.1}
    changes = {"train.lr": lr, "train.iterations": iterations}
    return params(changes | {"train.schedule": known | schedule}).train


SEGFORMER = {"power": 1.0, "min_lr": 0.0, "warmup_iters": 1500, "warmup_ratio": 1e-6}
RECIPES = {
    "pspnet_80k_ade20k": recipe(0.01, 80000),
    "pspnet_160k_ade20k": recipe(0.01, 160000),
    "pointrend_160k_ade20k": recipe(0.01, 160000, warmup_iters=200),
    "segformer_160k_ade20k": recipe(6e-5, 160000, **SEGFORMER),
}


def reference(train: TrainParams, lr_mult: float) -> list[float]:
    """The rate of every iteration as mmengine's LinearLR and PolyLR make it: each from the last.

    Source: https://github.com/open-mmlab/mmengine, mmengine/optim/scheduler/param_scheduler.py
    """
    schedule, begin = train.schedule, train.schedule.warmup_iters
    start, eta_min = schedule.warmup_ratio, schedule.min_lr
    rate, rates = train.lr * lr_mult, []
    for iteration in range(train.iterations):
        if iteration < begin:
            total, step = begin - 1, iteration
            rise = (1 - start) / (total * start + (step - 1) * (1 - start)) if step else start - 1
            rate *= 1 + rise
        elif iteration > begin:
            total, step = train.iterations - begin - 1, iteration - begin
            rate = (rate - eta_min) * (1 - 1 / (total - step + 1)) ** schedule.power + eta_min
        rates.append(rate)
    return rates


@pytest.mark.parametrize("lr_mult", [1.0, 10.0])
@pytest.mark.parametrize("name", RECIPES)
def test_the_rates_of_a_published_recipe_are_the_references(name: str, lr_mult: float):
    train = RECIPES[name]
    expected = reference(train, lr_mult)
    for iteration in {0, 1, 199, 200, 80000, train.iterations - 1} & set(range(train.iterations)):
        ours = learning_rate(train, iteration, lr_mult)
        assert ours == pytest.approx(expected[iteration], rel=1e-9, abs=1e-15), iteration
    ours = [learning_rate(train, iteration, lr_mult) for iteration in range(train.iterations)]
    assert all(
        math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-15) for a, b in zip(ours, expected, strict=True)
    )


def test_pointrends_rates_are_those_that_were_measured():
    expected = {0: 0.001, 199: 0.01, 200: 0.01, 80000: 0.0054112, 159999: 0.0001}
    for iteration, lr in expected.items():
        rate = learning_rate(RECIPES["pointrend_160k_ade20k"], iteration)
        assert rate == pytest.approx(lr, abs=1e-7), iteration


def test_cosine_decays_from_lr_over_the_mean_to_min_lr():
    train = recipe(0.01, 111, policy="cosine", warmup_iters=10)
    third = 1e-4 + (0.01 - 1e-4) * (1 + math.cos(math.pi / 4)) / 2
    expected = {0: 0.001, 9: 0.01, 10: 0.01, 35: third, 60: 0.00505, 110: 1e-4}
    for iteration, lr in expected.items():
        assert learning_rate(train, iteration) == pytest.approx(lr, rel=1e-12), iteration


def test_the_warm_up_rises_in_equal_steps():
    train = recipe(0.01, 100, warmup_iters=10)
    rates = [learning_rate(train, iteration) for iteration in range(10)]
    assert rates == pytest.approx([0.001 + i * 0.001 for i in range(10)])


@pytest.mark.parametrize("warmup_iters", [0, 1])
@pytest.mark.parametrize("policy", ["poly", "cosine"])
def test_the_shortest_trainings_have_a_rate(policy: str, warmup_iters: int):
    train = recipe(0.01, warmup_iters + 1, policy=policy, warmup_iters=warmup_iters)
    assert learning_rate(train, warmup_iters) == 0.01


def test_the_rate_is_scaled_with_the_batch_and_never_with_the_gpus():
    scaled = {"train.lr": 0.01, "train.batch_size": 8, "train.base_batch_size": 16}
    scaled |= {"train.schedule.warmup_iters": 0, "train.schedule.min_lr": 0.0}
    for gpus in (1, 4):
        changes = scaled | {"train.gpus": gpus}
        off, on = (params(changes | {"train.auto_scale_lr": x}).train for x in (False, True))
        assert learning_rate(off, 0) == 0.01
        assert learning_rate(on, 0) == 0.005


class Network(nn.Module):
    """Normalisation in the backbone and in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(5)
        )
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def optimizer_of(model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, params({f"train.{n}": v for n, v in changes.items()}).train)


def test_groups_hold_the_parameters_by_name_with_their_multipliers():
    norms = [f"backbone.{layer}.{kind}" for layer in (1, 2, 3) for kind in ("weight", "bias")]
    first = ["backbone.0.weight", "backbone.0.bias"]
    head = [f"head.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")]
    expected = {
        (1.0, True): [(1.0, 0.5, first + norms + head)],
        (10.0, True): [(1.0, 0.5, first + norms), (10.0, 0.5, head)],
        (1.0, False): [(1.0, 0.5, first + head), (1.0, 0.0, norms)],
        (10.0, False): [(1.0, 0.5, first), (1.0, 0.0, norms), (10.0, 0.5, head)],
    }
    model = Network()
    named = dict(model.named_parameters())
    for (mult, decay_norm), groups in expected.items():
        optimizer = optimizer_of(model, head_lr_mult=mult, decay_norm=decay_norm, weight_decay=0.5)
        found = optimizer.param_groups
        assert [(g["lr_mult"], g["weight_decay"], g["param_names"]) for g in found] == groups
        for group in found:
            pairs = zip(group["params"], group["param_names"], strict=True)
            assert all(parameter is named[name] for parameter, name in pairs)


def test_the_optimizer_is_the_one_asked_for():
    sgd = optimizer_of(Network(), optimizer="sgd", momentum=0.8)
    adam = optimizer_of(Network(), optimizer="adamw", momentum=0.8)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.8
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.defaults["betas"] == (0.8, 0.999)


def test_what_an_optimizer_remembers_lies_in_memory_as_its_parameter():
    model = Network().to(memory_format=torch.channels_last)
    before = optimizer_of(model, optimizer="adamw")
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    before.step()
    saved = before.state_dict()
    for held in saved["state"].values():  # as a checkpoint holds it
        held |= {name: value.contiguous() for name, value in held.items()}
    after = optimizer_of(model, optimizer="adamw")
    restore_optimizer(after, saved, model)
    for parameter in model.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert after.state[parameter][name].stride() == parameter.stride()
            assert torch.equal(after.state[parameter][name], before.state[parameter][name])


@pytest.mark.parametrize("named", [True, False])
def test_every_parameter_keeps_its_momentum_when_the_groups_change(named: bool):
    model = Network()
    before = optimizer_of(model, optimizer="sgd", weight_decay=0.5)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    before.step()
    saved = before.state_dict()
    if not named:
        del saved["param_groups"][0]["param_names"]
    after = optimizer_of(
        model, optimizer="sgd", weight_decay=0.25, head_lr_mult=10.0, decay_norm=False
    )
    restore_optimizer(after, saved, model)
    assert [group["weight_decay"] for group in after.param_groups] == [0.25, 0.0, 0.25]
    for parameter in model.parameters():
        momentum = after.state[parameter]["momentum_buffer"]
        assert momentum.any()
        assert torch.equal(momentum, before.state[parameter]["momentum_buffer"])


def test_what_is_frozen_is_no_business_of_the_optimizer():
    model = Network()
    model.backbone.requires_grad_(False)
    (group,) = optimizer_of(model).param_groups
    assert all(name.startswith("head.") for name in group["param_names"])


def test_a_layer_decay_multiplies_the_rate_of_every_layer_below():
    model = Network()
    model.backbone.lr_mult = lambda name, decay: decay ** (3 - int(name.split(".")[0]))
    options = params({"train.layer_decay": 0.5, "train.head_lr_mult": 2.0}).train
    groups = {group["lr_mult"]: group["params"] for group in parameter_groups(model, options)}
    names = {mult: {name.rsplit(".", 1)[0] for name, _ in own} for mult, own in groups.items()}
    assert names == {
        0.125: {"backbone.0"},
        0.25: {"backbone.1"},
        0.5: {"backbone.2"},
        1.0: {"backbone.3"},
        2.0: {"head.0", "head.1"},
    }


def test_a_layer_decay_needs_a_backbone_that_has_an_order_of_layers():
    options = params({"train.layer_decay": 0.5}).train
    with pytest.raises(ValueError, match=r"train\.layer_decay 0\.5: this backbone has no order"):
        parameter_groups(Network(), options)


def test_an_extension_has_the_rates_of_a_training_as_long_from_the_beginning():
    schedule = {"train.schedule.warmup_iters": 2, "train.schedule.min_lr": 0.0, "train.lr": 1.0}
    lengths = ({"train.iterations": 8, "train.extend": 4}, {"train.iterations": 8})
    extended, short = (params(schedule | length).train for length in lengths)
    long = params(schedule | {"train.iterations": 12}).train
    rates = [learning_rate(extended, iteration) for iteration in range(12)]
    assert rates[:8] == [learning_rate(short, iteration) for iteration in range(8)]
    assert rates[8:] == [learning_rate(long, iteration) for iteration in range(8, 12)]
    assert rates[7] == 0
    assert rates[8] > 0.3
