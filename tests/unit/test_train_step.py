"""One optimizer step after another on a real network: clipping, averaging, fp16, and going on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.experiment import Params
from pipeline.training.checkpoint import build_checkpoint, fill, load_checkpoint, load_weights
from pipeline.training.checkpoint import save as save_file
from pipeline.training.loop import train_step
from pipeline.training.optimization import Learner
from tests.unit import sections
from tests.unit.sections import params

SMALL = {
    "model.head.name": "pspnet",
    "model.head.aux_weight": 0.0,
    "model.head.channels": 4,
    "model.backbone.name": "resnet18",
    "model.backbone.output_stride": 32,
    "model.backbone.pretrained": None,
    "train.batch_size": 4,
    "train.accumulation": 2,
    "train.iterations": 4,
    "train.optimizer": "sgd",
    "train.lr": 0.05,
    "train.schedule.warmup_iters": 0,
}


def setting(**changes: Any) -> Params:
    return params(SMALL | {f"train.{name}": value for name, value in changes.items()})


def learner_of(given: Params, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    return sections.learner_of(given, 3)


def step(given: Params, learner: Learner, iteration: int) -> float:
    """The step of an iteration, on images drawn from its number; returns the loss."""
    generator = torch.Generator().manual_seed(iteration)
    images = torch.randint(0, 256, (4, 32, 32, 3), generator=generator, dtype=torch.uint8)
    targets = torch.randint(0, 3, (4, 32, 32), generator=generator, dtype=torch.uint8)
    targets[0, :9] = 255
    keys = torch.arange(4) + 4 * iteration
    learner.set_learning_rate(given.train, iteration)
    terms, _ = train_step(learner, (images, targets, keys), given.train.accumulation)
    return sum(term.item() for term in terms.values())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_a_large_gradient_is_cut_down_to_the_norm():
    steps = {}
    for limit in (None, 1e-3, 1e6):
        given = setting(clip_grad_norm=limit, momentum=0.0, weight_decay=0.0)
        learner = learner_of(given)
        before = weights(learner.network)
        step(given, learner, 0)
        after = weights(learner.network)
        steps[limit] = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert steps[None].norm() > 0.05 * 2e-3
    assert steps[1e-3].norm().item() == pytest.approx(0.05 * 1e-3, rel=1e-3)
    assert torch.equal(steps[None], steps[1e6])


def test_the_average_follows_the_weights_and_has_the_statistics_of_the_model():
    given = setting(ema_decay=0.75)
    learner = learner_of(given)
    expected: dict[str, Tensor] = {}
    for iteration in range(3):
        step(given, learner, iteration)
        now = weights(learner.network)
        expected = {n: 0.75 * expected.get(n, now[n]) + 0.25 * now[n] for n in now}
    average = weights(learner.measured())
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value, rtol=1e-5, atol=1e-7)
    assert not any(torch.equal(average[name], now[name]) for name in now)
    buffers = dict(learner.network.named_buffers())
    assert all(torch.equal(buffers[n], b) for n, b in learner.measured().named_buffers())


def test_without_a_decay_the_model_itself_is_measured():
    learner = learner_of(setting())
    assert learner.measured() is learner.network
    assert learner.states().keys() == {"model", "optimizer"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"ema_decay": 0.9, "clip_grad_norm": 1.0, "head_lr_mult": 10.0, "decay_norm": False},
        {"precision": "fp16", "ema_decay": 0.9, "optimizer": "adamw", "clip_grad_norm": 1.0},
    ],
)
def test_a_training_that_is_taken_up_again_ends_in_the_same_bytes(
    changes: dict[str, Any], tmp_path: Path
):
    given = setting(**changes)

    def save(learner: Learner, iteration: int, name: str) -> bytes:
        network = {"head": {"name": "fcn"}, "backbone": {"name": "resnet18"}}
        made = build_checkpoint(learner.states(), iteration, None, {"params": {"model": network}})
        save_file(made, tmp_path / name)
        return (tmp_path / name).read_bytes()

    whole = learner_of(given)
    for iteration in range(4):
        if iteration == 2:
            save(whole, 2, "half.pt")
        step(given, whole, iteration)
    second = learner_of(given, seed=1)
    checkpoint = load_checkpoint(tmp_path / "half.pt")
    fill(second.network, checkpoint["model"], "half.pt")
    second.restore(checkpoint)
    for iteration in (2, 3):
        step(given, second, iteration)
    assert save(second, 4, "second.pt") == save(whole, 4, "whole.pt")

    ready = learner_of(given, seed=1).network  # for evaluation, or to start from
    load_weights(ready, tmp_path / "whole.pt")
    expected = whole.measured().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ready.state_dict().items())


@pytest.mark.slow
def test_a_first_step_that_overflows_in_fp16_leaves_no_momentum():
    given = setting(precision="fp16")
    learner = learner_of(given)
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": 2.0**100})
    before = weights(learner.network)
    step(given, learner, 0)
    assert all(torch.equal(before[name], value) for name, value in weights(learner.network).items())
    states = learner.optimizer.state_dict()["state"].values()
    assert all(not state["momentum_buffer"].any() for state in states)


def test_fp16_learns_by_a_scaled_loss_and_leaves_out_a_step_that_overflows():
    given, single = setting(precision="fp16"), setting()
    learner, other = learner_of(given), learner_of(single)
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": 256.0})
    losses = [(step(given, learner, i), step(single, other, i)) for i in range(3)]
    for half, full in losses:
        assert half == pytest.approx(full, rel=0.02)
    assert any(half != full for half, full in losses)
    scaler = learner.states()["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (256, 3)

    learner.scaler.load_state_dict(scaler | {"scale": 2.0**100})
    before = weights(learner.network)
    step(given, learner, 3)
    assert all(torch.equal(before[name], value) for name, value in weights(learner.network).items())
    assert learner.states()["scaler"]["scale"] == 2.0**99
