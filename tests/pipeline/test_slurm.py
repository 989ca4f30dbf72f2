"""A training as a job of a real Slurm cluster of two nodes."""

import re
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pipeline.disk import file_md5
from tests.faults.stage import end_of, said, started, state_of, wait_for
from tests.project import (
    NETWORKS,
    commit,
    dvc,
    ended,
    make_project,
    metrics,
    query,
    set_params,
    stage,
    untrained,
    wait_for_queue,
)
from tests.slurm import Cluster

EQUAL = ("checkpoints/best.pt", "checkpoints/last.pt", "val.tsv")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as made:
        yield made


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data is prepared, and which one process has trained."""
    changes = NETWORKS["eomt"] | {"train.precision": "fp64", "train.iterations": 30}
    counts = {"train": 8, "val": 2, "test": 2}
    project = make_project(tmp_path_factory.mktemp("one"), counts, **changes)
    stage(project, "prepare")
    stage(project, "train")
    return project


def clone(prepared: Path, folder: Path, **changes: object) -> Path:
    """The project without what it has trained, whose trainings are jobs."""
    return untrained(prepared, folder, **{"launcher.name": "slurm"} | changes)


@pytest.fixture(scope="module")
def trained(
    prepared: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """What two nodes have trained, and what the stage has said."""
    project = clone(prepared, tmp_path_factory.mktemp("two") / "clone", **{"launcher.nodes": 2})
    code, text = ended(project, "train", **cluster.environment)
    assert code == 0, text
    return project, text


def md5s(project: Path) -> list[str]:
    return [file_md5(project / "outputs" / name) for name in EQUAL]


def job_of(project: Path) -> str:
    """The number of the last job that the stage has submitted."""
    return re.findall(r"job (\d+) is submitted", said(project))[-1]


def test_a_job_of_two_nodes_trains_as_one_process_does(
    prepared: Path, trained: tuple[Path, str]
) -> None:
    project, text = trained
    assert "runs on n[1-2]" in text
    assert "iteration 30 " in text
    one, two = (
        torch.load(path / "outputs/checkpoints/last.pt", weights_only=True)["model"]
        for path in (prepared, project)
    )
    for name, weight in two.items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-9)


def test_four_experiments_are_jobs_two_at_a_time(
    prepared: Path, cluster: Cluster, tmp_path: Path
) -> None:
    """By DVC's queue."""
    quick = {"train.iterations": 2, "train.validate": False}
    project = clone(prepared, tmp_path / "clone", **quick)
    commit(project, "Jobs")
    for seed in range(4):
        dvc(project, "exp", "run", "--queue", "-S", f"train.seed={seed}", "train")
    dvc(project, "queue", "start", "-j", "2", **cluster.environment)
    wait_for_queue(project, 4)
    jobs = [job for job in cluster.jobs() if job["WorkDir"].startswith(str(project))]
    assert [(job["JobName"], job["JobState"]) for job in jobs] == [
        ("instep-train", "COMPLETED")
    ] * 4
    times = sorted((job["StartTime"], job["EndTime"]) for job in jobs)
    assert any(later < end for (_, end), (later, _) in pairwise(times))
    assert len(query(project, "SELECT DISTINCT value FROM params WHERE key = 'train.seed'")) == 4


def test_prepare_and_evaluate_may_be_jobs(trained: tuple[Path, str], cluster: Cluster) -> None:
    """The one of two nodes, and both of another partition."""
    project, _ = trained
    before = {path.name: file_md5(path) for path in (project / "data/prepared").iterdir()}
    jobs = {"launcher.prepare": {"partition": "cpu", "nodes": 2}}
    set_params(project, jobs | {"launcher.evaluate": {"partition": "cpu"}})
    for name in ("prepare", "evaluate"):
        code, text = ended(project, name, **cluster.environment)
        assert code == 0, text
        job = cluster.job(re.findall(r"job (\d+) is submitted", text)[-1])
        assert (job["JobName"], job["Partition"]) == (f"instep-{name}", "cpu")
        assert job["NumNodes"] == {"prepare": "2", "evaluate": "1"}[name]
    assert {path.name: file_md5(path) for path in (project / "data/prepared").iterdir()} == before
    assert "mean_iou" in metrics(project)


def test_ctrl_c_cancels_the_job_which_saves_its_state(
    prepared: Path, cluster: Cluster, tmp_path: Path
) -> None:
    project = clone(prepared, tmp_path / "clone", **{"train.iterations": 10000})
    with started(project, **cluster.environment) as process:
        wait_for(project, process, "iteration 3 ")
        process.send_signal(signal.SIGINT)
        assert end_of(process) == 75
    assert cluster.job(job_of(project))["JobState"] == "CANCELLED"
    (iteration,) = re.findall(r"ended by SIGTERM after iteration (\d+), whose state", said(project))
    assert state_of(project)["checkpoint"]["iteration"] == int(iteration)


def test_a_job_that_its_time_limit_ends_is_followed_by_another(
    prepared: Path, trained: tuple[Path, str], cluster: Cluster, tmp_path: Path
) -> None:
    project = clone(prepared, tmp_path / "clone", **{"launcher.nodes": 2})
    with started(project, **cluster.environment) as process:
        wait_for(project, process, "iteration 3 ")
        first = job_of(project)
        cluster.run("scancel", "--signal=USR1", first)  # what it gets before its limit
        assert end_of(process) == 0, said(project)
    assert "came to its time limit; another one goes on" in said(project)
    assert job_of(project) != first
    assert md5s(project) == md5s(trained[0])


def test_a_job_outlives_its_node(
    prepared: Path, trained: tuple[Path, str], cluster: Cluster, tmp_path: Path
) -> None:
    project = clone(prepared, tmp_path / "clone", **{"launcher.nodes": 2})
    with started(project, **cluster.environment) as process:
        wait_for(project, process, "iteration 5 ")
        cluster.kill_node("n2")
        wait_for(project, process, "was taken from its nodes")
        cluster.start_node("n2")
        assert end_of(process) == 0, said(project)
    assert md5s(project) == md5s(trained[0])


def test_a_job_without_enough_memory_says_so(
    prepared: Path, cluster: Cluster, tmp_path: Path
) -> None:
    project = clone(prepared, tmp_path / "clone", **{"launcher.options": ["--mem=300"]})
    code, text = ended(project, "train", **cluster.environment)
    assert code == 1
    assert "ran out of memory; ask for more" in text.splitlines()[-1]


def test_what_slurm_refuses_is_said_in_a_line(
    prepared: Path, cluster: Cluster, tmp_path: Path
) -> None:
    project = clone(prepared, tmp_path / "clone", **{"launcher.partition": "none"})
    code, text = ended(project, "train", **cluster.environment)
    assert code == 1
    assert text.splitlines()[-1].startswith("error: sbatch refuses: ")
