"""Sections of params.yaml for the tests: the repository's own, with changes by dotted name."""

import json
from pathlib import Path
from typing import Any

from pipeline.params import Params, read_yaml

REPOSITORY = Path(__file__).resolve().parents[2]


def document(changes: dict[str, Any]) -> dict[str, Any]:
    tree = read_yaml(REPOSITORY / "params.yaml")
    for name, value in changes.items():
        *sections, last = name.split(".")
        section = tree
        for part in sections:
            section = section[part]
        section[last] = value
    return tree


def params(changes: dict[str, Any]) -> Params:
    return Params.model_validate_json(json.dumps(document(changes)))
