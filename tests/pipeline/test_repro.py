"""`dvc repro` on 40 photographs of mixed sizes: what is on disk and in MLflow afterwards."""

import csv
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.disk import file_md5
from pipeline.evaluation.per_image import PerImage
from pipeline.yaml12 import read_yaml
from tests.project import dvc, make_project, metrics, query, run, set_params, stage


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    make_project(folder, {"train": 24, "val": 8, "test": 8})
    (folder / "mlflow.db").unlink()  # as in a fresh clone
    dvc(folder, "repro")
    return folder


def runs(project: Path) -> list[str]:
    return [row[0] for row in query(project, "SELECT run_uuid FROM runs ORDER BY start_time")]


def tags(project: Path, run_id: str) -> dict[str, str]:
    return dict(query(project, f"SELECT key, value FROM tags WHERE run_uuid = '{run_id}'"))


def parameters(project: Path, run_id: str) -> dict[str, str]:
    return dict(query(project, f"SELECT key, value FROM params WHERE run_uuid = '{run_id}'"))


def points(project: Path, run_id: str) -> dict[tuple[str, int], float]:
    rows = query(project, f"SELECT key, step, value FROM metrics WHERE run_uuid = '{run_id}'")
    return {(key, step): value for key, step, value in rows}


def planned(project: Path) -> str | None:
    """The first stage that `dvc repro` would run now; a dry run can't see past it."""
    found = re.search(r"Running stage '(\w+)'", dvc(project, "repro", "--dry"))
    return found and found[1]


def test_the_outputs_are_complete(project: Path) -> None:
    outputs = project / "outputs"
    for name in ("last.pt", "best.pt"):
        checkpoint = torch.load(outputs / "checkpoints" / name, weights_only=True)
        assert checkpoint["classes"] == ["background", "foot", "arch"]
    assert checkpoint["iteration"] == checkpoint["best"]["iteration"]
    for name, count in (("train.tsv", 8), ("val.tsv", 2), ("evaluation/classes.tsv", 3)):
        with (outputs / name).open() as file:
            assert len(list(csv.DictReader(file, delimiter="\t"))) == count
    path = outputs / "evaluation/per_image.npz"
    per_image = PerImage.load(path.read_bytes(), path)
    assert per_image.names.tolist() == [f"test/foot {number:02}" for number in range(8)]
    for index, name in enumerate(per_image.names):
        with Image.open(outputs / f"evaluation/predictions/{name}.png") as mask:
            assert mask.mode == "P"
            counts = np.bincount(np.asarray(mask).ravel(), minlength=3)
        ignored = 3 * mask.width  # in each target
        assert counts.sum() - per_image.areas()[index, 2].sum() == ignored
    pictures = list((outputs / "evaluation/overlays").glob("*.png"))
    kinds = {path.name.split("-")[0] for path in pictures}
    assert kinds == {"panel", "best", "median", "worst"}
    picture = cv2.imread(str(pictures[0]))
    assert (picture.shape[1] - 8) % 3 == 0  # image, target, prediction, with two gaps


def test_the_metrics_are_those_of_the_confusion_matrix(project: Path) -> None:
    with (project / "outputs/evaluation/confusion.tsv").open() as file:
        cells = list(csv.DictReader(file, delimiter="\t"))
    matrix = np.array([int(cell["pixels"]) for cell in cells]).reshape(3, 3)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - np.diag(matrix)
    iou = np.diag(matrix) / union
    scores = json.loads((project / "outputs/evaluation/scores.json").read_text())
    assert list(scores["iou"].values()) == pytest.approx(iou.tolist(), abs=1e-12)
    assert scores["mean_iou"] == pytest.approx(iou.mean(), abs=1e-12)
    headline = metrics(project)
    assert headline["mean_iou"] == scores["mean_iou"]
    assert [headline["mean_iou_low"], headline["mean_iou_high"]] == [
        *scores["interval"]["mean_iou"].values()
    ]
    assert headline["mean_iou_low"] <= headline["mean_iou"] <= headline["mean_iou_high"]
    labelled = json.loads((project / "data/prepared/summary.json").read_text())["splits"]["test"]
    assert matrix.sum() == sum(labelled["pixels"].values())
    assert "baseline" not in scores  # the colour rule is Blue Marble's alone


def test_every_number_leads_back(project: Path) -> None:
    (run_id,) = runs(project)
    identity = json.loads((project / "outputs/run.json").read_text())
    lock = read_yaml(project / "dvc.lock")["stages"]
    data_md5 = lock["prepare"]["outs"][0]["md5"]
    assert identity["run_id"] == run_id
    assert query(project, "SELECT status FROM runs") == [("FINISHED",)]
    own = tags(project, run_id)
    assert own["fingerprint"] == identity["fingerprint"]
    assert own["data.md5"] == data_md5
    assert own["git.rev"] == run(["git", "rev-parse", "HEAD"], project).stdout.strip()
    assert own["git.dirty"] == "false"
    assert own["world_size"] == "1"
    assert query(project, "SELECT name, digest FROM datasets") == [("feet", data_md5)]
    assert parameters(project, run_id)["train.lr"] == "0.01"
    assert parameters(project, run_id)["evaluation.split"] == "test"
    logged = points(project, run_id)
    assert {step for name, step in logged if name == "train/loss"} == set(range(1, 9))
    assert {step for name, step in logged if name == "val/mean_iou"} == {4, 8}
    assert logged["test/mean_iou", 0] == metrics(project)["mean_iou"]
    artifacts = project / "mlartifacts" / run_id / "artifacts"
    weights = file_md5(artifacts / "checkpoints/model.safetensors")
    assert weights == file_md5(project / "outputs/checkpoints/model.safetensors")
    assert list(artifacts.glob("evaluation/overlays/*.png"))


