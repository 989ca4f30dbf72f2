"""What is cut into parts, in a group of one process: each part is all, and each rule holds."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pipeline.distributed import blocks, gathered, placed, shard, to_first_rank, whole
from pipeline.training.loop import train_step
from pipeline.training.optimization import Learner
from tests.unit import sections
from tests.unit.sections import CPU, build, params
from tests.unit.test_models import HEADS_ON, options


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("head", HEADS_ON)
def test_a_network_of_parts_is_the_same_function(head: str) -> None:
    torch.manual_seed(0)
    backbone = HEADS_ON[head].replace("resnet18c", "efficientnet_lite0")  # of smaller blocks
    plain = build(options(head, **{"backbone.name": backbone}), 5).train()
    parts = copy.deepcopy(plain)
    shard(parts, CPU)
    images, keys = torch.randn(2, 3, 64, 64), torch.arange(2)
    target = torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8)
    for network in (plain, parts):
        network.advance(0.5)
        terms = network.losses(network(images, keys), target, keys, network.count(target))
        sum(terms.values()).backward()
    for (name, one), (own, other) in zip(
        plain.named_parameters(), parts.named_parameters(), strict=True
    ):
        assert own == name
        assert isinstance(other, DTensor)
        torch.testing.assert_close(whole(other.grad), one.grad, msg=name)
    with gathered(parts), torch.inference_mode():
        seen = [
            network.scores(network.eval()(images), (64, 64), slice(0, 64))
            for network in (plain, parts)
        ]
        assert not any(isinstance(one, DTensor) for one in parts.parameters())
    torch.testing.assert_close(*seen)
    assert all(isinstance(one, DTensor) for one in parts.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_of_parts_are_those_of_the_whole(
    precision: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 and fp16 too: what is rounded is autocast's to say in either."""
    setting = {"precision": precision, "optimizer": optimizer, "lr": 0.01, "ema_decay": 0.5}
    setting |= {"clip_grad_norm": 0.5, "accumulation": 2}
    tiny = {"model.head.name": "linear", "model.backbone.name": "vit_tiny_patch14_reg4_dinov2"}
    given = params(
        tiny
        | {"model.backbone.pretrained": None, "model.backbone.freeze": False}
        | {f"train.{name}": value for name, value in setting.items()}
    )

    def learned() -> Learner:
        torch.manual_seed(0)
        learner = sections.learner_of(given, 3)
        if learner.average is not None and isinstance(learner.network, FSDPModule):
            shard(learner.average.module, CPU)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (4, 32, 32, 3), generator=generator, dtype=torch.uint8)
        targets = torch.randint(0, 3, (4, 32, 32), generator=generator, dtype=torch.uint8)
        for iteration in range(3):
            learner.set_learning_rate(given.train, iteration)
            train_step(learner, (images, targets, torch.arange(4)), 2, leave_out=True)
        return learner

    def parts(network: nn.Module, device: torch.device) -> nn.Module:
        shard(network, device)
        return network

    one = learned()
    monkeypatch.setattr(sections, "parallelize", parts)
    other = learned()
    states = to_first_rank(other.states())()
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(states["model"][name], value, rtol=1e-6, atol=1e-6, msg=name)
    for name, value in one.measured().state_dict().items():
        torch.testing.assert_close(states["ema"][name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_blocks_of_transformers_and_stages_are_cut_by_themselves() -> None:
    vit = build(options("eomt", **{"backbone.name": "vit_tiny_patch16_dinov3"}), 3)
    assert set(vit.backbone.blocks) < set(blocks(vit))
    resnet = build(options("pspnet", **{"backbone.name": "resnet50c"}), 3)
    cut = blocks(resnet)
    assert {*resnet.backbone["layer3"], *resnet.backbone["layer4"]} < set(cut)
    assert size(cut) > 0.8 * size([resnet])


def size(modules: list[nn.Module]) -> int:
    return sum(value.numel() for module in modules for value in module.parameters())


def test_of_sequences_in_sequences_the_layers_may_be_called() -> None:
    """As segmentation_models_pytorch calls those of a DenseNet's transitions."""
    inner = [nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)]
    assert blocks(nn.ModuleDict({"outer": nn.Sequential(*inner)})) == []


def test_a_parameter_that_cannot_be_cut_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    tied = nn.ModuleDict({"one": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    tied["other"].weight = tied["one"].weight
    with pytest.raises(ValueError, match=r"fsdp can't cut scale, which is a single .* use .*ddp"):
        shard(Odd(), CPU)
    with pytest.raises(ValueError, match=r"fsdp can't cut other\.weight, which is shared by two"):
        shard(tied, CPU)


def test_what_is_saved_is_what_was_held_when_it_was_asked_for() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    shard(network, CPU)
    put_together = to_first_rank({"model": network.state_dict(), "groups": [{"lr": 0.5}]})
    for name, value in network.named_parameters():
        with torch.no_grad():
            value.zero_()
        copy = placed(expected[name], value)
        assert isinstance(copy, DTensor)
        assert torch.equal(whole(copy), expected[name])
    network[1].running_mean.add_(1)
    states = put_together()
    assert states["groups"] == [{"lr": 0.5}]
    for name, value in expected.items():
        assert type(states["model"][name]) is torch.Tensor
        assert torch.equal(states["model"][name], value)
