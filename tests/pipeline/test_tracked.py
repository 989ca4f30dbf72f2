"""What MLflow shows of a training that was ended, taken up again, and measured."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.project import environment, make_project, metrics, query, reproduced

COUNTS = {"train": 10, "val": 3, "test": 3}


@contextmanager
def running(project: Path, *command: str) -> Iterator["subprocess.Popen[bytes]"]:
    """DVC at work, in a group of processes of its own, of which the block leaves none."""
    with (project / "dvc.log").open("wb") as log:
        process = subprocess.Popen(
            ["dvc", *command],
            cwd=project,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_points(project: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until MLflow holds the training's loss at this step, or a later one."""
    deadline = time.monotonic() + 300
    while last_step(project) < step:
        assert process.poll() is None, (project / "dvc.log").read_text()
        assert time.monotonic() < deadline, (project / "dvc.log").read_text()
        time.sleep(0.05)


def last_step(project: Path) -> int:
    with suppress(sqlite3.OperationalError):  # there may be no table yet
        return query(project, "SELECT max(step) FROM metrics WHERE key = 'train/loss'")[0][0] or 0
    return 0


def stage_of(process: "subprocess.Popen[bytes]") -> psutil.Process:
    """The process that DVC has started for the training, torchrun's where it has workers."""
    family = psutil.Process(process.pid).children(recursive=True)
    return next(p for p in family if "stages.train" in p.cmdline() and "-m" in p.cmdline())


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    """A finished training, measured on the split that it was validated on, in another way."""
    changes = {"evaluation.split": "val", "evaluation.flip": True, "evaluation.scales": [1.0, 1.5]}
    make_project(folder, COUNTS, **changes)
    reproduced(folder, "evaluate")
    return folder


def test_an_evaluation_of_val_keeps_its_scores_apart_from_the_training_s(project: Path) -> None:
    rows = query(project, "SELECT key, step, value FROM metrics")
    held = {(key, step): value for key, step, value in rows}
    assert held["val_final/mean_iou", 0] == metrics(project)["mean_iou"]
    assert held["val_final/mean_boundary_iou", 0] == metrics(project)["mean_boundary_iou"]
    with (project / "outputs/val.tsv").open() as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    trained = {int(row["iteration"]): float(row["mean_iou"]) for row in table}
    assert trained == {step: held["val/mean_iou", step] for step in (4, 8)}
    assert {step for key, step in held if key.startswith("val/")} == {4, 8}
    assert not [key for key, _ in held if key.startswith("test/")]
    assert {key for key, _ in held if key.count("/") > 1 and not key.startswith("train/")} == {
        f"val/iou/{name}" for name in ("background", "foot", "arch")
    }


def test_a_run_s_page_tells_the_result_and_how_to_have_it_again(project: Path) -> None:
    tags = dict(query(project, "SELECT key, value FROM tags"))
    told = tags["mlflow.note.content"]
    assert f"**val: mean IoU {metrics(project)['mean_iou']:.4f}, with other images" in told
    assert "on 3 val images of feet" in told
    assert f"    git checkout {tags['git.rev']}\n" in told
    (run_id,) = query(project, "SELECT run_uuid FROM runs")[0]
    artifacts = project / "mlartifacts" / run_id / "artifacts"
    assert (artifacts / "params.yaml").read_bytes() == (project / "params.yaml").read_bytes()
    assert (artifacts / "run.json").read_bytes() == (project / "outputs/run.json").read_bytes()
    table = json.loads((artifacts / "evaluation/classes.json").read_text())
    assert [row[0] for row in table["data"]] == ["background", "foot", "arch"]
    pictures = [path.name.split("+") for path in (artifacts / "images").glob("*.png")]
    shown = {(name, int(step)) for name, _, step, *_ in pictures}
    assert shown == {(f"val_foot 0{i}.png"[:-4], step) for i in range(3) for step in (4, 8)}


def test_an_ended_experiment_is_shown_as_killed_and_goes_on_as_another(tmp_path: Path) -> None:
    changes = {"train.iterations": 100000, "train.checkpoint.interval": 2}
    project = make_project(tmp_path, COUNTS, **changes)

    with running(project, "exp", "run", "-n", "first", "-S", "train.gpus=2") as process:
        wait_for_points(project, 4, process)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        process.wait(timeout=120)
    assert query(project, "SELECT name, status FROM runs") == [("pspnet (first)", "KILLED")]

    with running(project, "exp", "run", "-n", "second", "-S", "train.gpus=1") as process:
        wait_for_points(project, last_step(project) + 2, process)
        assert query(project, "SELECT name, status FROM runs") == [("pspnet (second)", "RUNNING")]
        stage = stage_of(process)
        stage.terminate()
        stage.wait(timeout=120)
        process.wait(timeout=120)
    assert query(project, "SELECT name, status FROM runs") == [("pspnet (second)", "KILLED")]
    tags = dict(query(project, "SELECT key, value FROM tags"))
    assert tags["dvc.exp_name"] == "second"
    times = "SELECT count(*) FROM metrics WHERE key = 'train/loss' GROUP BY step"
    assert set(query(project, times)) == {(1,)}
