"""Stages that tests start and end."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from pipeline.training.state import Saved
from tests.forked import Forked
from tests.project import REPOSITORY, environment

ENDED = re.compile(r"ended by ([\w ]+) after iteration (\d+), whose state is saved")


@contextmanager
def started(
    project: Path, module: str = "stages.train", *arguments: str, **extra: str
) -> Iterator[Forked]:
    """A stage in a project, which does not outlive the block; what it says goes to said.txt."""
    paths = {"PYTHONPATH": str(REPOSITORY)} if module.startswith("tests.") else {}  # for ranks
    own = {"env": environment(**paths, **extra), "said": project / "said.txt"}
    process = Forked(module, *arguments, cwd=project, **own)
    try:
        yield process
    finally:
        for one in (
            (*family(process), psutil.Process(process.pid)) if process.poll() is None else ()
        ):
            one.send_signal(signal.SIGKILL)
        process.wait()


def family(process: Forked) -> list[psutil.Process]:
    """The processes below it."""
    return psutil.Process(process.pid).children(recursive=True)


def said(project: Path) -> str:
    return (project / "said.txt").read_text()


def wait_for(project: Path, process: Forked, pattern: str) -> None:
    """Until the stage has said so."""
    deadline = time.monotonic() + 240
    while not re.search(pattern, said(project)):
        assert process.poll() is None, said(project)
        assert time.monotonic() < deadline, said(project)
        time.sleep(0.01)


def end_of(process: Forked, within: float = 300) -> int:
    """Its exit code; nothing that it has started is left."""
    below = family(process) if process.poll() is None else []
    code = process.wait(within)
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    return code


def state_of(project: Path) -> Saved:
    """That of the last training."""
    states = (project / ".dvc/tmp/instep").glob("*/state.pt")
    return torch.load(max(states, key=lambda path: path.stat().st_mtime), weights_only=True)
