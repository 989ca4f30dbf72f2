"""What our sides of the rows share: parameters from a recipe, prepared data, a learner."""

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.images import WORK
from benchmarks.protocol import REPOSITORY
from pipeline import distributed
from pipeline.data.audit import prepare
from pipeline.data.store import INDEX, Store
from pipeline.experiment import Params
from pipeline.models import build_model
from pipeline.models.network import Labels
from pipeline.precision import PRECISIONS, Normalization
from pipeline.training.optimization import Learner, build_learner
from pipeline.yaml12 import read_yaml
from stages.recipe import WHOLE, load_recipe, merge

CPU = torch.device("cpu")


def params(recipe: str, changes: dict[str, Any]) -> Params:
    """The parameters of a recipe, with changes by dotted name; no pretrained weights."""
    tree = read_yaml(REPOSITORY / "params.yaml")
    for name, section in load_recipe(recipe).values.items():
        if name in WHOLE:
            tree[name] = {}
        merge(tree[name], section)
    tree["data"].setdefault("root", "data/none")
    for name, value in {"model.backbone.pretrained": None, **changes}.items():
        *sections, last = name.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return Params.model_validate_json(json.dumps(tree))


def prepared(root: Path, recipe: str) -> Store:
    """The generated folder as our own `prepare` packs it, once, with the classes of a recipe."""
    folder = WORK / f"{root.name}-prepared"
    given = params(
        recipe,
        {
            "data.root": str(root),
            "data.format": {"name": "pairs", "splits": {"source": "given"}},
            "data.allow_missing_classes": True,
        },
    )
    if not (folder / INDEX).is_file():
        prepare(given.data, folder, lambda done, total: None)
    return Store(folder)


def learner_of(given: Params, num_classes: int) -> Learner:
    """What one process on the CPU trains, as stages/train.py builds it, without MLflow."""
    distributed.seed_everything(given.train.seed, given.train.deterministic)
    precision = PRECISIONS[given.train.precision]
    network = build_model(given.model, Labels(num_classes, 255, [1 / num_classes] * num_classes))
    network.to(CPU, precision.weights).to(memory_format=torch.channels_last)
    model = distributed.parallelize(network, CPU)
    normalize = Normalization(given.model.mean, given.model.std, precision=precision, device=CPU)
    learner = build_learner(model, network, normalize, given.train)
    learner.model.train()
    return learner