def test_nothing_runs_twice(project: Path) -> None:
    assert "up to date" in dvc(project, "repro")
    set_params(project, {"tracking.experiment": "other", "tracking.log_interval": 3})
    assert "up to date" in dvc(project, "repro")
    set_params(project, {"tracking.experiment": "instep", "tracking.log_interval": 1})
    assert len(runs(project)) == 1


def test_a_change_runs_what_depends_on_it(project: Path) -> None:
    set_params(project, {"train.lr": 0.02})
    assert planned(project) == "train"
    set_params(project, {"train.lr": 0.01, "train.workers": 1})
    assert planned(project) is None
    set_params(project, {"train.workers": 0})
    code = project / "pipeline/training/params.py"
    original = code.read_bytes()
    code.write_bytes(original + b"# a comment\n")
    assert "up to date" in dvc(project, "status", "prepare")
    assert planned(project) == "train"
    code.write_bytes(original)
    image = project / "data/feet/images/train/foot 00.png"
    original = image.read_bytes()
    changed = cv2.imread(str(image))
    changed[0, 0] ^= 255
    cv2.imwrite(str(image), changed)
    assert planned(project) == "prepare"
    image.write_bytes(original)
    assert planned(project) is None


def test_another_evaluation_is_another_run(project: Path) -> None:
    (first,) = runs(project)
    before = points(project, first), parameters(project, first), tags(project, first)
    weights = (project / "outputs/checkpoints/last.pt").stat().st_mtime_ns
    set_params(project, {"evaluation.flip": True})
    assert planned(project) == "evaluate"
    dvc(project, "repro", "evaluate")
    assert (project / "outputs/checkpoints/last.pt").stat().st_mtime_ns == weights
    _, second = runs(project)
    assert (points(project, first), parameters(project, first), tags(project, first)) == before
    assert tags(project, second)["mlflow.parentRunId"] == first
    assert parameters(project, second)["evaluation.flip"] == "True"
    assert points(project, second)["test/mean_iou", 0] == metrics(project)["mean_iou"]
    set_params(project, {"evaluation.flip": False})
    dvc(project, "repro", "evaluate")
    assert len(runs(project)) == 2


def test_bad_parameters_and_bad_data_stop_before_the_training(project: Path) -> None:
    weights = project / "outputs/checkpoints/last.pt"
    before = file_md5(weights)
    set_params(project, {"train.gpus": "two"})
    said = dvc(project, "repro", check=False)
    assert "train.gpus" in said
    set_params(project, {"train.gpus": 1})
    target = project / "data/feet/targets/val/foot 01.png"
    original = target.read_bytes()
    target.write_bytes(original[: len(original) // 2])
    said = dvc(project, "repro", check=False)
    assert "foot 01.png" in said
    assert "Running stage 'train'" not in said
    target.write_bytes(original)
    dvc(project, "repro", "evaluate")
    assert file_md5(weights) == before


def test_training_goes_on_from_a_checkpoint_or_starts_from_its_weights(project: Path) -> None:
    kept = project / "kept.pt"
    kept.write_bytes((project / "outputs/checkpoints/last.pt").read_bytes())
    set_params(project, {"train.resume_from": "kept.pt", "train.iterations": 10})
    # What the checkpoint says of its best score and its decay belongs to the other training.
    set_params(project, {"train.validate": False, "train.weight_decay": 0.5})
    stage(project, "train")
    rows = (project / "outputs/train.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[0] for row in rows] == ["9", "10"]
    resumed = torch.load(project / "outputs/checkpoints/last.pt", weights_only=True)
    assert resumed["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    assert resumed["best"] is None
    set_params(project, {"train.validate": True, "train.weight_decay": 0.01})
    set_params(project, {"train.resume_from": None, "train.load_from": "kept.pt"})
    stage(project, "train")
    rows = (project / "outputs/train.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[0] for row in rows] == [str(number) for number in range(1, 11)]
    set_params(project, {"train.load_from": "outputs/checkpoints/last.pt"})
    assert "copy it elsewhere" in stage(project, "train", check=False)
    changes = {"train.load_from": None, "train.iterations": 8, "train.validate": False}
    set_params(project, changes)
    for name in ("train", "evaluate"):
        stage(project, name)
    assert not (project / "outputs/checkpoints/best.pt").exists()
    assert metrics(project)["mean_iou"] >= 0


def test_a_checkpoint_of_mmsegmentation_is_measured_without_training(project: Path) -> None:
    trained = torch.load(project / "outputs/checkpoints/last.pt", weights_only=True)
    weights = {f"module.{name}": weight for name, weight in trained["model"].items()}
    meta = {"CLASSES": ("background", "foot", "arch"), "PALETTE": [[0, 0, 0]] * 3}
    torch.save({"meta": meta, "state_dict": weights}, project / "pspnet.pth")
    before = metrics(project)
    set_params(project, {"train.load_from": "pspnet.pth", "train.iterations": 0})
    set_params(project, {"train.validate": True})  # there is no iteration to validate after
    for name in ("train", "evaluate"):
        stage(project, name)
    assert metrics(project) == before
    measured = torch.load(project / "outputs/checkpoints/last.pt", weights_only=True)
    assert measured["iteration"] == 0
    assert all(measured["model"][name].equal(w) for name, w in trained["model"].items())
    names = {path.name for path in (project / "outputs/checkpoints").iterdir()}
    assert names == {"last.pt", "model.safetensors"}
    run_id = json.loads((project / "outputs/run.json").read_text())["run_id"]
    assert parameters(project, run_id)["train.load_from"] == "pspnet.pth"
    assert points(project, run_id)["test/mean_iou", 0] == before["mean_iou"]
