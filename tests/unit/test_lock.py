"""dvc.lock is that of the committed code: in a clone `dvc status` tells the truth."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.disk import file_md5
from pipeline.params import flatten
from pipeline.yaml12 import read_yaml
from tests.unit.sections import REPOSITORY

LOCK = read_yaml(REPOSITORY / "dvc.lock")["stages"]
STAGES = read_yaml(REPOSITORY / "dvc.yaml")["stages"]


def folder_md5(folder: Path) -> str:
    """The identity that DVC gives a folder of code."""
    files = [
        {"md5": file_md5(path), "relpath": path.relative_to(folder).as_posix()}
        for path in sorted(folder.rglob("*.py"))
    ]
    files.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(files).encode()).hexdigest() + ".dir"


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_of_a_stage_is_the_locked_one(stage: str):
    locked = {dep["path"]: dep["md5"] for dep in LOCK[stage]["deps"]}
    code = [dep for dep in STAGES[stage]["deps"] if dep.startswith(("stages/", "pipeline/"))]
    assert len(code) > 5
    for name in code:
        path = REPOSITORY / name
        assert locked[name] == (folder_md5(path) if path.is_dir() else file_md5(path)), name


@pytest.mark.parametrize("stage", STAGES)
def test_the_parameters_of_a_stage_are_the_locked_ones(stage: str):
    locked: dict[str, Any] = LOCK[stage]["params"]["params.yaml"]
    now = read_yaml(REPOSITORY / "params.yaml")
    for name in STAGES[stage]["params"]:
        value = now
        for part in name.split("."):
            value = value[part]
        if isinstance(value, dict):
            assert flatten(locked[name]) == flatten(value), name
        else:
            assert locked[name] == value, name


def test_the_committed_metrics_are_the_locked_ones():
    (metrics,) = [out for out in LOCK["evaluate"]["outs"] if out["path"] == "metrics.json"]
    assert metrics["md5"] == file_md5(REPOSITORY / "metrics.json")
