"""The learning rate against published schedules."""

import pytest
import torch
from torch import nn

from pipeline.params import TrainParams
from pipeline.training.optimization import build_optimizer, learning_rate
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
