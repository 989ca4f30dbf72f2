"""Stages and DVC in processes of their own, forked off one that has imported what takes seconds.

Stages run the repository's code, in the project's folder. What a test changes of a project's code
is run by DVC alone, which starts Python anew for each stage.
"""

import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

from pipeline.interruption import end_by_signals

DVC = "dvc.__main__"
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        __name__,
        "stages.train",
        "stages.evaluate",
        "mlflow.store.tracking.sqlalchemy_store",
        "dvc.cli.parser",
        "dvc.repo",
        "dvc.repo.experiments",
    ]
)


class Forked:
    """`python -m MODULE ARGUMENTS`, with what the tests use of a subprocess.Popen.

    It is the first of a group of processes, and what it prints stands in a file.
    """

    def __init__(
        self, module: str, *arguments: str, cwd: Path, env: dict[str, str], said: Path
    ) -> None:
        self.args = [module, *arguments]
        said.write_bytes(b"")  # who waits for words finds the file, and none of the process before
        self._process = FORKS.Process(target=_run, args=(self.args, cwd, env, said))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative after a signal, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Send it, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def _run(command: list[str], cwd: Path, env: dict[str, str], said: Path) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    with said.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    if command[0] != DVC:
        end_by_signals()  # what `python -m stages.NAME` does before it imports torch
    sys.argv = command
    sys.modules.pop(command[0], None)  # it is run as the main module, as if for the first time
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
