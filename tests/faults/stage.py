"""Stages that tests start and end."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from pipeline.training.state import Saved
from tests.project import REPOSITORY, environment

ENDED = re.compile(r"ended by ([\w ]+) after iteration (\d+), whose state is saved")


@contextmanager
def started(
    project: Path, module: str = "stages.train", **extra: str
) -> "Iterator[subprocess.Popen[bytes]]":
    """A stage in a project, which does not outlive the block; what it says goes to said.txt."""
    paths = {"PYTHONPATH": str(REPOSITORY)} if module.startswith("tests.") else {}
    with (project / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *module.split()],
            cwd=project,
            env=environment(**paths, **extra),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for one in (
            (*family(process), psutil.Process(process.pid)) if process.poll() is None else ()
        ):
            one.send_signal(signal.SIGKILL)
        process.wait()


def family(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The processes below it."""
    return psutil.Process(process.pid).children(recursive=True)


def said(project: Path) -> str:
    return (project / "said.txt").read_text()


def wait_for(project: Path, process: "subprocess.Popen[bytes]", pattern: str) -> None:
    """Until the stage has said so."""
    deadline = time.monotonic() + 240
    while not re.search(pattern, said(project)):
        assert process.poll() is None, said(project)
        assert time.monotonic() < deadline, said(project)
        time.sleep(0.01)


def end_of(process: "subprocess.Popen[bytes]", within: float = 120) -> int:
    """Its exit code; nothing that it has started is left."""
    below = family(process) if process.poll() is None else []
    code = process.wait(within)
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    return code


def state_of(project: Path) -> Saved:
    (path,) = (project / ".dvc/tmp/instep").glob("*/state.pt")
    return torch.load(path, weights_only=True)
