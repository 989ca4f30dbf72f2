"""Logits equal to those of MMSegmentation 1.2.2, from weights under its own names.

data/parity holds what it computed, in float32 on a CPU, from weights drawn by a rule and an input
of noise: names and shapes of its state_dict, and logits (some whole, some strided).
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.models import build_model
from pipeline.models.mmseg import from_mmseg
from pipeline.params import ModelParams
from tests.unit.sections import document

PARITY = Path(__file__).parent / "data" / "parity"
MODELS = {
    "fcn_r50": {"name": "fcn", "backbone.name": "resnet50c", "backbone.output_stride": 8},
    "pspnet_r50": {"name": "pspnet", "backbone.name": "resnet50c", "backbone.output_stride": 8},
    "pointrend_r101": {"name": "pointrend", "backbone.name": "resnet101c", "aux_weight": 0.0},
}


def build(changes: dict[str, object], num_classes: int = 150) -> nn.Module:
    given = {"backbone.pretrained": None, "aux_weight": 0.4, "dropout": 0.1} | changes
    tree = document({f"model.{name}": value for name, value in given.items()})
    return build_model(ModelParams.model_validate_json(json.dumps(tree["model"])), num_classes)


def drawn_weights(names: list[tuple[str, list[int]]], tame: bool) -> dict[str, Tensor]:
    """Weights by the rule, each from the checksum of its name."""
    weights = {}
    for name, shape in names:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_mean"):
            value = 0.1 * rng.standard_normal(shape)
        elif name.endswith("running_var"):
            value = 1 + 0.5 * rng.random(shape)
        elif len(shape) > 1:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(".weight"):
            value = 1 + 0.1 * rng.standard_normal(shape)
        else:
            value = 0.05 * rng.standard_normal(shape)
        if tame and name.startswith("backbone.layer") and name.endswith("bn3.weight"):
            value = value * 0.2
        if tame and name.endswith(("conv_seg.weight", "fc_seg.weight")):
            value = value * 0.1
        weights[name] = torch.from_numpy(np.asarray(value, np.float32))
    return weights


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_mmsegmentation(name: str) -> None:
    (path,) = PARITY.glob(f"{name}*.npz")
    theirs = np.load(path)
    names = json.loads((PARITY / f"{name}.state_dict.json").read_text())
    model = build(MODELS[name])
    weights = drawn_weights(names, tame=path.stem.endswith("_tame"))
    model.load_state_dict(from_mmseg(weights))
    image = np.random.default_rng(0).standard_normal((1, 3, 128, 160)).astype(np.float32)
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(image)).numpy()
    assert list(logits.shape) == theirs["logits_shape"].tolist()
    ours, expected = logits[:, ::10, ::8, ::8], theirs["logits_sub"]
    assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.mean(logits.argmax(axis=1) == theirs["argmax"]) >= 0.9999
    mean, std, total, low, high = theirs["logits_stats"]
    found = [
        logits.mean(),
        logits.std(),
        np.abs(logits).sum(dtype=np.float64),
        logits.min(),
        logits.max(),
    ]
    assert found == pytest.approx([mean, std, total, low, high], rel=1e-4, abs=1e-5)
