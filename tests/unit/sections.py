"""Sections of params.yaml for the tests: the repository's own, with changes by dotted name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.distributed import parallelize
from pipeline.errors import InputError
from pipeline.experiment import Params, load_params
from pipeline.models import ModelParams, build_model
from pipeline.models.network import Labels, Network
from pipeline.precision import PRECISIONS, Normalization
from pipeline.training.optimization import Learner, build_average, build_learner
from pipeline.yaml12 import read_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def document(changes: dict[str, Any]) -> dict[str, Any]:
    """params.yaml with changes; a changed name of a head or a format takes its keys away."""
    tree = read_yaml(REPOSITORY / "params.yaml")
    change(tree, changes)
    return tree


def change(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set keys by their dotted names, as `document` says."""
    for part in ("model.head", "data.format"):
        if f"{part}.name" in changes:
            section, key = part.split(".")
            tree[section][key] = {}
    for name, value in changes.items():
        *sections, last = name.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value


def refusal(folder: Path, changes: dict[str, Any]) -> str:
    """In what words a file of params.yaml with these changes is refused."""
    path = folder / "params.yaml"
    text = json.dumps(document(changes)).replace("Infinity", ".inf")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="can't be used") as caught:
        load_params(path)
    return str(caught.value)


def params(changes: dict[str, Any]) -> Params:
    return Params.model_validate_json(json.dumps(document(changes)))


def model_params(changes: dict[str, Any]) -> ModelParams:
    """The section `model`, with changes by the names below it."""
    tree = document({f"model.{name}": value for name, value in changes.items()})
    return ModelParams.model_validate_json(json.dumps(tree["model"]))


def labels(num_classes: int) -> Labels:
    return Labels(num_classes, 255, [1 / num_classes] * num_classes)


def build(section: ModelParams, num_classes: int) -> Network:
    return build_model(section, labels(num_classes))


def learner_of(given: Params, num_classes: int) -> Learner:
    """What a process on the CPU trains, as stages/train.py builds it."""
    precision = PRECISIONS[given.train.precision]
    network = build(given.model, num_classes).to(CPU, precision.weights)
    network.to(memory_format=torch.channels_last).train()
    average = build_average(network, given.train.ema_decay)
    model = parallelize(network, CPU)
    normalize = Normalization(given.model.mean, given.model.std, precision=precision, device=CPU)
    return build_learner(model, network, average=average, normalize=normalize, params=given.train)
