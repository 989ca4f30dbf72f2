"""Row 5: SIGTERM, Ctrl-C or a scheduler's warning: the step is finished, the state is written."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.data import audit
from pipeline.disk import file_md5
from pipeline.errors import Interrupted
from pipeline.interruption import (
    SIGNALS,
    finishing,
    holding_signals,
    raise_by_signals,
    unheard_by_children,
)
from tests.distributed.ranks import ranks_of
from tests.faults.stage import ENDED, end_of, said, started, state_of, wait_for
from tests.pipeline.test_killed import FILES, curves
from tests.project import REPOSITORY, environment, make_project, query, stage
from tests.unit.pairs import data_params, labels, photo, write

pytestmark = pytest.mark.slow

ITERATIONS = 60
CHANGES = {
    "train.iterations": ITERATIONS,
    "train.checkpoint.interval": 1000,  # so that nothing else saves the state
    "evaluation.interval": 20,
}


def a_project(folder: Path, **changes: object) -> Path:
    project = make_project(folder, {"train": 10, "val": 3, "test": 3}, **CHANGES | changes)
    stage(project, "prepare")
    return project


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    project = a_project(folder / "whole")
    stage(project, "train")
    return project


def signalled(project: Path, number: int, after: int, **extra: str) -> tuple[int, str]:
    """Train until an iteration, then signal the stage; its exit code and what it has said."""
    with started(project, **extra) as process:
        wait_for(project, process, rf"iteration {after} ")
        process.send_signal(number)
        return end_of(process, 30), said(project)


def test_the_state_is_that_of_the_very_step_and_the_result_the_same(
    uninterrupted: Path, tmp_path: Path
) -> None:
    project = a_project(tmp_path)
    rng = random.Random(0)
    for number, after in zip(("SIGTERM", "SIGINT", "SIGUSR1"), (3, 23, 43), strict=True):
        code, text = signalled(project, signal.Signals[number], after + rng.randint(0, 9))
        assert code == 75
        name, iteration = ENDED.search(text).groups()
        assert name == number
        assert text.rstrip().splitlines()[-1].startswith("ended by")
        assert "Traceback" not in text
        assert state_of(project)["checkpoint"]["iteration"] == int(iteration)
        assert query(project, "SELECT status FROM runs") == [("KILLED",)]
    log = stage(project, "train")
    assert f"continuing at iteration {iteration}" in log
    for name in FILES:
        assert file_md5(project / "outputs" / name) == file_md5(uninterrupted / "outputs" / name)
    assert query(project, "SELECT status FROM runs") == [("FINISHED",)]
    assert curves(project) == curves(uninterrupted)


def test_two_ranks_end_after_the_same_step_whichever_is_told(tmp_path: Path) -> None:
    shorter = {"train.gpus": 2, "train.iterations": 24}
    whole = a_project(tmp_path / "whole", **shorter)
    assert ranks_of(whole, 2, "stages.train") == [0, 0]
    project = a_project(tmp_path / "ended", **shorter)
    assert signalled(project, signal.SIGINT, 4)[0] == 75  # torchrun hands it on
    with started(project) as process:
        wait_for(project, process, "iteration 14 ")
        ranks = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
        os.kill(int(ranks[-1]), signal.SIGTERM)
        assert end_of(process, 60) == 75
    assert ENDED.search(said(project))
    assert ranks_of(project, 2, "stages.train") == [0, 0]
    for name in FILES:
        assert file_md5(project / "outputs" / name) == file_md5(whole / "outputs" / name), name


def test_a_validation_that_is_cut_off_is_caught_up_with(
    uninterrupted: Path, tmp_path: Path
) -> None:
    project = a_project(tmp_path)
    signals = "tests.faults.worker", "interrupted_validation"
    with started(project, *signals) as process:
        assert end_of(process) == 75
    assert ENDED.search(said(project)).group(2) == "20"
    assert state_of(project)["unmeasured"]
    stage(project, "train")
    for name in FILES:
        assert file_md5(project / "outputs" / name) == file_md5(uninterrupted / "outputs" / name)
    assert curves(project) == curves(uninterrupted)


def test_a_second_ctrl_c_ends_a_step_that_hangs(tmp_path: Path) -> None:
    project = a_project(tmp_path)
    with started(project, "tests.faults.worker", "hang") as process:
        wait_for(project, process, "hangs")
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert end_of(process, 10) == 130


def test_a_step_that_hangs_ends_after_a_while(tmp_path: Path) -> None:
    project = a_project(tmp_path)
    with started(project, "tests.faults.worker", "hang", FAULT_PATIENCE="1") as process:
        wait_for(project, process, "hangs")
        process.send_signal(signal.SIGTERM)
        assert end_of(process, 60) == 75
    assert "goes on from the last checkpoint" in said(project).splitlines()[-1]
    assert query(project, "SELECT status FROM runs") == [("KILLED",)]


def test_a_signal_after_the_ranks_have_done_their_work_is_told_of(tmp_path: Path) -> None:
    project = a_project(tmp_path, **{"train.gpus": 2, "train.iterations": 2})
    with started(project, "tests.faults.worker", "slow_end") as process:
        wait_for(project, process, r"calibrated on [^\n]*\nends")
        process.send_signal(signal.SIGTERM)
        assert end_of(process, 60) == 75
    last = said(project).splitlines()[-1]
    assert last == "ended by SIGTERM; the same command does what is left"


def stuck(*_: object) -> None:
    time.sleep(600)


def test_prepare_waits_for_no_shard_that_is_being_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "train/0", photo(0), labels())
    monkeypatch.setattr(audit, "_pack", stuck)
    raise_by_signals()
    threading.Timer(3, os.kill, [os.getpid(), signal.SIGTERM]).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        audit.prepare(data_params(tmp_path), tmp_path / "prepared", lambda done, total: None)
    assert time.monotonic() - began < 60
    packing = [one for one in multiprocessing.active_children() if "Spawn" in one.name]
    for one in packing:
        one.join(10)
    assert not any(one.is_alive() for one in packing)


@pytest.mark.parametrize("name", ["prepare", "evaluate"])
def test_other_stages_end_at_once_in_a_line(name: str, uninterrupted: Path) -> None:
    number = {"prepare": signal.SIGTERM, "evaluate": signal.SIGINT}[name]
    with subprocess.Popen(
        [sys.executable, "-m", f"stages.{name}"],
        cwd=uninterrupted,
        env=environment(),
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while not ends_by_signals(process.pid):
            time.sleep(0.001)
        process.send_signal(number)
        text, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    (line,) = text.splitlines()
    assert line == f"ended by {signal.Signals(number).name}; the same command does what is left"


def ends_by_signals(pid: int) -> bool:
    """Whether a process handles the last of the signals that a stage handles."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[1], 16) >> (SIGNALS[-1] - 1) & 1)


def test_a_process_that_is_started_so_gets_no_signal() -> None:
    """As those are that load batches: torchrun signals the whole group."""
    with unheard_by_children():
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for number in SIGNALS:
        process.send_signal(number)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0


def test_a_signal_that_comes_while_signals_are_held_comes_after_that() -> None:
    done = []

    def work() -> None:
        with holding_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("all")

    raise_by_signals()
    with pytest.raises(Interrupted):
        work()
    assert done == ["all"]


def test_a_signal_that_comes_too_late_to_end_anything_is_told_of() -> None:
    def work() -> None:
        with finishing(print) as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            while interruption.asked is None:
                time.sleep(0.01)

    with pytest.raises(Interrupted, match="ended by SIGTERM; "):
        work()


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise InputError('no')", 1)])
def test_a_signal_after_the_end_changes_nothing(end: str, code: int, tmp_path: Path) -> None:
    program = (
        "import atexit, os, signal\n"
        "from pipeline.errors import InputError\n"
        "from stages import run_main\n"
        f"def main():\n    {end}\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "run_main(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stderr == ("error: no\n" if code else "")
