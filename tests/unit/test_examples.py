"""What the pages of docs/ name exists, and what docs/architecture.md shows works."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from pipeline.params import flatten
from tests.project import REPOSITORY, SMALL, make_project, run, set_params
from tests.unit.test_structure import FILES, IMPORTS

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', re.M | re.S)

# Run in the project: what the new code computes, by hand.
CHECKS = """
import math
import numpy as np
import torch
from pipeline.data.transforms import AugmentationParams, augment
from pipeline.models.losses import Criterion, LossParams

image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
target = np.zeros((8, 8), np.uint8)
def drawn(**changes):
    params = AugmentationParams(crop_size=(8, 8), ratio_range=(1.0, 1.0), **changes)
    rng = np.random.default_rng(1)
    return augment(image, target, params, fill=(0, 0, 0), ignore_index=255, rng=rng)[0]
grey, colour = drawn(grayscale=1.0), drawn()
assert (grey == grey[..., :1]).all() and not (colour == colour[..., :1]).all()
assert abs(colour @ [0.299, 0.587, 0.114] - grey[..., 0]).max() < 1

logits = torch.tensor([0.6, 0.3, 0.1]).log().view(1, 3, 1, 1).expand(1, 3, 1, 3)
criterion = Criterion(LossParams(brier=2.0), [1 / 3] * 3, 255)
labels = torch.tensor([[[1, 1, 255]]], dtype=torch.uint8)  # divided by the valid pixels
(term,) = criterion(logits, labels, criterion.count(labels)).values()
assert math.isclose(term.item(), 2 * (0.6**2 + 0.7**2 + 0.1**2), rel_tol=1e-6)
"""


def apply(example: str, folder: Path) -> set[str]:
    """Write the new files of an example and apply its changes; returns the files it touches."""
    touched = set()
    for language, title, text in BLOCK.findall(EXAMPLES[example]):
        if language == "python":
            assert not (folder / title).exists()
            (folder / title).write_text(text, encoding="utf-8")
            touched.add(title)
        elif language == "diff":
            command = ["git", "apply", "--verbose", "-"]
            done = subprocess.run(
                command, cwd=folder, input=text, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{example}: {done.stderr}"
            assert "Skipped" not in done.stderr
            touched |= set(re.findall(r"^\+\+\+ b/(.+)$", text, re.M))
    return touched


def parameters(example: str) -> dict[str, Any]:
    """What the example writes into params.yaml."""
    (text,) = (text for language, _, text in BLOCK.findall(EXAMPLES[example]) if language == "yaml")
    return flatten(YAML(typ="safe", pure=True).load(text))


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("docs/*.md")), ids=lambda path: path.stem)
def test_every_file_and_every_test_that_a_page_names_is_there(path: Path):
    page = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (REPOSITORY / "docs" / link).exists(), link
    for name in re.findall(r"`((?:pipeline|stages|tests)/[\w/]+\.py)`", page):
        assert (REPOSITORY / name).is_file(), name
    tests = "".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("tests/*/*.py"))
    for name in re.findall(r"`(test_\w{12,})`", page):
        assert f"def {name}(" in tests, name


def test_imports_go_down_the_table_of_layers():
    rows = [
        row.split("|")[1]
        for row in PAGE.split("## The way of a batch")[0].splitlines()[1:]
        if row.startswith("| `")
    ]
    layers = [re.findall(r"`([\w/.]+)`", row) for row in rows]

    def place(module: str) -> int:
        path = FILES[module].relative_to(REPOSITORY).as_posix()
        (found,) = [
            number
            for number, names in enumerate(layers)
            for name in names
            if path.startswith(name) or path == f"pipeline/{name}"
        ]
        return found

    upward = {
        (module, used)
        for module in FILES.keys() - {"pipeline"}  # the door, which opens when it is asked for
        for used in IMPORTS[module] & FILES.keys()
        if place(used) < place(module)
    }
    assert upward == set()


def test_each_example_touches_two_files_at_most_and_is_clean(tmp_path: Path):
    assert set(EXAMPLES) == {"A head", "A format", "An augmentation", "A term of the loss"}
    for folder in ("pipeline", "stages"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    for file in ("params.yaml", "pyproject.toml"):
        shutil.copy(REPOSITORY / file, tmp_path)
    for example in EXAMPLES:
        assert 1 <= len(apply(example, tmp_path)) <= 2, example
    run([sys.executable, "-m", "ruff", "check", "--no-cache"], tmp_path)
    run([sys.executable, "-m", "ruff", "format", "--check", "--no-cache"], tmp_path)


@pytest.mark.slow
def test_all_examples_together_train(tmp_path: Path):
    project = make_project(tmp_path, {"train": 4, "val": 2, "test": 2})
    data = project / "data/feet"
    for kind, suffix in (("images", ""), ("targets", "_mask")):
        for path in sorted((data / kind).rglob("*.png")):
            split = data / path.parent.name
            split.mkdir(exist_ok=True)
            path.rename(split / f"{path.stem}{suffix}.png")
        shutil.rmtree(data / kind)
    shutil.copy(REPOSITORY / "params.yaml", project)  # as the examples know it
    for example in EXAMPLES:
        apply(example, project)
    set_params(project, SMALL)
    for example in EXAMPLES:
        set_params(project, parameters(example))

    python = [sys.executable, "-m"]  # of the project's code
    assert "images: train 4, val 2, test 2" in run([*python, "stages.prepare"], project).stdout
    run([*python, "stages.train"], project)
    with (project / "outputs/train.tsv").open(newline="") as file:
        points = list(csv.DictReader(file, delimiter="\t"))
    assert len(points) == SMALL["train.iterations"]
    for point in points:
        terms = [float(value) for name, value in point.items() if name.startswith("loss/")]
        assert len(terms) == 4  # of both heads
        assert float(point["loss/brier"]) > 0
        assert sum(terms) == pytest.approx(float(point["loss"]))
    checkpoint = torch.load(project / "outputs/checkpoints/best.pt", weights_only=True)
    assert checkpoint["model"]["decode_head.conv.conv.weight"].shape == (16, 256, 3, 3)
    assert checkpoint["params"]["augmentation"]["grayscale"] == 0.2
    run([sys.executable, "-c", CHECKS], project)
