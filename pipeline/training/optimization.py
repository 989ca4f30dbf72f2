"""Optimizer and learning rate."""

import torch
from torch import nn

from pipeline.params import TrainParams


def build_optimizer(model: nn.Module, params: TrainParams) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW (https://arxiv.org/abs/1711.05101), decaying every parameter."""
    if params.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            params.lr,
            momentum=params.momentum,
            weight_decay=params.weight_decay,
        )
    return torch.optim.AdamW(
        model.parameters(),
        params.lr,
        betas=(params.momentum, 0.999),
        weight_decay=params.weight_decay,
    )


def learning_rate(params: TrainParams, iteration: int) -> float:
    """Poly decay from lr to min_lr, reached at the last iteration, after a linear warm-up.

    The warm-up rises from warmup_ratio * lr to lr over iterations 0 to warmup_iters - 1; the decay
    begins at warmup_iters. Source: https://arxiv.org/abs/1606.00915
    """
    schedule = params.schedule
    begin = schedule.warmup_iters
    if iteration < begin:
        progress = iteration / max(begin - 1, 1)
        return params.lr * (schedule.warmup_ratio + (1 - schedule.warmup_ratio) * progress)
    left = 1 - (iteration - begin) / max(params.iterations - begin - 1, 1)
    return float(schedule.min_lr + (params.lr - schedule.min_lr) * left**schedule.power)
