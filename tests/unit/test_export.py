"""Exported networks beside torch: every head, at sizes that the export has never seen."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline import registry
from pipeline.evaluation.inference import Predictor
from pipeline.models.layers import _bins
from pipeline.models.network import Network
from pipeline.models.vit import _resampling, _resampling_of_symbols
from pipeline.precision import PRECISIONS, Normalization
from pipeline.prediction.export import METADATA, export_onnx, feeds, open_session, run_session
from pipeline.prediction.parity import Measured, check
from pipeline.registry import is_better
from pipeline.tracking.store import TrackingParams
from tests.unit.sections import REPOSITORY, build
from tests.unit.test_models import options

CPU = torch.device("cpu")
# Batch, height, width: small, odd, a batch of three, even, larger than what was traced.
SIZES = ((1, 40, 56), (1, 33, 47), (3, 65, 97), (1, 64, 64), (1, 150, 203))
# Of the pixels of all sizes together: what ties may take. They are a few in a hundred thousand.
TIES = 1e-4
# What makes different pixels different, where weights are random.
LOUDER = ("conv_seg.weight", "class_head.weight", "q.weight", "mask_head.4.weight")
# Each takes seconds, most of them torch's. They have TensorFlow's padding; pooling to squares and
# joined maps; learned positions, queries and bands. The stage compares any other with torch, too.
NETWORKS = {
    "unet": "efficientnet_lite0",
    "pspnet": "resnet18",
    "eomt": "vit_tiny_patch14_reg4_dinov2",
}


def predictor_of(head: str, backbone: str, scale: tuple[int, int] | None = None) -> Predictor:
    """Of a network of random weights whose classes all occur."""
    torch.manual_seed(0)
    network = build(options(head, **{"backbone.name": backbone}), 5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for name, weight in network.named_parameters():
        if name.endswith(LOUDER):
            weight.data.mul_(30)
    return wrapped(network, scale)


def wrapped(network: Network, scale: tuple[int, int] | None = None) -> Predictor:
    precision = PRECISIONS["fp32"]
    normalize = Normalization((127,) * 3, (40,) * 3, precision=precision, device=CPU)
    return Predictor(network, normalize, precision=precision, scale=scale, window=None)


def pictures(number: int, height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (number, height // 8 + 1, width // 8 + 1, 3))
    return list(coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width].astype(np.uint8))


def differing(predictor: Predictor, path: Path) -> float:
    """The share of the pixels of all SIZES at which onnxruntime and torch differ."""
    session = open_session(path)
    different, total, classes = 0, 0, set()
    for size in SIZES:
        images = pictures(*size)
        found = run_session(session, images, predictor.scale)
        expected = np.stack(predictor.predict(images))
        assert found.shape == expected.shape == size
        different += int((found != expected).sum())
        total += expected.size
        classes |= set(np.unique(expected).tolist())
    assert len(classes) > 1
    return different / total


@pytest.mark.slow
@pytest.mark.parametrize(("head", "backbone"), NETWORKS.items())
def test_an_exported_head_says_what_torch_says(head: str, backbone: str, tmp_path: Path):
    predictor = predictor_of(head, backbone)
    export_onnx(predictor, {}, head, tmp_path / "model.onnx")
    assert differing(predictor, tmp_path / "model.onnx") <= TIES


@pytest.mark.slow
def test_a_scale_is_the_caller_s_and_the_classes_have_the_image_s_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    predictor = predictor_of("fcn", "resnet18", scale=(128, 80))
    about = {"classes": ["sky", "Bäume"], "scale": [128, 80]}
    export_onnx(predictor, about, "fcn", tmp_path / "model.onnx")
    assert differing(predictor, tmp_path / "model.onnx") <= TIES
    session = open_session(tmp_path / "model.onnx")
    held = session.get_modelmeta().custom_metadata_map
    assert json.loads(held[METADATA]) == about
    given = feeds(pictures(2, 300, 200), (128, 80))
    assert given["image"].shape == (2, 120, 80, 3)
    assert given["size"].tolist() == [300, 200]

    # What docs/serving.md shows is that.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/export").mkdir(parents=True)
    (tmp_path / "model.onnx").rename("outputs/export/model.onnx")
    Image.fromarray(pictures(1, 203, 150)[0]).save("photo.jpg")
    page = (REPOSITORY / "docs/serving.md").read_text(encoding="utf-8")
    (program,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    made: dict[str, Any] = {}
    exec(program, made)
    expected = np.stack(predictor.predict([made["image"]]))
    assert made["classes"].shape == expected.shape == (1, 203, 150)
    assert (made["classes"] != expected).mean() <= TIES


class Counting(Network):
    """What looks at an image's size in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.key_draws()

    def outputs(self, images: Tensor) -> Tensor:
        return images if sum(range(images.shape[2])) % 2 else -images

    def count(self, target: Tensor) -> Tensor:
        raise AssertionError("an export learns nothing")

    def losses(self, *arguments: object) -> dict[str, Tensor]:
        raise AssertionError("an export learns nothing")

    def scores(self, outputs: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
        return outputs


def test_a_network_that_can_t_be_exported_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.head\.name counting can't be exported.*predict"):
        export_onnx(wrapped(Counting()), {}, "counting", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("new", [5, 20, 37, 50, 101])
def test_positions_are_resampled_by_arithmetic_as_by_torch(new: int):
    assert torch.allclose(
        _resampling(37, new, torch.float64, CPU),
        _resampling_of_symbols(37, new, torch.float64, CPU),
        atol=1e-12,
    )


@pytest.mark.parametrize(("side", "bins"), [(7, 3), (3, 6), (12, 6), (1, 2), (65, 1)])
def test_bins_are_those_of_adaptive_pooling(side: int, bins: int):
    rows = torch.eye(side, dtype=torch.float64)[None]
    pooled = nn.functional.adaptive_avg_pool1d(rows, bins)[0].T
    assert torch.equal(_bins(side, bins) > 0, pooled > 0)


def areas(right: int, labelled: int = 1000) -> np.ndarray:
    """Of one image and two classes that are equally large and as often right."""
    return np.array([[[right, right], [labelled, labelled], [labelled, labelled]]])


def test_an_export_that_differs_is_refused():
    torch_s = Measured(areas(900), 0, 2000)
    check(torch_s, Measured(areas(900), 0, 2000))
    with pytest.raises(ValueError, match="differs from torch's at 1 of 2000 labelled pixels"):
        check(torch_s, Measured(areas(900), 1, 2000))
    with pytest.raises(ValueError, match=r"by 0\.0\d+ of mean IoU"):
        check(torch_s, Measured(areas(890), 0, 2000))


def test_the_alias_goes_to_the_better_of_two_that_saw_the_same_images():
    old = {"mean_iou": "0.7000", "data.md5": "a", "split": "test"}
    assert is_better(old, None)
    assert is_better(old | {"mean_iou": "0.7001"}, old)
    assert not is_better(old, old)
    assert not is_better(old | {"mean_iou": "0.6999"}, old)
    assert not is_better(old | {"mean_iou": "0.9", "data.md5": "b"}, old)
    assert not is_better(old | {"mean_iou": "0.9", "split": "val"}, old)
    assert not is_better({"data.md5": "a", "split": "test"}, None)


def test_mlflow_gets_a_model_only_where_it_is_to_keep_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(registry, "connect", lambda *_: pytest.fail("asked for"))
    given = TrackingParams(uri=None, experiment="e", log_interval=1, log_model=False)
    model, example = Path("model.onnx"), np.zeros((2, 2, 3), np.uint8)
    registry.log_version(given, "run", None, model, example=example, scores={}, tags={})
    monkeypatch.setattr(registry, "connect", lambda *_: 1 / 0)
    for wanted in ({"log_model": True}, {"registered_model": "feet"}):
        params = given.model_copy(update=wanted)
        registry.log_version(params, "run", None, model, example=example, scores={}, tags={})
        assert "MLflow has not taken the model: division by zero" in capsys.readouterr().out
