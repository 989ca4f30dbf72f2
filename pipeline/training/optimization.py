"""Loss, optimizer and learning rate."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.params import TrainParams


def cross_entropy_sum(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Cross entropy summed over the valid pixels: the caller divides once, by those of all ranks.

    logits (N,C,...), target (N,...) uint8 -> scalar, at least fp32. Pixels as rows, because torch's
    two-dimensional form has no deterministic CUDA kernel.
    """
    rows = logits.movedim(1, -1).flatten(0, -2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return F.cross_entropy(
        rows, target.flatten().long(), ignore_index=ignore_index, reduction="sum"
    )


def labels_at(target: Tensor, points: Tensor) -> Tensor:
    """Labels of the pixels nearest to points (N,P,2), x and y in [0,1): (N,H,W) -> (N,P)."""
    height, width = target.shape[1:]
    size = points.new_tensor([width, height])
    column, row = (points * size - 0.5).round().long().unbind(dim=2)  # as torch's grid_sample
    places = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return target.flatten(1).gather(1, places)


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
