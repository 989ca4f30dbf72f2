"""Logits equal to those of MMSegmentation 1.2.2, from weights under its own names.

data/parity holds what it computed, in float32 on a CPU, from weights drawn by a rule and an input
of noise: names and shapes of its state_dict, and logits (argmax whole, the rest strided). `_tame`:
some of the weights made smaller, against overflow. `_large`: as large as DeepLab's dilations.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.models.mmseg import from_mmseg
from tests.unit.drawn import drawn_weights
from tests.unit.sections import build, model_params

PARITY = Path(__file__).parent / "data" / "parity"
R50 = {"backbone.name": "resnet50c", "backbone.output_stride": 8}
R18 = {"backbone.name": "resnet18c", "backbone.output_stride": 8}
MODELS: dict[str, dict[str, object]] = {
    "deeplabv3_r50": {"head.name": "deeplabv3"} | R50,
    "deeplabv3plus_r50": {"head.name": "deeplabv3plus"} | R50,
    "fcn_r50": {"head.name": "fcn"} | R50,
    "pointrend_r101": {"head.name": "pointrend", "backbone.name": "resnet101c"},
    "pspnet_r18": {"head.name": "pspnet", "head.channels": 128} | R18,
    "pspnet_r50": {"head.name": "pspnet"} | R50,
    "segformer_b0": {"head.name": "segformer", "backbone.name": "mit_b0"},
    "segformer_b2": {"head.name": "segformer", "backbone.name": "mit_b2"},
    "semantic_fpn_r50": {"head.name": "semantic_fpn", "backbone.name": "resnet50c"},
    "upernet_r50": {"head.name": "upernet", "backbone.name": "resnet50c"},
}
FILES = sorted(PARITY.glob("*.npz"))


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_are_those_of_mmsegmentation(path: Path) -> None:
    theirs = np.load(path)
    (name,) = (name for name in MODELS if path.stem.startswith(name))
    names = json.loads((PARITY / f"{name}.state_dict.json").read_text())
    auxiliary = any(entry[0].startswith("auxiliary_head.") for entry in names)
    changes = {"backbone.pretrained": None, "head.aux_weight": 0.4 if auxiliary else 0.0}
    model = build(model_params(MODELS[name] | changes), 150)
    drawn = drawn_weights(names, path.stem.endswith("_tame"))
    weights = {name: torch.from_numpy(value) for name, value in drawn}
    model.load_state_dict(from_mmseg(weights))
    size = theirs["logits_shape"].tolist()
    image = np.random.default_rng(0).standard_normal((1, 3, *size[2:])).astype(np.float32)
    with torch.inference_mode():
        inputs = torch.from_numpy(image)
        logits = model.eval().scores(model(inputs), (size[2], size[3]), slice(0, size[2])).numpy()
        if auxiliary and "aux_raw_sub" in theirs:
            (output,) = model.auxiliary_head([inputs, *model.backbone(inputs)])
            assert (
                difference(output.logits[:, ::10, ::2, ::2].numpy(), theirs["aux_raw_sub"]) < 1e-5
            )
    assert list(logits.shape) == size
    step = 16 if path.stem.endswith("_large") else 8
    assert difference(logits[:, ::10, ::step, ::step], theirs["logits_sub"]) < 1e-5
    assert np.mean(logits.argmax(axis=1) == theirs["argmax"]) >= 0.9999
    total = np.abs(logits).sum(dtype=np.float64)
    found = [logits.mean(), logits.std(), total, logits.min(), logits.max()]
    assert found == pytest.approx(theirs["logits_stats"].tolist(), rel=1e-4, abs=1e-5)


def test_every_set_of_reference_arrays_is_used() -> None:
    assert {name for name in MODELS for path in FILES if path.stem.startswith(name)} == set(MODELS)
