"""Files of weights: told apart by content, read without their code, matched by name."""

import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models.weights import Unread, backbone_weights, read_file, weights_of
from pipeline.training.checkpoint import build_checkpoint, load_weights, save

# Saved by mmengine 0.10.7 after four iterations of a network with these two layers and two heads:
# Runner.train with SGD, PolyLR, EMAHook(momentum=0.5), a numpy score to save the best by, and the
# metainfo classes=["background", "foot", "arch"], extra={"a": 1}.
MMENGINE = Path(__file__).parent / "data" / "mmengine.pth"


class Head(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(2, num_classes, 1)


class Tiny(nn.Module):
    """The network of that file, its stem under timm's names."""

    def __init__(self, num_classes: int = 3, auxiliary: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv1 = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2))
        self.decode_head = Head(num_classes)
        self.auxiliary_head = Head(num_classes) if auxiliary else None


def theirs(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's weights, each moved by one, under MMSegmentation's names."""
    weights = model.state_dict()
    return OrderedDict((n.replace("conv1", "stem"), w + 1) for n, w in weights.items())


def saved(content: object, folder: Path, **options: bool) -> Path:
    torch.save(content, folder / "given.pth", **options)
    return folder / "given.pth"


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    own = {name.replace("conv1", "stem"): value for name, value in model.state_dict().items()}
    return own.keys() == weights.keys() and all(own[n].equal(w) for n, w in weights.items())


def test_a_file_of_mmengine_gives_its_averaged_weights_and_its_classes(
    caplog: pytest.LogCaptureFixture,
):
    model = Tiny()
    load_weights(model, MMENGINE, classes=("background", "foot", "arch"))
    assert caplog.records == []
    # What the hook's averaged model and the model itself held when mmengine ended.
    average = torch.tensor([0.0023, 0.5269, -0.0735, 0.1917, -0.2192, -0.1098])
    source = torch.tensor([0.0041, 0.5221, -0.0748, 0.1925, -0.2197, -0.1058])
    loaded = model.decode_head.conv_seg.weight.detach().flatten()
    torch.testing.assert_close(loaded, average, atol=1e-4, rtol=0)
    content = read_file(MMENGINE)
    other = content["ema_state_dict"]["module.decode_head.conv_seg.weight"].flatten()
    torch.testing.assert_close(other, source, atol=1e-4, rtol=0)
    load_weights(model, MMENGINE, classes=("background", "leg", "arch"))
    assert caplog.messages == [f"{MMENGINE} has other names for classes: 1 is 'foot', here 'leg'"]


def test_the_objects_of_mmengine_are_left_unread_and_mmengine_is_not_imported():
    content = read_file(MMENGINE)
    assert content["meta"]["dataset_meta"]["extra"] == {"a": 1}  # a ConfigDict there
    hub = content["message_hub"]
    losses = hub["log_scalars"]["train/loss"]
    assert type(losses) is Unread
    assert vars(losses) == {}
    assert hub["runtime_info"]["max_iters"] == 4
    assert type(hub["runtime_info"]["best_score"]) is Unread  # a scalar of numpy
    assert "mmengine" not in sys.modules


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_mmsegmentation_0_is_read(prefix: str, zipped: bool, tmp_path: Path):
    model = Tiny()
    weights = theirs(model)
    content = {
        "meta": {
            "CLASSES": ("a", "b", "c"),
            "PALETTE": [[0, 0, 0], [1, 1, 1], [2, 2, 2]],
            "config": "model = dict()",
            "hook_msgs": {"best_score": np.float64(0.5)},
            "areas": np.arange(3),
            "counts": defaultdict(list, {"a": [1]}),
        },
        "state_dict": OrderedDict((prefix + name, weight) for name, weight in weights.items()),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).state_dict(),
    }
    path = saved(content, tmp_path, _use_new_zipfile_serialization=zipped)
    assert read_file(path)["meta"]["counts"] == {"a": [1]}
    load_weights(model, path)
    assert same(model, weights)


def test_arrays_of_numpy_1_are_known_by_their_old_names(tmp_path: Path):
    arrays = {"score": np.float64(0.5), "areas": np.arange(3)}
    path = saved(arrays, tmp_path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"numpy._core.multiarray") == 2
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert {type(value) for value in read_file(path).values()} == {Unread}


def test_the_second_copy_that_mmcv_keeps_for_averaging_is_left_out(tmp_path: Path):
    model = Tiny()
    weights = theirs(model)
    copies = {f"ema_{name.replace('.', '_')}": weight * 2 for name, weight in weights.items()}
    load_weights(model, saved({"state_dict": weights | copies}, tmp_path))
    assert same(model, weights)


def test_a_bare_state_dict_is_known_by_its_tensors(tmp_path: Path):
    model = Tiny()
    weights = theirs(model)
    load_weights(model, saved(weights, tmp_path))
    assert same(model, weights)
    with pytest.raises(ValueError, match=r"given\.pth: no weights: .* nor a state_dict itself"):
        load_weights(model, saved({**weights, "iteration": 3}, tmp_path))


def test_a_checkpoint_of_this_tool_is_known_by_its_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model, other = Tiny(), Tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    network = {"head": {"name": "tiny"}, "backbone": {"name": "stem"}}
    about = {"params": {"model": network}, "classes": ["a", "b", "c"]}
    save(build_checkpoint(states, 7, None, about), tmp_path / "last.pth")
    load_weights(other, tmp_path / "last.pth", classes=("a", "c", "b"))
    assert all(other.state_dict()[name].equal(w) for name, w in model.state_dict().items())
    assert "1 is 'b', here 'c'; 2 is 'c', here 'b'" in caplog.text
    with pytest.raises(ValueError, match=r"last\.pth, a tiny on stem, does not fit the model"):
        load_weights(nn.Sequential(nn.Linear(2, 2)), tmp_path / "last.pth")


def test_a_file_of_safetensors_is_read_like_any_other(tmp_path: Path):
    model = Tiny()
    weights = {name: weight.contiguous() for name, weight in theirs(model).items()}
    save_file(weights, tmp_path / "given.safetensors")
    load_weights(model, tmp_path / "given.safetensors")
    assert same(model, weights)
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"broken\.safetensors: not a file of safetensors"):
        load_weights(model, tmp_path / "broken.safetensors")


@pytest.mark.parametrize("form", ["encoder", "whole", "mmsegmentation", "ours", "safetensors"])
def test_pretrained_takes_the_same_files(form: str, tmp_path: Path):
    model = Tiny()
    own = {n: w.contiguous() + 1 for n, w in model.backbone.state_dict().items()}
    path = tmp_path / ("given.safetensors" if form == "safetensors" else "given.pth")
    match form:
        case "encoder":
            torch.save(own, path)
        case "safetensors":
            save_file(own, path)
        case "whole":
            torch.save(
                {f"backbone.{n}": w for n, w in own.items()} | {"x.y": own["conv1.0.weight"]}, path
            )
        case "mmsegmentation":
            torch.save(
                {"state_dict": {n.replace("conv1", "stem"): w for n, w in own.items()}}, path
            )
        case "ours":
            states = {"model": {f"backbone.{n}": w for n, w in own.items()}, "optimizer": {}}
            save(build_checkpoint(states, 1, None, {"params": {}}), path)
    found = backbone_weights(path)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], weight) for name, weight in own.items())


def test_a_checkpoint_of_this_tool_keeps_its_names_and_shapes(tmp_path: Path):
    # An encoder may have 1x1 convolutions where those of MMSegmentation's names are linear layers.
    weights = {"backbone.blocks.0.mlp.fc1.weight": torch.zeros(8, 4, 1, 1)}
    states = {"model": weights, "optimizer": {}}
    save(build_checkpoint(states, 1, None, {"params": {}}), tmp_path / "own.pt")
    found = weights_of(read_file(tmp_path / "own.pt"), tmp_path / "own.pt")
    assert {name: tuple(weight.shape) for name, weight in found.items()} == {
        "backbone.blocks.0.mlp.fc1.weight": (8, 4, 1, 1)
    }


def test_an_auxiliary_head_and_the_counts_of_batches_are_not_needed(tmp_path: Path):
    model = Tiny(auxiliary=False)
    weights = theirs(Tiny())
    assert weights.pop("backbone.stem.1.num_batches_tracked") == 1
    load_weights(model, saved(weights, tmp_path))
    assert model.state_dict()["decode_head.conv_seg.bias"].equal(
        weights["decode_head.conv_seg.bias"]
    )
    assert model.state_dict()["backbone.conv1.1.num_batches_tracked"] == 0
