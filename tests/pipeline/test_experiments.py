"""DVC's other ways of running: exp run, --temp and the queue, all into one MLflow store."""

import csv
import io
import json
import time
from pathlib import Path

import pytest

from tests.project import dvc, make_project, query


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    return make_project(folder, {"train": 10, "val": 3, "test": 3})


def tags(project: Path, key: str) -> list[str]:
    return [row[0] for row in query(project, f"SELECT value FROM tags WHERE key = '{key}'")]


def shown(project: Path) -> list[dict[str, str]]:
    table = csv.DictReader(io.StringIO(dvc(project, "exp", "show", "--csv")))
    return [row for row in table if row["Experiment"]]


def wait_for_queue(project: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while (said := dvc(project, "queue", "status")).count("Success") < count:
        assert "Failed" not in said, said
        assert time.monotonic() < deadline, said
        time.sleep(2)


def test_every_way_of_running_is_one_run_in_one_store(project: Path) -> None:
    dvc(project, "exp", "run", "-n", "two-processes", "-S", "train.gpus=2")
    assert tags(project, "world_size") == ["2"]

    one = ("-S", "train.gpus=1")
    dvc(project, "exp", "run", "--queue", "-n", "queued", "-S", "train.lr=0.005", *one)
    dvc(project, "queue", "start")
    dvc(project, "exp", "run", "--temp", "-n", "temporary", "-S", "train.lr=0.003", *one)
    wait_for_queue(project, 1)
    names = {"two-processes", "queued", "temporary"}
    assert set(tags(project, "dvc.exp_name")) == names
    assert len(tags(project, "world_size")) == len(names)

    said = dvc(project, "exp", "run", "-n", "cached", "-S", "train.lr=0.005", *one)
    assert "Running stage" not in said
    assert len(tags(project, "world_size")) == len(names)
    assert query(project, "SELECT DISTINCT status FROM runs") == [("FINISHED",)]
    stores = list(project.rglob("mlflow.db"))
    assert stores == [project / "mlflow.db"]
    for run_id, uri in query(project, "SELECT run_uuid, artifact_uri FROM runs"):
        assert uri == (project / "mlartifacts" / run_id / "artifacts").as_uri()
        assert (
            project / "mlartifacts" / run_id / "artifacts/checkpoints/model.safetensors"
        ).is_file()
    assert json.loads((project / "outputs/run.json").read_text())["run_id"]

    rows = {row["Experiment"]: row for row in shown(project)}
    assert names | {"cached"} <= rows.keys()
    assert all(float(rows[name]["mean_iou"]) >= 0 for name in names)
    assert rows["temporary"]["train.lr"] == "0.003"
    assert rows["cached"]["mean_iou"] == rows["queued"]["mean_iou"]


def test_results_can_be_compared(project: Path) -> None:
    said = dvc(project, "metrics", "diff", "--all", "queued", "temporary")
    assert "mean_iou" in said
    page = dvc(project, "plots", "diff", "queued", "temporary").strip()
    text = Path(page.removeprefix("file://")).read_text()
    for title in ("Training loss", "Mean IoU on val", "IoU of each class", "pixels of each class"):
        assert title in text
