"""A project of seconds, the processes that work on it, and what they leave there."""

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline.disk import file_md5
from tests.project import environment, make_project, query, run

MARK = "INSTEP_SOAK"  # in the environment of all processes that work on a project: its path
LONG = 300.0  # seconds: a machine may have more to do
ITERATION = re.compile(r"^iteration (\d+)  ", re.MULTILINE)
CONTINUED = re.compile(r"^continuing at iteration (\d+)$", re.MULTILINE)
# What no screen may ever show, whatever was killed before.
FOREIGN = re.compile(r"Traceback|Error\b|tracked nowhere|lacks |is damaged|refuses")
# What a training and its evaluation leave that must be equal, byte for byte.
RESULT = (
    *(f"outputs/checkpoints/{name}" for name in ("last.pt", "best.pt", "model.safetensors")),
    *(f"outputs/{name}.tsv" for name in ("train", "val")),
    "outputs/evaluation/scores.json",
    "outputs/evaluation/per_image.npz",
    "metrics.json",
)
# What lists of files leave out: DVC's and git's own, and what Python keeps of its modules.
OTHERS = re.compile(r"^\.git/|^\.dvc/(?!tmp/instep)|__pycache__/|^(said|tmp)\b|^mlflow\.db")
CHANGES = {"evaluation.interval": 15, "train.checkpoint.interval": 3}


def make(folder: Path, ranks: int, iterations: int, **changes: object) -> Path:
    """A project whose training has so many iterations."""
    size = {"train.gpus": ranks, "train.iterations": iterations}
    (folder / "tmp").mkdir(parents=True)
    return make_project(folder, {"train": 10, "val": 3, "test": 6}, **CHANGES | size | changes)


def extra(project: Path) -> dict[str, str]:
    """What the processes that work on a project find in their environment."""
    return {MARK: str(project), "TMPDIR": str(project / "tmp")}


def finish(project: Path, *command: str) -> str:
    """Run a command undisturbed; what it says."""
    return run([*command], project, **extra(project)).stdout


class Attempt:
    """A command at work in a project, in a session of its own as in a terminal."""

    def __init__(self, project: Path, *command: str) -> None:
        self.project, self.begun = project, time.time()
        self._said = project / "said.txt"
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                command,
                cwd=project,
                env=environment(**extra(project)),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        """All that stands on its screen."""
        return self._said.read_text(errors="replace")

    def wait_until(self, true: Callable[[], Any]) -> bool:
        """Wait for something; False where the command has ended before."""
        deadline = time.monotonic() + LONG
        while not true():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened in {LONG:g} s:\n{self.said()}")
            time.sleep(0.002)
        return True

    def newer(self, *paths: str) -> bool:
        """Whether it has written any of the files."""
        for path in paths:
            try:
                if (self.project / path).stat().st_mtime > self.begun:
                    return True
            except OSError:
                continue
        return False

    def iterations(self) -> list[int]:
        """Those that it has done."""
        return [int(found) for found in ITERATION.findall(self.said())]

    def writes_state(self) -> bool:
        """Whether a state is being written at this moment."""
        return any((self.project / ".dvc/tmp/instep").glob("*/.*.tmp"))

    def end(self, patience: float = 60.0) -> tuple[int, float, int]:
        """Its exit code, the seconds until no process is left, and how many had to be killed."""
        begun = time.monotonic()
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            code = 999
        while (left := at_work(self.project)) and time.monotonic() - begun < patience:
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        for one in left:
            one.kill()
        self.process.wait()
        return code, seconds, len(left)


def at_work(project: Path) -> list[psutil.Process]:
    """The processes that work on a project."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.status() != psutil.STATUS_ZOMBIE and one.environ().get(MARK) == str(project):
                found.append(one)
        except (psutil.Error, OSError):  # it has just ended, or is another user's
            continue
    return found


def stage_of(process: "subprocess.Popen[bytes]") -> tuple[psutil.Process | None, list[Any]]:
    """The stage that is running, and its ranks: itself, where it is the only one."""
    try:
        all_of = [psutil.Process(process.pid)]
        all_of += all_of[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return None, []
    stage, ranks = None, []
    for one in all_of:
        try:
            words = one.cmdline()
            if "-m" not in words or not any(word.startswith("stages.") for word in words):
                continue
            if "RANK" in one.environ():
                ranks.append(one)
            else:
                stage = stage or one
        except psutil.Error:
            continue
    return stage, ranks or [one for one in (stage,) if one]


def listed(project: Path) -> list[str]:
    """All files of a project, but DVC's and git's; the names of MLflow's without what is drawn."""
    found = []
    for folder, _, names in os.walk(project):
        for name in names:
            path = (Path(folder) / name).relative_to(project).as_posix()
            if not OTHERS.search(path):
                path = re.sub(r"\b[0-9a-f]{32}\b", "RUN", path)
                path = re.sub(r"\+timestamp\+\d+\+[0-9a-f-]+", "", path)
                found.append(re.sub(r"(?<=%)timestamp%\d+%[0-9a-f-]+", "", path))
    return sorted(found)


def points(project: Path) -> list[tuple[str, int, float]]:
    """All points in MLflow but timings and the machine's load."""
    rows = query(project, "SELECT key, step, value FROM metrics")
    return sorted(row for row in rows if not row[0].startswith(("time/", "system/")))


def differences(project: Path, whole: Path) -> list[str]:
    """What is not in a project as in one that nobody has disturbed, in words."""
    told = []
    for name in RESULT:
        mine, other = project / name, whole / name
        if not (mine.is_file() and other.is_file()):
            if other.is_file():
                told.append(f"{name} is missing")
        elif file_md5(mine) != file_md5(other):
            told.append(f"{name} differs")
    runs = query(project, "SELECT status FROM runs")
    if runs != [("FINISHED",)]:
        told.append(f"MLflow's runs are {runs}")
    mine, other = points(project), points(whole)
    if mine != other:
        told.append(
            f"MLflow has {len(mine)} points and not {len(other)}; "
            f"{len(mine) - len(set(mine))} of them twice"
        )
    files, expected = listed(project), listed(whole)
    return told + [
        f"{name}: {files.count(name)} files and not {expected.count(name)}"
        for name in sorted({*files, *expected})
        if files.count(name) != expected.count(name)
    ]


def weights(project: Path) -> str:
    """What the result's weights are known by."""
    content = "".join(file_md5(project / name) for name in RESULT[:3])
    return hashlib.md5(content.encode()).hexdigest()[:8]


@contextmanager
def folder(keep: bool) -> Iterator[Path]:
    """Where the projects lie; with `keep` it stays."""
    made = tempfile.mkdtemp(prefix="instep-soak-")
    try:
        yield Path(made)
    finally:
        if keep:
            print(f"kept in {made}")
        else:
            run(["rm", "-rf", made], Path("/"))


def table(title: str, names: list[str], rows: list[list[object]]) -> None:
    """Print rows below the names of their columns."""
    texts = [names, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    print(f"\n{title}")
    for row in texts:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    sys.stdout.flush()


def arguments(what: str, option: str, number: int) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument(f"--{option}", type=int, default=number, metavar="N", dest="number")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the projects where they are")
    return parser.parse_args()


def signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    """As Ctrl-C does it: to all processes of the terminal."""
    os.killpg(process.pid, signal.Signals(number))
