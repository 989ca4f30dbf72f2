"""Experiments compared: seeds gathered, the sentence, the page with its pictures, the gate."""

import csv
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.project import commit, dvc, make_project, query, run, set_params

GOOD, BAD = 0.05, 1e-7  # learning rates


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    """Two seeds of a training that learns, and of one that doesn't."""
    changes = {"train.iterations": 30, "train.lr": GOOD, "evaluation.interval": 30}
    make_project(folder, {"train": 12, "val": 2, "test": 12}, **changes)
    colour_by_class(folder / "data/feet")
    dvc(folder, "repro")
    commit(folder, "Trained")
    queued = ["-S", f"train.lr={GOOD},{BAD}", "-S", "train.seed=range(0,2)"]
    dvc(folder, "exp", "run", "--queue", *queued)
    dvc(folder, "exp", "run", "--run-all")
    return folder


def colour_by_class(root: Path) -> None:
    """Make the images easy: each class has a colour of its own, but for some noise."""
    rng = np.random.default_rng(0)
    for path in sorted((root / "targets").rglob("*.png")):
        target = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        colours = np.array([[40, 40, 40], [200, 60, 60], [60, 60, 200]])[np.minimum(target, 2)]
        image = np.clip(colours + rng.integers(-30, 31, colours.shape), 0, 255).astype(np.uint8)
        assert cv2.imwrite(str(path).replace("/targets/", "/images/"), image)


def compare(project: Path, *names: str, check: bool = True) -> str:
    return run([sys.executable, "-m", "stages.compare", *names], project, check).stdout


def experiments(project: Path) -> list[str]:
    return sorted(dvc(project, "exp", "list", "--name-only").split())


def test_seeds_are_gathered_and_the_better_training_is_named(project: Path) -> None:
    names = experiments(project)
    assert len(names) == 4
    said = compare(project, *names)
    lines = {line[0]: line for line in said.splitlines() if re.match(r"[AB]  ", line)}
    assert all("2 trainings" in line for line in lines.values())
    (good,) = (letter for letter, line in lines.items() if f"train.lr: {GOOD}" in line)
    (bad,) = (letter for letter, line in lines.items() if f"train.lr: {BAD}" in line)
    number = r"\d\.\d{4} ± \d\.\d{4}"
    answer = f"{good} beats {bad} by {number} mean IoU on 12 images and 2 seeds: shown"
    assert re.search(answer, said), said
    assert re.search(r"\nfoot .* shown\n", said), said


def test_a_wrong_label_is_found(project: Path) -> None:
    path = project / "data/feet/targets/test/foot 05.png"
    before = path.read_bytes()
    target = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    target[(target == 1) & (np.arange(target.shape[1]) > target.shape[1] // 2)] = 2
    assert cv2.imwrite(str(path), target)
    dvc(project, "repro", "prepare")
    said = run([sys.executable, "-m", "stages.labels", "--shown", "3"], project).stdout
    assert re.match(r"0\.\d{4}  test/foot 05\n", said)
    with (project / "labels.csv").open(newline="") as file:
        first, *others = csv.DictReader(file)
    assert len(others) == 11
    assert (first["image"], first["label"], first["looks like"]) == ("test/foot 05", "arch", "foot")
    assert int(first["pixels"]) > 50
    assert int(first["left"]) + int(first["width"]) > target.shape[1] // 2
    page = (project / "labels.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 3
    assert page.index("1. test/foot 05") < page.index("2. test/foot")
    path.write_bytes(before)
    dvc(project, "repro", "prepare")


def test_the_page_shows_the_images_that_differ_most(project: Path) -> None:
    compare(project, *experiments(project), "--out", "page.html")
    page = (project / "page.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 6
    sources = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', page)
    assert len(sources) == 6 * 4
    assert re.match(r"test/foot \d\d: image", sources[0])
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing is fetched


def test_a_run_of_mlflow_a_revision_and_the_workspace_are_named_alike(project: Path) -> None:
    (worst,) = query(
        project,
        "SELECT p.run_uuid FROM params p JOIN params s ON p.run_uuid = s.run_uuid WHERE "
        f"p.key = 'train.lr' AND p.value = '{BAD}' AND s.key = 'train.seed' AND s.value = '1'",
    )
    said = compare(project, "workspace", *worst)
    assert f"1 training, train.lr: {BAD}" in said
    assert "nothing is known of the noise of A and B's seeds" in said
    assert "one training: seed 0; name one" in compare(project, "workspace", "HEAD", check=False)
    missing = compare(project, "HEAD", "nothing-like-it", check=False)
    assert "error: nothing-like-it is no experiment, no revision and no MLflow run" in missing


def test_the_gate_stops_a_result_that_is_worse_and_keeps_its_scores(project: Path) -> None:
    set_params(project, {"gate": {"baseline": "HEAD", "tolerance": 0.05}})
    assert "Running stage 'gate'" in dvc(project, "repro")
    set_params(project, {"train.lr": BAD})
    said = dvc(project, "repro", check=False)
    assert "worse than HEAD by more than 0.05, beyond what other images explain:" in said
    assert "failed to reproduce 'gate'" in said
    assert "modified" not in dvc(project, "status", "evaluate")
    set_params(project, {"gate": None})
    dvc(project, "repro")
    said = (project / "outputs/evaluation/gate.txt").read_text(encoding="utf-8")
    assert said == "no gate is set, so every result passes\n"
