"""The learning rate against published schedules, the loss by hand."""

import math

import pytest
import torch
from torch import nn

from pipeline.params import TrainParams
from pipeline.training.optimization import build_optimizer, cross_entropy_sum, learning_rate
from tests.unit.sections import params


def schedule(iterations: int, warmup_iters: int) -> TrainParams:
    return params(
        {
            "train.lr": 0.01,
            "train.iterations": iterations,
            "train.schedule": {
                "power": 0.9,
                "min_lr": 0.0001,
                "warmup_iters": warmup_iters,
                "warmup_ratio": 0.1,
            },
        }
    ).train


def test_pspnet_on_ade20k_decays_from_the_first_iteration_to_the_last():
    train = schedule(80000, 0)
    assert learning_rate(train, 0) == 0.01
    assert learning_rate(train, 79999) == pytest.approx(1e-4, abs=1e-12)
    share = 0.25 + 0.75 / 79999  # left after 60000 of the 79999 steps
    assert learning_rate(train, 60000) == pytest.approx(0.0001 + 0.0099 * share**0.9, rel=1e-3)


def test_pointrend_warms_up_and_then_decays():
    train = schedule(160000, 200)
    expected = {0: 0.001, 199: 0.01, 200: 0.01, 80000: 0.0054112, 159999: 0.0001}
    for iteration, lr in expected.items():
        assert learning_rate(train, iteration) == pytest.approx(lr, abs=1e-7), iteration


def test_the_warm_up_rises_in_equal_steps():
    train = schedule(100, 10)
    rates = [learning_rate(train, iteration) for iteration in range(10)]
    assert rates == pytest.approx([0.001 + i * 0.001 for i in range(10)])


@pytest.mark.parametrize("warmup_iters", [0, 1])
def test_the_shortest_trainings_have_a_rate(warmup_iters: int):
    train = schedule(warmup_iters + 1, warmup_iters)
    assert learning_rate(train, warmup_iters) == 0.01


def test_the_loss_is_a_sum_over_the_valid_pixels():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]).T.reshape(1, 2, 1, 2)
    # Pixel 0: class 0 against logits (0, 0); pixel 1: class 1 against (ln 3, 0).
    target = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    expected = math.log(2) + math.log(4)
    assert cross_entropy_sum(logits, target, 255).item() == pytest.approx(expected)
    target[0, 0, 1] = 255
    assert cross_entropy_sum(logits, target, 255).item() == pytest.approx(math.log(2))


def test_the_loss_of_nothing_but_ignored_pixels_is_zero_with_zero_gradients():
    logits = torch.ones(1, 3, 2, 2, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((1, 2, 2), 9, dtype=torch.uint8), 9)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_the_loss_of_bf16_logits_is_summed_in_fp32():
    loss = cross_entropy_sum(
        torch.zeros(1, 2, 32, 32, dtype=torch.bfloat16),
        torch.zeros(1, 32, 32, dtype=torch.uint8),
        255,
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1024 * math.log(2), rel=1e-6)


def test_the_optimizer_is_the_one_asked_for():
    layer = nn.Linear(2, 2)
    sgd = build_optimizer(layer, params({"train.optimizer": "sgd", "train.momentum": 0.8}).train)
    adam = build_optimizer(layer, params({"train.optimizer": "adamw", "train.momentum": 0.8}).train)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.8
    assert isinstance(adam, torch.optim.AdamW)
    assert adam.defaults["betas"] == (0.8, 0.999)
    for optimizer in (sgd, adam):
        assert len(optimizer.param_groups[0]["params"]) == 2
        assert optimizer.defaults["weight_decay"] == params({}).train.weight_decay
