"""From gradients to weights: optimizer, learning rate, gradient scaler, moving average."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.errors import InputError
from pipeline.models.network import Network
from pipeline.models.weights import MALFORMED
from pipeline.precision import PRECISIONS, Normalization, Precision
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.params import TrainParams

Placing = Callable[[Tensor, Tensor], Tensor]  # a whole tensor, and one like that to be made of it
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def copied(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy in memory as `like` is, which a tensor of a file is not."""
    return torch.empty_like(like).copy_(tensor)


@dataclass(frozen=True)
class Learner:
    """A network with all that trains it: all tensors that change while a training runs.

    Where the network is sharded, each process holds a part of most of them.
    `model` is what a step calls: the network, on several processes in what shares its gradients.
    `scaler` does nothing unless train.precision is fp16. `average` holds the moving average of the
    weights, beside the network's own statistics of batch normalisation; None without
    train.ema_decay.
    """

    model: nn.Module
    network: Network
    normalize: Normalization
    precision: Precision
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    clip_grad_norm: float | None

    @property
    def device(self) -> torch.device:
        """Where the network learns."""
        return self.normalize.mean.device

    def measured(self) -> Network:
        """The network that validation is to measure."""
        if self.average is None:
            return self.network
        average: Any = self.average.module
        assert isinstance(average, Network)
        return average

    def set_learning_rate(self, params: TrainParams, iteration: int) -> None:
        """Give every group of parameters its rate in this iteration."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(params, iteration, group["lr_mult"])

    def clip(self) -> Tensor:
        """Make the gradients of a batch, by now whole, ready for `step`; whether they are finite.

        Those of fp16 always count as finite: the scaler leaves a step out where they are not, and
        goes on with a smaller scale. The answer is a boolean () on the device.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [own.grad for own in self.network.parameters() if own.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self.clip_grad_norm is not None:
            parameters = self.network.parameters()
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad_norm, norm, foreach=True)
        return norm.isfinite() | self.scaler.is_enabled()

    def leave_out(self) -> None:
        """Forget the gradients in place of a step; of fp16 the scale learns of it, as of any."""
        self.scaler.update()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """From gradients to new weights and their new average."""
        self.scaler.step(self.optimizer)  # not where fp16 has overflowed
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.network)

    def tensors(self) -> list[Tensor]:
        """All that a checkpoint holds of this."""
        tensors = [*self.network.state_dict().values()]
        for state in self.optimizer.state.values():
            tensors += [one for one in state.values() if isinstance(one, Tensor)]
        tensors += [] if self.average is None else self.average.module.state_dict().values()
        return tensors

    def states(self) -> dict[str, Any]:
        """What a checkpoint holds of all this."""
        states: dict[str, Any] = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.scaler.is_enabled():
            states["scaler"] = self.scaler.state_dict()
        if self.average is not None:
            states["ema"] = self.average.module.state_dict()
        return states

    def restore(self, checkpoint: Checkpoint, placed: Placing = copied) -> None:
        """Go on from a checkpoint whose weights the network has; what it lacks starts anew.

        `placed` says what this process is to hold of a tensor, for one that lies in memory already.

        Raises:
            InputError: what it knows beside the weights is not of this network.
        """
        try:
            saved = checkpoint["optimizer"]
            restore_optimizer(self.optimizer, saved, self.network, placed)
            if self.scaler.is_enabled() and "scaler" in checkpoint:
                self.scaler.load_state_dict(checkpoint["scaler"])
            if self.average is not None and "ema" in checkpoint:
                module = self.average.module
                own = module.state_dict()
                given = checkpoint["ema"].items()
                held = {name: _fitting(value, own[name], placed) for name, value in given}
                module.load_state_dict(held)
                self.average.n_averaged.fill_(1)  # 0 would take the next weights for the average
        except MALFORMED as error:
            raise InputError(
                f"the checkpoint to go on from has a state of the optimizer that does not fit the "
                f"network ({error!r}); take its weights alone, by train.load_from"
            ) from error


def build_average(network: Network, decay: float | None) -> AveragedModel | None:
    """A moving average of the network's weights, which so far are those it has; None without decay.

    Source: https://docs.pytorch.org/docs/stable/optim.html#weight-averaging-swa-and-ema
    """
    if decay is None:
        return None
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(network, multi_avg_fn=update)


def build_learner(
    model: nn.Module,
    network: Network,
    *,
    average: AveragedModel | None,
    normalize: Normalization,
    params: TrainParams,
) -> Learner:
    """The network with all that trains it; `model` is the network as it trains, see Learner.

    Raises:
        InputError: train.layer_decay is set, and the backbone has no order of layers.

    Source: https://arxiv.org/abs/1710.03740 (scaler)
    """
    device = normalize.mean.device.type
    return Learner(
        model=model,
        network=network,
        normalize=normalize,
        precision=PRECISIONS[params.precision],
        optimizer=build_optimizer(network, params),
        scaler=torch.amp.GradScaler(device, enabled=params.precision == "fp16"),
        average=average,
        clip_grad_norm=params.clip_grad_norm,
    )


