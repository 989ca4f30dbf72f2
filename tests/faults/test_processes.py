"""Rows 6 and 7: a rank is killed, or hangs; the others end in time, and it is named."""

import re
import signal
from pathlib import Path

import psutil
import pytest

from pipeline.monitor import Seen, blocking
from tests.faults.stage import end_of, family, said, started, state_of, wait_for
from tests.project import make_project, query, set_params, stage

CHANGES = {
    "train.timeout": 10,
    "train.iterations": 10000,
    "train.checkpoint.interval": 2,
    "evaluation.interval": 10000,
}
TWO_RANKS = {"train.gpus": 2, "train.workers": 0}


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    made = make_project(folder / "project", {"train": 10, "val": 3, "test": 3}, **CHANGES)
    stage(made, "prepare")
    return made


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_all_end(project: Path) -> None:
    killed, text = trained_until(project, 0, signal.SIGKILL)
    assert f"rank 0 (process {killed}) was ended by SIGKILL" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert state_of(project)["checkpoint"]["iteration"] >= 2


@pytest.mark.slow
def test_a_loader_s_worker_that_is_killed_is_told_in_a_line(project: Path) -> None:
    set_params(project, {"train.gpus": 1, "train.workers": 1})
    with started(project) as process:
        wait_for(project, process, r"iteration \d*[4-9] ")
        (worker,) = family(process)
        worker.kill()
        assert end_of(process) == 1
    *_, last = said(project).splitlines()
    assert last.startswith("error: a process that loads batches has ended"), said(project)
    assert "set train.workers to less" in last
    assert "Traceback" not in said(project)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_and_all_end(project: Path) -> None:
    stopped, text = trained_until(project, 1, signal.SIGSTOP)
    named = re.search(rf"rank 1 \(process {stopped} on \S+\) has not got on for (\d+)", text)
    assert int(named[1]) >= 10
    assert "train.timeout allows 10 s" in text
    assert query(project, "SELECT status FROM runs") == [("KILLED",)]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_what_it_does(project: Path) -> None:
    set_params(project, TWO_RANKS)
    with started(project, "tests.faults.worker", "hang", FAULT_RANK="1") as process:
        assert end_of(process) == 1
    assert re.search(r"rank 1 .* has not got on for \d+ s, at: iteration \d+; ", said(project))


def trained_until(project: Path, rank: int, number: int) -> tuple[int, str]:
    """Train until a rank gets a signal; its process, and what the stage has said to its end."""
    set_params(project, TWO_RANKS)
    with started(project) as process:
        wait_for(project, process, r"iteration \d*[4-9] ")
        struck = ranks_of(process)[rank]
        struck.send_signal(number)
        assert end_of(process) == 1
    return struck.pid, said(project)


def ranks_of(process) -> list[psutil.Process]:
    """The processes that train, by their ranks."""
    below = [one for one in family(process) if "RANK" in one.environ()]
    return sorted(below, key=lambda one: int(one.environ()["RANK"]))


def seen(phase: int, quiet: float, silent: float = 0.0, done: bool = False) -> Seen:
    return Seen(phase, quiet=quiet, silent=silent, done=done)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([seen(7, 1), seen(7, 1)], []),
        ([seen(7, 9), seen(7, 21, silent=21)], [1]),  # it says nothing
        ([seen(8, 21), seen(7, 25)], [1]),  # where the other has been
        ([seen(8, 21), seen(7, 19)], []),  # it gets on, and may take long
        ([seen(8, 99), seen(7, 25), seen(7, 21)], [1, 2]),
        ([seen(8, 99), seen(7, 25), seen(7, 3)], []),
        ([seen(8, 21), seen(8, 25)], [0, 1]),  # each waits for the other
        ([seen(8, 99), seen(7, 99, done=True)], []),  # nobody waits for one who has done
        ([seen(8, 99), seen(7, 99, silent=99, done=True)], []),
        ([seen(8, -99), seen(9, 99)], []),  # a first step may take longer
    ],
)
def test_who_holds_up_the_others(given: list[Seen], expected: list[int]) -> None:
    assert blocking(given, 20) == expected
