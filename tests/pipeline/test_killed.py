"""A killed training goes on where it was, bit for bit, and its curves hold every point once."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.disk import file_md5
from tests.faults.stage import started
from tests.forked import Forked
from tests.project import (
    NETWORKS,
    REPOSITORY,
    SMALL,
    dvc,
    environment,
    make_project,
    query,
    set_params,
    stage,
)

ITERATIONS = 60
KILLS = 2
CHANGES = {
    "train.iterations": ITERATIONS,
    "train.checkpoint.interval": 4,
    "evaluation.interval": 15,
}

# What a training leaves, byte for byte.
FILES = (
    *(f"checkpoints/{name}" for name in ("last.pt", "best.pt", "model.safetensors")),
    "train.tsv",
    "val.tsv",
)


def start(project: Path, *command: str, **extra: str) -> "subprocess.Popen[bytes]":
    with (project / "killed.log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=project,
            env=environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(
    project: Path,
    iteration: int,
    process: "subprocess.Popen[bytes] | Forked",
    kills: int = 0,
) -> None:
    deadline = time.monotonic() + 300
    while reached(project, kills) < iteration:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.005)


def reached(project: Path, kills: int) -> int:
    """The last iteration that the running training has logged, the one after so many kills."""
    logs = (project / ".dvc/tmp/instep").glob("*/train.log")
    text = "".join(log.read_text() for log in logs)
    if text.count("continuing at") < kills:
        return 0
    text = text.rsplit("continuing at", 1)[-1]
    return max((int(found) for found in re.findall(r"iteration (\d+)  ", text)), default=0)


def curves(project: Path) -> dict[tuple[str, int], float]:
    """All points in MLflow but timings and the machine's load; a point must be there once."""
    rows = query(project, "SELECT key, step, value FROM metrics")
    rows = [row for row in rows if not row[0].startswith(("time/", "system/"))]
    points = {(key, step): value for key, step, value in rows}
    assert len(points) == len(rows)
    return points


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    make_project(folder, {"train": 10, "val": 3, "test": 3}, **CHANGES)
    for name in ("prepare", "train", "evaluate"):
        stage(folder, name)
    return folder


def test_kills_at_random_moments_change_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path, {"train": 10, "val": 3, "test": 3}, **CHANGES)
    rng = random.Random(0)
    for kill in range(KILLS):
        low = 6 + kill * (ITERATIONS - 10) // KILLS
        target = rng.randint(low, low + 5)
        process = start(project, "dvc", "repro", "train")
        wait_for(project, target, process, kill)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    dvc(project, "repro", "train")
    stage(project, "evaluate")
    log = (project / "outputs/train.log").read_text()
    continued = [int(found) for found in re.findall(r"continuing at iteration (\d+)", log)]
    assert len(continued) == KILLS
    assert all(iteration > 0 for iteration in continued)
    assert continued == sorted(set(continued))

    for name in FILES:
        whole = file_md5(uninterrupted / "outputs" / name)
        assert file_md5(project / "outputs" / name) == whole, name
    assert query(project, "SELECT status FROM runs") == [("FINISHED",)]
    assert curves(project) == curves(uninterrupted)
    assert len(curves(project)) > 2 * ITERATIONS
    (state,) = (project / ".dvc/tmp/instep").iterdir()
    assert (state / "finished").is_file()  # the next training of the same begins anew


def test_a_killed_experiment_goes_on_in_another_workspace(
    uninterrupted: Path, tmp_path: Path
) -> None:
    project = make_project(tmp_path, {"train": 10, "val": 3, "test": 3}, **CHANGES)
    process = start(project, "dvc", "exp", "run", "--temp")
    wait_for(project, 20, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    said = dvc(project, "exp", "run", "--temp", "-n", "again")
    assert int(re.search(r"continuing at iteration (\d+)", said)[1]) >= 15
    assert query(project, "SELECT status FROM runs") == [("FINISHED",)]
    assert curves(project) == curves(uninterrupted)
    dvc(project, "exp", "apply", "again")
    for name in FILES:
        whole = file_md5(uninterrupted / "outputs" / name)
        assert file_md5(project / "outputs" / name) == whole


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project for trainings that none is compared with but their own repetition."""
    folder = tmp_path_factory.mktemp("prepared")
    make_project(folder, {"train": 10, "val": 3, "test": 3}, **CHANGES)
    stage(folder, "prepare")
    yield folder
    shutil.rmtree(folder)


def begin(project: Path, **changes: object) -> None:
    """The parameters of a training, and nothing left of the one before."""
    shutil.copy(REPOSITORY / "params.yaml", project)
    set_params(project, SMALL | CHANGES | changes)
    for left in (".dvc/tmp/instep", "outputs"):
        shutil.rmtree(project / left, ignore_errors=True)


@pytest.mark.parametrize("network", ["pointrend", "segformer", "eomt"])
def test_a_kill_changes_nothing_for_other_networks(network: str, prepared: Path) -> None:
    begin(prepared, **NETWORKS[network], **{"train.iterations": 12, "evaluation.interval": 6})
    with started(prepared) as process:
        wait_for(prepared, 8, process)
        process.kill()
        process.wait()
    found = []
    for killed in (True, False):
        stage(prepared, "train")
        log = (prepared / "outputs/train.log").read_text()
        assert killed == bool(re.search(r"continuing at iteration \d+", log))
        found.append([file_md5(prepared / "outputs" / name) for name in FILES])
        for left in (".dvc/tmp/instep", "outputs"):
            shutil.rmtree(prepared / left)
    assert found[0] == found[1]


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])  # DVC starts a stage by $SHELL
def test_killing_dvc_alone_leaves_no_process(prepared: Path, shell: str) -> None:
    begin(prepared, **{"train.gpus": 2, "train.iterations": 100000})
    process = start(prepared, "dvc", "repro", SHELL=shell)
    wait_for(prepared, 4, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # the stage and its two workers
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=120)
    for survivor in alive:
        survivor.kill()
    assert not alive


def test_repro_with_force_trains_anew(uninterrupted: Path) -> None:
    before = file_md5(uninterrupted / "outputs/checkpoints/last.pt")
    set_params(uninterrupted, {"train.iterations": 4, "train.schedule.warmup_iters": 0})
    dvc(uninterrupted, "repro", "train")
    stage(uninterrupted, "evaluate")
    dvc(uninterrupted, "repro", "--force", "--single-item", "train")
    log = uninterrupted / "outputs/train.log"
    assert "continuing" not in log.read_text()
    weights = file_md5(uninterrupted / "outputs/checkpoints/last.pt")
    assert weights != before
    # Without the evaluation the finished state is still there: as after a kill before DVC's commit.
    dvc(uninterrupted, "repro", "--force", "--single-item", "train")
    assert "continuing at iteration 4" in log.read_text()
    assert file_md5(uninterrupted / "outputs/checkpoints/last.pt") == weights
