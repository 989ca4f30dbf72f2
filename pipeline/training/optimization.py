"""From gradients to weights: optimizer, learning rate, gradient scaler, moving average."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.params import TrainParams
from pipeline.training.checkpoint import Checkpoint

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Learner:
    """All tensors that change while a training runs.

    `scaler` does nothing unless train.precision is fp16. `average` holds the moving average of the
    weights, beside the model's own statistics of batch normalisation; None without
    train.ema_decay.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None

    def measured(self) -> nn.Module:
        """The network that validation is to measure."""
        return self.model if self.average is None else self.average.module

    def states(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model and the optimizer."""
        states: dict[str, Any] = {}
        if self.scaler.is_enabled():
            states["scaler"] = self.scaler.state_dict()
        if self.average is not None:
            states["ema"] = self.average.module.state_dict()
        return states

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint whose weights the model has; what it lacks starts anew."""
        restore_optimizer(self.optimizer, checkpoint["optimizer"], self.model)
        if self.scaler.is_enabled() and "scaler" in checkpoint:
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.average is not None and "ema" in checkpoint:
            self.average.module.load_state_dict(checkpoint["ema"])
            self.average.n_averaged.fill_(1)  # 0 would take the next weights for the average


def build_learner(model: nn.Module, params: TrainParams, device: torch.device) -> Learner:
    """The model with all that trains it.

    Sources: https://arxiv.org/abs/1710.03740 (scaler),
    https://docs.pytorch.org/docs/stable/optim.html#weight-averaging-swa-and-ema (average)
    """
    average = None
    if params.ema_decay is not None:
        update = get_ema_multi_avg_fn(params.ema_decay)  # type: ignore[no-untyped-call]
        average = AveragedModel(model, multi_avg_fn=update)
    scaler = torch.amp.GradScaler(device.type, enabled=params.precision == "fp16")
    return Learner(model, build_optimizer(model, params), scaler, average)


def build_optimizer(model: nn.Module, params: TrainParams) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW (https://arxiv.org/abs/1711.05101)."""
    groups = parameter_groups(model, params)
    if params.optimizer == "sgd":
        return torch.optim.SGD(groups, params.lr, momentum=params.momentum)
    return torch.optim.AdamW(groups, params.lr, betas=(params.momentum, 0.999))


def parameter_groups(model: nn.Module, params: TrainParams) -> list[dict[str, Any]]:
    """The parameters and their names, by `lr_mult` and `weight_decay`."""
    norms = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        for own, _ in module.named_parameters(recurse=False)
    }
    encoder = {id(parameter) for parameter in model.get_submodule("backbone").parameters()}
    groups: dict[tuple[float, float], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        backbone = id(parameter) in encoder
        undecayed = backbone and name in norms and not params.decay_norm
        lr_mult = 1.0 if backbone else params.head_lr_mult
        weight_decay = 0.0 if undecayed else params.weight_decay
        groups.setdefault((lr_mult, weight_decay), []).append((name, parameter))
    return [
        {"params": members, "lr_mult": lr_mult, "weight_decay": weight_decay}
        for (lr_mult, weight_decay), members in groups.items()
    ]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], model: nn.Module
) -> None:
    """Give every parameter what an optimizer's state knew of it, by name.

    Groups and settings stay: what params.yaml says holds, whatever the checkpoint was trained with.
    """
    order = [name for name, _ in model.named_parameters()]  # of a state without names
    names = [name for group in saved["param_groups"] for name in group.get("param_names", order)]
    states = {names[index]: state for index, state in saved["state"].items()}
    groups = optimizer.state_dict()["param_groups"]
    own = [name for group in groups for name in group["param_names"]]
    state = {index: states[name] for index, name in enumerate(own) if name in states}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def learning_rate(params: TrainParams, iteration: int, lr_mult: float = 1.0) -> float:
    """Decay from lr * lr_mult to min_lr, reached at the last iteration, after a linear warm-up.

    The warm-up rises from warmup_ratio of that rate to the whole over iterations 0 to
    warmup_iters - 1; the decay begins at warmup_iters. With auto_scale_lr, lr is params.lr *
    batch_size / base_batch_size. Sources: https://arxiv.org/abs/1606.00915 (poly),
    https://arxiv.org/abs/1608.03983 (cosine), https://arxiv.org/abs/1706.02677 (both others)
    """
    schedule = params.schedule
    scale = params.batch_size / params.base_batch_size if params.auto_scale_lr else 1
    lr = params.lr * scale * lr_mult
    begin = schedule.warmup_iters
    if iteration < begin:
        progress = iteration / max(begin - 1, 1)
        return lr * (schedule.warmup_ratio + (1 - schedule.warmup_ratio) * progress)
    steps = max(params.iterations - begin - 1, 1)
    left = (steps - (iteration - begin)) / steps
    share = (
        left**schedule.power if schedule.policy == "poly" else (1 - math.cos(math.pi * left)) / 2
    )
    return float(schedule.min_lr + (lr - schedule.min_lr) * share)
