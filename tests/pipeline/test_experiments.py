"""DVC's ways of running experiments, into one MLflow store; and what the results say together."""

import csv
import io
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.project import (
    NETWORKS,
    commit,
    dvc,
    make_project,
    query,
    run,
    set_params,
    stage,
    wait_for_queue,
)

GOOD, BAD = 0.05, 1e-7  # learning rates
# With BY_HAND they are two seeds of a training that learns, and two of one that doesn't.
EXPERIMENTS = {
    "two-processes": {"train.lr": GOOD, "train.seed": 0, "train.gpus": 2},
    "queued": {"train.lr": GOOD, "train.seed": 1, "train.gpus": 1},
    "temporary": {"train.lr": BAD, "train.seed": 1, "train.gpus": 1},
}
BY_HAND = {"train.lr": BAD, "train.seed": 0}  # by the stages alone


def overrides(name: str) -> list[str]:
    return [one for key, value in EXPERIMENTS[name].items() for one in ("-S", f"{key}={value}")]


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    """Four trainings, each run in another way."""
    changes = NETWORKS["pspnet"] | {"train.iterations": 30, "evaluation.interval": 30} | BY_HAND
    make_project(folder, {"train": 12, "val": 2, "test": 12}, **changes)
    colour_by_class(folder / "data/feet")
    for name in ("prepare", "train", "evaluate"):
        stage(folder, name)
    dvc(folder, "exp", "run", "-n", "two-processes", *overrides("two-processes"))
    commit(folder, "Trained")
    dvc(folder, "exp", "run", "--queue", "-n", "queued", *overrides("queued"), "evaluate")
    dvc(folder, "queue", "start")
    dvc(folder, "exp", "run", "--temp", "-n", "temporary", *overrides("temporary"), "evaluate")
    wait_for_queue(folder, 1)
    return folder


def colour_by_class(root: Path) -> None:
    """Make the images easy: each class has a colour of its own, but for some noise."""
    rng = np.random.default_rng(0)
    for path in sorted((root / "targets").rglob("*.png")):
        target = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        colours = np.array([[40, 40, 40], [200, 60, 60], [60, 60, 200]])[np.minimum(target, 2)]
        image = np.clip(colours + rng.integers(-30, 31, colours.shape), 0, 255).astype(np.uint8)
        assert cv2.imwrite(str(path).replace("/targets/", "/images/"), image)


def all_trainings(project: Path) -> list[str]:
    """The experiments' names, and MLflow's of the run by hand, which was the first."""
    (first,) = query(project, "SELECT run_uuid FROM runs ORDER BY start_time LIMIT 1")
    return [*EXPERIMENTS, *first]


def compare(project: Path, *names: str, check: bool = True) -> str:
    return stage(project, "compare", *names, check=check)


def tags(project: Path, key: str) -> list[str]:
    return [row[0] for row in query(project, f"SELECT value FROM tags WHERE key = '{key}'")]


def shown(project: Path) -> list[dict[str, str]]:
    table = csv.DictReader(io.StringIO(dvc(project, "exp", "show", "--csv", "--all-commits")))
    return [row for row in table if row["Experiment"]]


def test_every_way_of_running_is_one_run_in_one_store(project: Path) -> None:
    assert sorted(tags(project, "dvc.exp_name")) == sorted(EXPERIMENTS)
    assert sorted(tags(project, "world_size")) == ["1", "1", "1", "2"]

    said = dvc(project, "exp", "run", "-n", "cached", *overrides("queued"), "evaluate")
    assert "Running stage" not in said
    assert len(tags(project, "world_size")) == 4
    assert query(project, "SELECT DISTINCT status FROM runs") == [("FINISHED",)]
    stores = list(project.rglob("mlflow.db"))
    assert stores == [project / "mlflow.db"]
    for run_id, uri in query(project, "SELECT run_uuid, artifact_uri FROM runs"):
        assert uri == (project / "mlartifacts" / run_id / "artifacts").as_uri()
        model = project / "mlartifacts" / run_id / "artifacts/checkpoints/model.safetensors"
        assert model.is_file()
    assert json.loads((project / "outputs/run.json").read_text())["run_id"]

    rows = {row["Experiment"]: row for row in shown(project)}
    assert EXPERIMENTS.keys() | {"cached"} <= rows.keys()
    assert all(float(rows[name]["mean_iou"]) >= 0 for name in EXPERIMENTS)
    assert float(rows["temporary"]["train.lr"]) == BAD
    assert rows["cached"]["mean_iou"] == rows["queued"]["mean_iou"]
    run(["git", "checkout", "-q", "."], project)
    dvc(project, "checkout")


def test_results_can_be_compared(project: Path) -> None:
    said = dvc(project, "metrics", "diff", "--all", "queued", "temporary")
    assert "mean_iou" in said
    page = dvc(project, "plots", "diff", "queued", "temporary").strip()
    text = Path(page.removeprefix("file://")).read_text()
    for title in ("Training loss", "Mean IoU on val", "IoU of each class", "pixels of each class"):
        assert title in text


def test_seeds_are_gathered_and_the_better_training_is_named(project: Path) -> None:
    said = compare(project, *all_trainings(project))
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
    said = stage(project, "labels", "--shown", "3")
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
    compare(project, *all_trainings(project), "--out", "page.html")
    page = (project / "page.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 6
    sources = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', page)
    assert len(sources) == 6 * 4
    assert re.match(r"test/foot \d\d: image", sources[0])
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing is fetched


def test_a_run_of_mlflow_a_revision_and_the_workspace_are_named_alike(project: Path) -> None:
    (worst,) = query(project, "SELECT run_uuid FROM tags WHERE value = 'temporary'")
    said = compare(project, "workspace", *worst)
    assert f"1 training, train.lr: {BAD}" in said
    assert "nothing is known of the noise of A and B's seeds" in said
    assert "one training: seed 0; name one" in compare(project, "workspace", "HEAD", check=False)
    missing = compare(project, "HEAD", "nothing-like-it", check=False)
    assert "error: nothing-like-it is no experiment, no revision and no MLflow run" in missing


def test_the_gate_stops_a_result_that_is_worse_and_keeps_its_scores(project: Path) -> None:
    set_params(project, {"gate": {"baseline": "HEAD", "tolerance": 0.05}})
    assert "Running stage 'gate'" in dvc(project, "repro")
    set_params(project, EXPERIMENTS["temporary"])
    said = dvc(project, "repro", check=False)
    assert "Running stage 'train'" not in said
    assert "worse than HEAD by more than 0.05, beyond what other images explain:" in said
    assert "failed to reproduce 'gate'" in said
    assert "modified" not in dvc(project, "status", "evaluate")
    set_params(project, {"gate": None})
    dvc(project, "repro")
    said = (project / "outputs/evaluation/gate.txt").read_text(encoding="utf-8")
    assert said == "no gate is set, so every result passes\n"
