"""A killed training goes on where it was, bit for bit, and its curves hold every point once."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline.disk import file_md5
from tests.project import NETWORKS, dvc, environment, make_project, query, set_params

ITERATIONS = 120
KILLS = 5
CHANGES = {
    "train.iterations": ITERATIONS,
    "train.checkpoint.interval": 4,
    "evaluation.interval": 30,
}

# What a training leaves, byte for byte.
FILES = (
    *(f"checkpoints/{name}" for name in ("last.pt", "best.pt", "model.safetensors")),
    "train.tsv",
    "val.tsv",
)


def start_dvc(project: Path, *command: str, **extra: str) -> "subprocess.Popen[bytes]":
    with (project / "repro.log").open("wb") as log:
        return subprocess.Popen(
            ["dvc", *(command or ("repro",))],
            cwd=project,
            env=environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(
    project: Path, iteration: int, process: "subprocess.Popen[bytes]", kills: int = 0
) -> None:
    deadline = time.monotonic() + 300
    while reached(project, kills) < iteration:
        assert process.poll() is None, "dvc ended too early"
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
    dvc(folder, "repro")
    return folder


def test_five_kills_change_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    project = make_project(tmp_path, {"train": 10, "val": 3, "test": 3}, **CHANGES)
    rng = random.Random(0)
    for kill in range(KILLS):
        low = 6 + kill * (ITERATIONS - 10) // KILLS
        target = rng.randint(low, low + 15)
        process = start_dvc(project)
        wait_for(project, target, process, kill)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    dvc(project, "repro")
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
    process = start_dvc(project, "exp", "run", "--temp")
    wait_for(project, 20, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    said = dvc(project, "exp", "run", "--temp", "-n", "again")
    assert int(re.search(r"continuing at iteration (\d+)", said)[1]) >= 16
    assert query(project, "SELECT status FROM runs") == [("FINISHED",)]
    assert curves(project) == curves(uninterrupted)
    dvc(project, "exp", "apply", "again")
    for name in FILES:
        whole = file_md5(uninterrupted / "outputs" / name)
        assert file_md5(project / "outputs" / name) == whole


@pytest.mark.parametrize("network", ["pointrend", "segformer", "eomt"])
def test_kills_change_nothing_for_other_networks(network: str, tmp_path: Path) -> None:
    shorter = {"train.iterations": 30, "evaluation.interval": 10}
    changes = CHANGES | NETWORKS[network] | shorter
    whole, killed = (
        make_project(tmp_path / name, {"train": 10, "val": 3, "test": 3}, **changes)
        for name in ("whole", "killed")
    )
    dvc(whole, "repro", "train")
    for kill, target in enumerate((7, 19)):
        process = start_dvc(killed, "repro", "train")
        wait_for(killed, target, process, kill)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    dvc(killed, "repro", "train")
    log = (killed / "outputs/train.log").read_text()
    assert len(re.findall(r"continuing at iteration \d+", log)) == 2
    for name in FILES:
        assert file_md5(killed / "outputs" / name) == file_md5(whole / "outputs" / name), name


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])  # DVC starts a stage by $SHELL
def test_killing_dvc_alone_leaves_no_process(tmp_path: Path, shell: str) -> None:
    changes = CHANGES | {"train.gpus": 2, "train.iterations": 100000}
    project = make_project(tmp_path, {"train": 10, "val": 3, "test": 3}, **changes)
    process = start_dvc(project, SHELL=shell)
    wait_for(project, 4, process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # the stage and its two workers
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    for survivor in alive:
        survivor.kill()
    assert not alive


def test_repro_with_force_trains_anew(uninterrupted: Path) -> None:
    before = file_md5(uninterrupted / "outputs/checkpoints/last.pt")
    set_params(uninterrupted, {"train.iterations": 4, "train.schedule.warmup_iters": 0})
    dvc(uninterrupted, "repro")
    dvc(uninterrupted, "repro", "--force", "train")
    log = uninterrupted / "outputs/train.log"
    assert "continuing" not in log.read_text()
    weights = file_md5(uninterrupted / "outputs/checkpoints/last.pt")
    assert weights != before
    # Without the evaluation the finished state is still there: as after a kill before DVC's commit.
    dvc(uninterrupted, "repro", "--force", "train")
    assert "continuing at iteration 4" in log.read_text()
    assert file_md5(uninterrupted / "outputs/checkpoints/last.pt") == weights
