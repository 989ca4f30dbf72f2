"""Synchronous BN in one process, where it must be the very layer that it replaces."""

import copy

import pytest
import torch
from torch import nn

from pipeline.distributed import SyncBatchNorm, synchronize_batch_norm
from tests.unit.sections import build, model_params


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
def test_a_synchronous_network_is_the_same_function(backbone: str) -> None:
    changes = {"backbone.name": backbone, "backbone.pretrained": None}
    plain = build(model_params(changes), 3).double()
    synchronous = synchronize_batch_norm(copy.deepcopy(plain))
    assert any(isinstance(module, SyncBatchNorm) for module in synchronous.modules())
    images, keys = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)
    for model in (plain, synchronous):
        model.train()
        model(images, keys)[0].logits.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), synchronous.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-8, atol=1e-10), name
    for (name, one), other in zip(plain.named_buffers(), synchronous.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-10), name
    assert plain.state_dict().keys() == synchronous.state_dict().keys()
    with torch.no_grad():
        one, other = (model.eval()(images)[0].logits for model in (plain, synchronous))
    assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_a_synchronous_layer_shares_the_tensors_that_an_optimizer_holds() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    weight = model[0].weight
    assert synchronize_batch_norm(model)[0].weight is weight


def test_a_norm_without_a_synchronous_form_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="BatchNorm1d"):
        synchronize_batch_norm(model)