def build_optimizer(network: Network, params: TrainParams) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW (https://arxiv.org/abs/1711.05101)."""
    groups = parameter_groups(network, params)
    if params.optimizer == "sgd":
        fused = all(type(own) is nn.Parameter for own in network.parameters())
        optimizer = torch.optim.SGD(  # torch fuses no steps of sharded parameters by SGD
            groups, params.lr, momentum=params.momentum, fused=fused, foreach=not fused
        )
        if params.momentum:  # else a first step that overflows in fp16 leaves memory nobody wrote
            for group in optimizer.param_groups:
                for own in group["params"]:
                    optimizer.state[own]["momentum_buffer"] = torch.zeros_like(own)
        return optimizer
    return torch.optim.AdamW(groups, params.lr, betas=(params.momentum, 0.999), fused=True)


def parameter_groups(network: Network, params: TrainParams) -> list[dict[str, Any]]:
    """The parameters that learn, with their names, by `lr_mult` and `weight_decay`."""
    norms = {
        f"{name}.{own}"
        for name, module in network.named_modules()
        if isinstance(module, NORMS)
        for own, _ in module.named_parameters(recurse=False)
    }
    encoder = {id(parameter): own for own, parameter in network.backbone.named_parameters()}
    groups: dict[tuple[float, float], list[tuple[str, Tensor]]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        backbone = id(parameter) in encoder
        undecayed = backbone and name in norms and not params.decay_norm
        lr_mult = params.head_lr_mult
        if backbone:
            lr_mult = layer_multiplier(network.backbone, encoder[id(parameter)], params.layer_decay)
        weight_decay = 0.0 if undecayed else params.weight_decay
        groups.setdefault((lr_mult, weight_decay), []).append((name, parameter))
    return [
        {"params": members, "lr_mult": lr_mult, "weight_decay": weight_decay}
        for (lr_mult, weight_decay), members in groups.items()
    ]


def layer_multiplier(backbone: nn.Module, name: str, layer_decay: float) -> float:
    """What `train.lr` is multiplied by for a parameter of the backbone: less for early layers.

    Raises:
        InputError: the backbone has no order of layers.
    """
    if layer_decay == 1:
        return 1.0
    multiplier = getattr(backbone, "lr_mult", None)
    if multiplier is None:
        raise InputError(
            f"train.layer_decay {layer_decay}: this backbone has no order of layers; use 1, or a "
            "plain transformer, vit_*"
        )
    return float(multiplier(name, layer_decay))


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    model: nn.Module,
    placed: Placing = copied,
) -> None:
    """Give every parameter what an optimizer's state knew of it, by name; see `Learner.restore`.

    Groups and settings stay: what params.yaml says holds, whatever the checkpoint was trained with.
    """
    order = [name for name, _ in model.named_parameters()]  # of a state without names
    names = [name for group in saved["param_groups"] for name in group.get("param_names", order)]
    states = {names[index]: state for index, state in saved["state"].items()}
    groups = optimizer.state_dict()["param_groups"]
    own = [name for group in groups for name in group["param_names"]]
    parameters = dict(model.named_parameters())
    state = {
        index: {
            key: _fitting(value, parameters[name], placed) if _of_places(value) else value
            for key, value in states[name].items()
        }
        for index, name in enumerate(own)
        if name in states
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _of_places(value: Any) -> bool:
    """Whether a state has a value for each of its parameter's, and not one for them all."""
    return isinstance(value, Tensor) and value.dim() > 0


def _fitting(value: Tensor, like: Tensor, placed: Placing) -> Tensor:
    if value.shape != like.shape:
        raise ValueError(f"{tuple(value.shape)} for a tensor {tuple(like.shape)}")
    return placed(value, like)


def learning_rate(params: TrainParams, iteration: int, lr_mult: float = 1.0) -> float:
    """Decay from lr * lr_mult to min_lr, reached at the last iteration, after a linear warm-up.

    The warm-up rises from warmup_ratio of that rate to the whole over iterations 0 to
    warmup_iters - 1; the decay begins at warmup_iters. With auto_scale_lr, lr is params.lr *
    batch_size / base_batch_size. The iterations that `extend` adds have the rates that they would
    have, had the training been as long from the beginning. Sources:
    https://arxiv.org/abs/1606.00915 (poly), https://arxiv.org/abs/1608.03983 (cosine),
    https://arxiv.org/abs/1706.02677 (warm-up and scale)
    """
    schedule = params.schedule
    scale = params.batch_size / params.base_batch_size if params.auto_scale_lr else 1
    lr = params.lr * scale * lr_mult
    begin = schedule.warmup_iters
    if iteration < begin:
        progress = iteration / max(begin - 1, 1)
        return lr * (schedule.warmup_ratio + (1 - schedule.warmup_ratio) * progress)
    steps = max(params.horizon(iteration) - begin - 1, 1)
    left = (steps - (iteration - begin)) / steps
    share = (
        left**schedule.power if schedule.policy == "poly" else (1 - math.cos(math.pi * left)) / 2
    )
    return float(schedule.min_lr + (lr - schedule.min_lr) * share)
