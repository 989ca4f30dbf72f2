"""What our sides of the rows share: parameters from a recipe, prepared data, a learner."""

import json
from pathlib import Path
from typing import Any

from benchmarks.images import WORK
from benchmarks.protocol import REPOSITORY
from pipeline import distributed
from pipeline.data.audit import prepare
from pipeline.data.params import DataParams
from pipeline.data.store import INDEX, Store
from pipeline.experiment import Params
from pipeline.training.optimization import Learner
from pipeline.yaml12 import read_yaml
from stages.recipe import WHOLE, load_recipe, merge
from tests.unit import sections

CPU = sections.CPU


def params(recipe: str, changes: dict[str, Any]) -> Params:
    """The parameters of a recipe, with changes by dotted name; no pretrained weights."""
    tree = read_yaml(REPOSITORY / "params.yaml")
    for name, section in load_recipe(recipe).values.items():
        if name in WHOLE:
            tree[name] = {}
        merge(tree[name], section)
    tree["data"].setdefault("root", "data/none")
    sections.change(tree, {"model.backbone.pretrained": None, **changes})
    return Params.model_validate_json(json.dumps(tree))


def prepared(root: Path, recipe: str) -> Store:
    """The generated folder as our own `prepare` packs it, once, with the classes of a recipe."""
    folder = WORK / f"{root.name}-prepared"
    if not (folder / INDEX).is_file():
        prepare(data_params(root, recipe), folder, lambda done, total: None)
    return Store(folder)


def data_params(root: Path, recipe: str) -> DataParams:
    """The section `data` of a generated folder, with the classes of a recipe."""
    pairs = {"name": "pairs", "splits": {"source": "given"}}
    changes = {"root": str(root), "format": pairs, "allow_missing_classes": True}
    return params(recipe, {f"data.{name}": value for name, value in changes.items()}).data


def learner_of(given: Params, num_classes: int) -> Learner:
    """What a process on the CPU trains, as stages/train.py seeds and builds it."""
    distributed.seed_everything(given.train.seed, given.train.deterministic)
    return sections.learner_of(given, num_classes)
