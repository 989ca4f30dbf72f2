"""Runs a stage as a job of Slurm, and ends as the job ends.

Source: https://slurm.schedmd.com/sbatch.html
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from pipeline.errors import INTERRUPTED, InputError
from pipeline.interruption import holding_signals
from pipeline.launchers.torchrun import Meeting
from pipeline.params import Few, Section, main_checkout

POLL = 2.0  # seconds between two questions to Slurm
SILENCE = 600.0  # seconds for which Slurm may be unable to answer
ENDING = 90.0  # seconds that a cancelled job may take for its last state
WARNING = 60  # seconds before the time limit at which a job is told
IN_JOB = "INSTEP_JOB"  # in the environment of what runs in a job of ours

UNENDED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}
UNENDED |= {"REQUEUE_HOLD", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
NO_MEMORY = ("oom-kill", "oom_kill", "exceeded memory limit", "Exceeded job memory limit")
CUT_SHORT = {
    "TIMEOUT": "came to its time limit",
    "PREEMPTED": "had to make way",
    "NODE_FAIL": "lost a node",
}

# --ntasks-per-node is one: torchrun starts the processes of a node. srun does not know by itself
# how many cores sbatch was asked for: https://slurm.schedmd.com/srun.html#OPT_cpus-per-task
STEP = "srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} "

FIRST_PORT, PORTS = 20_000, 10_000  # where nodes meet, by the job's number

Text = Annotated[str, Field(min_length=1)]


class Job(Section):
    """What Slurm is asked for, in the words of sbatch; `options` are more of its own."""

    partition: Text | None = None
    account: Text | None = None
    time: Text | Annotated[int, Field(ge=1)] | None = None
    gres: Text | None = None
    options: tuple[Text, ...] = ()

    @property
    def machines(self) -> int:
        """How many nodes."""
        return 1

    def asked(self) -> list[str]:
        """The options of sbatch."""
        named = {name: getattr(self, name) for name in ("partition", "account", "time", "gres")}
        set_ = [f"--{name}={value}" for name, value in named.items() if value]
        return [f"--nodes={self.machines}", *set_, *self.options]


class JobOfNodes(Job):
    """A job that may have several nodes."""

    nodes: Few = 1

    @property
    def machines(self) -> int:
        """How many nodes."""
        return self.nodes


class Ended(NamedTuple):
    """How a job has ended: its state, its exit code or the signal, and all that it has said."""

    number: str
    state: str
    code: int
    said: str
    log: Path


def in_job() -> bool:
    """Whether this process runs in a job of ours."""
    return IN_JOB in os.environ


def meeting() -> Meeting:
    """Where the nodes of this job meet: at the first of them."""
    nodes = _ask(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()
    first = _fields(_ask(["scontrol", "--oneliner", "show", "node", nodes[0]]))
    port = FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % PORTS
    return Meeting(len(nodes), first["NodeAddr"], port, os.environ["SLURM_NODEID"] == "0")


def place() -> tuple[int, int, str]:
    """Which node of how many this is, and what no other attempt at this job is called."""
    its = os.environ
    attempt = f"{its['SLURM_JOB_ID']}-{its.get('SLURM_RESTART_COUNT', '0')}"
    return int(its["SLURM_NODEID"]), int(its["SLURM_NNODES"]), attempt


def run_as_job(
    module: str, arguments: Sequence[str], job: Job, *, moved: Callable[[], object] = lambda: None
) -> None:
    """Run `python -m module arguments` as a job, show what it says, and return when it is done.

    A job that its time limit, a more urgent one or the loss of a node has ended is followed by
    another one, if it has got on: that is so where `moved()` has another value than before it.

    Raises:
        SystemExit: the job has failed; the text says why.
        InputError: there is no Slurm here, or it refuses the job.
        Interrupted: this process was asked to end; the job has ended before it.
    """
    while True:
        before = moved()
        ended = _run(module, arguments, job)
        if ended.state == "COMPLETED":
            ended.log.unlink(missing_ok=True)
            return
        cut = CUT_SHORT.get(ended.state)
        if ended.state == "FAILED" and ended.code == INTERRUPTED:  # warned, it has ended by itself
            cut = CUT_SHORT["TIMEOUT"]
        if cut is None or moved() == before:
            sys.exit(_why(ended, cut, job))
        _say(f"job {ended.number} {cut}; another one goes on")


def _run(module: str, arguments: Sequence[str], job: Job) -> Ended:
    folder = main_checkout() / ".dvc" / "tmp" / "instep-jobs"
    folder.mkdir(parents=True, exist_ok=True)
    follower = None
    try:
        # Signals wait until the number is known: nobody would cancel a job that has none.
        with holding_signals():
            answer = _ask(
                [
                    "sbatch",
                    "--parsable",
                    f"--job-name=instep-{module.rpartition('.')[2]}",
                    "--ntasks-per-node=1",
                    f"--output={folder}/%j.log",
                    "--open-mode=append",
                    "--requeue",
                    f"--signal=USR1@{WARNING}",
                    f"--export=ALL,{IN_JOB}=1",
                    *job.asked(),
                    "--wrap",
                    STEP + shlex.join([sys.executable, "-u", "-m", module, *arguments]),
                ]
            )
            follower = _Follower(answer.partition(";")[0], folder)
        return follower.wait()
    except BaseException:
        if follower is not None:
            follower.cancel()
        raise


class _Follower:
    """Shows what a job says, and what becomes of it."""

    def __init__(self, number: str, folder: Path) -> None:
        self._number, self._path = number, folder / f"{number}.log"
        self._told, self._shown = "", 0
        self._tell("is submitted")

    def wait(self, limit: float = float("inf")) -> Ended:
        """Until the job has ended, or so many seconds."""
        begun = heard = time.monotonic()
        while True:
            try:
                job = _fields(_ask(["scontrol", "--oneliner", "show", "job", self._number]))
                heard = time.monotonic()
            except InputError:
                if time.monotonic() - heard > SILENCE:
                    raise
                time.sleep(POLL)
                continue
            self._tell(_becomes(job))
            self._show()
            if job["JobState"] not in UNENDED or time.monotonic() - begun > limit:
                said = self._path.read_text(errors="replace") if self._path.exists() else ""
                code, by_signal = map(int, job["ExitCode"].split(":"))
                code = code or (128 + by_signal if by_signal else 0)
                return Ended(self._number, job["JobState"], code, said, log=self._path)
            time.sleep(POLL)

    def cancel(self) -> None:
        """End the job, which may save its state before."""
        self._tell("is being cancelled")
        _ask(["scancel", self._number])
        self.wait(ENDING)

    def _tell(self, told: str) -> None:
        """Say what becomes of the job, once."""
        if told and told != self._told:
            self._told = told
            _say(f"job {self._number} {told}")

    def _show(self) -> None:
        """Show what the job has said since."""
        if self._path.exists():
            with self._path.open(errors="replace") as file:
                file.seek(self._shown)
                print(file.read(), end="", flush=True)
                self._shown = file.tell()


def _becomes(job: dict[str, str]) -> str:
    """What is worth saying of an unended job."""
    match job["JobState"]:
        case "RUNNING":
            return f"runs on {job['NodeList']}"
        case "PENDING" if job.get("Restarts", "0") != "0":
            return f"was taken from its nodes, and waits for others ({job['Reason']})"
        case "PENDING":
            return f"waits ({job['Reason']})"
        case _:
            return ""


def _fields(line: str) -> dict[str, str]:
    return dict(field.split("=", 1) for field in line.split() if "=" in field)


def _ask(command: Sequence[str]) -> str:
    """What one of Slurm's commands answers.

    Raises:
        InputError: it is not there, or refuses.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        raise InputError(
            f"launcher.name: slurm, but this machine has no {command[0]}; log in to one of the "
            "cluster's, or use launcher.name: local"
        ) from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"{command[0]} refuses: {' '.join(error.stderr.split())}") from None
    return done.stdout.strip()


def _say(text: str) -> None:
    print(text, flush=True)


def _why(ended: Ended, cut: str | None, job: Job) -> str:
    """The reason why a job has failed, and what to do."""
    told = f"error: job {ended.number}"
    if ended.state == "OUT_OF_MEMORY" or any(text in ended.said[-4000:] for text in NO_MEMORY):
        return f"{told} ran out of memory; ask for more: launcher.options: ['--mem=...']"
    if cut == CUT_SHORT["TIMEOUT"]:
        asked = job.time or "the partition's"
        return f"{told} {cut} ({asked}) before it could save anything; raise launcher.time"
    if cut is not None:
        return f"{told} {cut}; the same command does what is left"
    if ended.state == "FAILED":
        return f"{told} failed with exit code {ended.code}; {ended.log} has what it said"
    return f"{told} ended as {ended.state}; the same command does what is left"
