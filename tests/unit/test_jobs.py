"""How jobs of Slurm are followed, whatever becomes of them: its commands are scripts here.

tests/pipeline/test_slurm.py has a real cluster, which does not do all of this.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import InputError, Interrupted
from pipeline.interruption import raise_by_signals
from pipeline.launchers import Slurm, slurm
from pipeline.launchers.slurm import Job, run_as_job

SBATCH = """#!/bin/sh
printf '%s\\n' "$@" > asked
number=$(($(cat number 2>/dev/null || echo 6) + 1))
echo $number | tee number
"""
# Each question is answered by the next line; of the last there is no end. A line that begins with
# ! is done first, as a job would do it.
SCONTROL = """#!/bin/sh
while line=$(head -n 1 answers); do
    test "$(wc -l < answers)" -le 1 || sed -i 1d answers
    case $line in !*) eval "${line#!}" ;; *) break ;; esac
done
test "$line" != silent || { echo 'Unable to contact slurm controller' >&2; exit 1; }
echo "$line"
"""
SCANCEL = """#!/bin/sh
echo $1 > cancelled
echo its state is saved >> .dvc/tmp/instep-jobs/$1.log
echo 'JobState=CANCELLED ExitCode=0:15' > answers
"""

Answers = Callable[..., None]


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Slurm's commands in the current folder; the function sets what they say of a job."""
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(slurm, "POLL", 0.01)

    def set_answers(*lines: str) -> None:
        (tmp_path / "answers").write_text("".join(f"{line}\n" for line in lines))

    return set_answers


def says(text: str, number: int = 7) -> str:
    """A job's line, as an answer."""
    return f"!echo '{text}' >> .dvc/tmp/instep-jobs/{number}.log"


DONE = "JobState=COMPLETED ExitCode=0:0"


def test_sbatch_is_asked_for_what_params_yaml_says(answers: Answers) -> None:
    answers(DONE)
    job = Slurm(
        name="slurm",
        nodes=2,
        partition="gpu",
        time=90,
        gres="gpu:8",
        options=("--cpus-per-task=64",),
    )
    run_as_job("stages.train", ["--until", "3"], job)
    asked = Path("asked").read_text().splitlines()
    assert asked[asked.index("--nodes=2") :][:5] == [
        "--nodes=2",
        "--partition=gpu",
        "--time=90",
        "--gres=gpu:8",
        "--cpus-per-task=64",
    ]
    assert "--job-name=instep-train" in asked
    assert asked[-1].startswith("srun ")
    assert asked[-1].endswith(" -u -m stages.train --until 3")


def test_what_a_job_says_and_what_becomes_of_it_is_shown(
    answers: Answers, capfd: pytest.CaptureFixture[str]
) -> None:
    answers(
        "JobState=PENDING Reason=Resources Restarts=0",
        "silent",
        "JobState=PENDING Reason=Resources Restarts=0",
        says("iteration 1"),
        "JobState=RUNNING NodeList=n[1-2]",
        "JobState=PENDING Reason=BeginTime Restarts=1",
        says("iteration 2"),
        "JobState=COMPLETING ExitCode=0:0",
        DONE,
    )
    run_as_job("stages.train", (), Job())
    assert capfd.readouterr().out.splitlines() == [
        "job 7 is submitted",
        "job 7 waits (Resources)",
        "job 7 runs on n[1-2]",
        "iteration 1",
        "job 7 was taken from its nodes, and waits for others (BeginTime)",
        "iteration 2",
    ]
    assert not list(Path(".dvc/tmp/instep-jobs").iterdir())


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ("TIMEOUT ExitCode=0:15", "came to its time limit"),
        ("FAILED ExitCode=75:0", "came to its time limit"),
        ("PREEMPTED ExitCode=0:15", "had to make way"),
        ("NODE_FAIL ExitCode=0:0", "lost a node"),
    ],
)
def test_a_job_that_was_cut_short_is_followed_by_another(
    state: str, why: str, answers: Answers, capfd: pytest.CaptureFixture[str]
) -> None:
    answers(f"JobState={state}", DONE)
    saved: Iterator[int] = iter((0, 1, 2))
    run_as_job("stages.train", (), Job(), moved=lambda: next(saved))
    assert f"job 7 {why}; another one goes on\njob 8 is sub" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("state", "said", "why"),
    [
        ("OUT_OF_MEMORY ExitCode=0:125", "", "ran out of memory; ask for more: launcher.options"),
        ("FAILED ExitCode=137:0", "exceeded memory limit", "ran out of memory; ask for more"),
        ("TIMEOUT ExitCode=0:15", "", "came to its time limit (1:00) before it could save anyth"),
        ("NODE_FAIL ExitCode=0:0", "", "lost a node; the same command does what is left"),
        ("CANCELLED ExitCode=0:15", "", "ended as CANCELLED; the same command does what is left"),
        ("FAILED ExitCode=1:0", "error: no", "failed with exit code 1; "),
        ("FAILED ExitCode=0:9", "", "failed with exit code 137; "),
    ],
)
def test_why_a_job_has_failed_is_said(state: str, said: str, why: str, answers: Answers) -> None:
    answers(says(said), f"JobState={state}")
    with pytest.raises(SystemExit) as ended:
        run_as_job("stages.train", (), Job(time="1:00"))
    assert str(ended.value).startswith(f"error: job 7 {why}")


def test_a_signal_cancels_the_job_and_shows_its_last_words(
    answers: Answers, capfd: pytest.CaptureFixture[str]
) -> None:
    raise_by_signals()
    running = "JobState=RUNNING NodeList=n1"
    answers(running, f"!kill -USR1 {os.getpid()}", running)
    with pytest.raises(Interrupted, match="ended by SIGUSR1"):
        run_as_job("stages.train", (), Job())
    assert Path("cancelled").read_text() == "7\n"
    said = capfd.readouterr().out
    assert said.endswith("job 7 is being cancelled\nits state is saved\n")


def test_a_signal_while_a_job_is_submitted_leaves_none_behind(answers: Answers) -> None:
    raise_by_signals()
    Path("sbatch").write_text(f"#!/bin/sh\nkill -TERM {os.getpid()}; sleep 0.2; echo 7\n")
    answers("JobState=PENDING Reason=Resources Restarts=0")
    with pytest.raises(Interrupted):
        run_as_job("stages.train", (), Job())
    assert Path("cancelled").read_text() == "7\n"


def test_a_machine_without_slurm_is_told_so(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/none")
    with pytest.raises(InputError, match="this machine has no sbatch; log in to one of the"):
        run_as_job("stages.train", (), Job())
