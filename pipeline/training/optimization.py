"""Loss, optimizer and learning rate."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.params import TrainParams


def cross_entropy_sum(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Cross entropy summed over the valid pixels: the caller divides once, by those of all ranks.

    logits (N,C,H,W), target (N,H,W) uint8 -> scalar, at least fp32. Pixels as rows, because torch's
    two-dimensional form has no deterministic CUDA kernel.
    """
    rows = logits.permute(0, 2, 3, 1).flatten(0, 2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return F.cross_entropy(
        rows, target.flatten().long(), ignore_index=ignore_index, reduction="sum"
    )


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
