"""Every network on a GPU that is not there: fake tensors know their device, not their values.

An operation on tensors of two devices fails here as it would on a GPU, and so does whatever waits
for a value (`.item()`, a mask of unknown size). What fake tensors can't do is the backward pass.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pipeline.evaluation.inference import Predictor, View
from pipeline.models import HEADS, layers, set_loss, vit
from pipeline.models.eomt import EoMT
from pipeline.training.loop import train_step
from pipeline.training.optimization import Learner
from tests.unit.sections import learner_of, params
from tests.unit.test_models import HEADS_ON, SMALL

CUDA = torch.device("cuda", 0)
NETWORKS = HEADS_ON | {"smp.FPN": "resnet18"}


def move(module: nn.Module) -> None:
    """Put fake tensors on the GPU in the place of all parameters and buffers."""
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None:
                part._parameters[name] = nn.Parameter(fake(own), own.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)


def fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)


def learner_on_a_gpu(head: str, precision: str) -> Learner:
    """Built on the CPU; called in a FakeTensorMode, it is then on the GPU."""
    own = {} if head.startswith("smp.") else SMALL.get(head, {"channels": 8})
    changes = {"model.head.name": head} | {f"model.head.{key}": own[key] for key in own}
    changes |= {"model.backbone.name": NETWORKS[head], "model.backbone.pretrained": None}
    changes |= {"train.precision": precision, "train.accumulation": 2}
    if head == "eomt":
        changes["model.loss"] = None
    else:
        changes["model.loss.class_weights"] = [1.0, 2.0, 3.0]
    return learner_of(params(changes), 3)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Take away what needs a real device or a value by its nature, once the networks are built."""
    # The tensors that these keep must not be fake.
    kept = (layers._pool_weights, layers.bilinear_weights, layers.tap_weights, vit._resampling)

    def forget() -> None:
        for cache in kept:
            cache.cache_clear()

    def take_away() -> None:
        forget()
        monkeypatch.setattr(torch.autograd, "backward", lambda loss: None)
        monkeypatch.setattr(Learner, "clip", lambda self: torch.ones((), device=CUDA).isfinite())
        monkeypatch.setattr(Learner, "step", lambda self: None)
        # Which queries are matched is decided on the CPU, and it is the only wait of a step.
        monkeypatch.setattr(
            set_loss, "match", lambda costs: torch.zeros(len(costs), 2, 3, dtype=torch.int64)
        )
        monkeypatch.setattr(EoMT, "_likely_masked", lambda self: [True, False])
        # autocast asks whether there is a GPU that can do it.
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)

    yield take_away
    forget()


@pytest.mark.parametrize("head", NETWORKS)
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_step_stays_on_its_device_and_never_waits(
    head: str, precision: str, pretend: Callable[[], None]
):
    learner = learner_on_a_gpu(head, precision)
    pretend()
    with FakeTensorMode():
        move(learner.network)
        move(learner.normalize)
        images = torch.empty(4, 64, 96, 3, dtype=torch.uint8)
        targets = torch.empty(4, 64, 96, dtype=torch.uint8)
        keys = torch.empty(4, dtype=torch.int64)
        learner.network.advance(0.5)
        terms, _ = train_step(learner, (images, targets, keys), accumulation=2)
    assert terms
    for name, term in terms.items():
        assert (term.device, term.dtype, term.dim()) == (CUDA, torch.float64, 0), name


@pytest.mark.parametrize("head", NETWORKS)
def test_an_evaluation_stays_on_its_device_and_never_waits(head: str, pretend: Callable[[], None]):
    learner = learner_on_a_gpu(head, "bf16")
    learner.network.eval()
    pretend()
    with FakeTensorMode(), torch.no_grad():
        move(learner.network)
        move(learner.normalize)
        predictor = Predictor(
            learner.network, learner.normalize, learner.precision, scale=None, window=None
        )
        images = torch.empty(2, 64, 96, 3, dtype=torch.uint8, device=CUDA)
        scores = View(predictor, images).scores((64, 96), slice(0, 64))
        probabilities = learner.network.probabilities(scores)
    for result in (scores, probabilities):
        assert (result.device, result.dtype) == (CUDA, torch.float32)
        assert result.shape == (2, 3, 64, 96)


def test_a_tensor_on_another_device_and_a_wait_are_found():
    with FakeTensorMode():
        here = torch.empty(3, device=CUDA)
        with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
            here + torch.ones(3)
        with pytest.raises(DataDependentOutputException):
            here.sum().item()


def test_every_head_is_tried():
    assert set(NETWORKS) >= set(HEADS)
