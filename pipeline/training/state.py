"""What identifies a result, and what lets a killed training go on where it was.

The state of a running training lies outside DVC's outputs, which DVC deletes before a stage runs:
in `.dvc/tmp/instep/<fingerprint>` of the main checkout, which every way of running DVC shares.
"""

import csv
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pipeline.data.store import file_md5
from pipeline.params import Params, main_checkout, plain, read_yaml
from pipeline.training.checkpoint import (
    Checkpoint,
    load_file,
    save_checkpoint,
    write_atomically,
)

KEPT_STATES = 5
LOCK_PATIENCE = 30.0  # seconds: a killed training's last process may need a few to end

# These change where, how fast and how safely a training runs, not its result.
# The md5 of the files that a training starts from stands for their names.
NEUTRAL = {"gpus", "device", "workers", "work_dir", "load_from", "resume_from", "checkpoint"}
# Of `evaluation`, what the validation during training obeys.
VALIDATION = {"interval", "mode", "crop", "stride"}


def result_params(params: Params) -> dict[str, Any]:
    """The parameters that change the result of a training, under their names in params.yaml."""
    train, evaluation = plain(params.train), plain(params.evaluation)
    return {
        "augmentation": plain(params.augmentation),
        "model": plain(params.model),
        "train": {name: value for name, value in train.items() if name not in NEUTRAL},
        "evaluation": {name: evaluation[name] for name in sorted(VALIDATION)},
    }


def train_fingerprint(params: Params, data_md5: str) -> str:
    """What a training's result follows from: parameters, data, code, the files it starts from."""
    starts = (params.train.load_from, params.train.resume_from)
    files = [file_md5(start_file(path, params)) if path else None for path in starts]
    pretrained = params.model.backbone.pretrained
    weights = main_checkout() / (pretrained or "")
    files.append(file_md5(weights) if pretrained != "imagenet" and weights.is_file() else None)
    return _digest([result_params(params), data_md5, _code("train"), files])


def evaluation_fingerprint(params: Params, data_md5: str, train: str) -> str:
    """What an evaluation's result follows from: a training, the settings, data and code."""
    settings = {n: v for n, v in plain(params.evaluation).items() if n != "interval"}
    return _digest([settings, data_md5, _code("evaluate"), train])


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _code(stage: str) -> dict[str, str]:
    """The md5 of every file of code that dvc.yaml names, or a folder of it, as a dependency."""
    deps = [Path(dep) for dep in read_yaml(Path("dvc.yaml"))["stages"][stage]["deps"]]
    files = [file for dep in deps for file in (dep, *dep.glob("*.py")) if file.suffix == ".py"]
    return {file.as_posix(): file_md5(file) for file in files}


def start_file(given: str, params: Params) -> Path:
    """The checkpoint that `load_from` or `resume_from` names, relative to the main checkout.

    Raises:
        ValueError: it does not exist, or DVC deletes it before the training starts.
    """
    path = (main_checkout() / given).resolve()
    if path.is_relative_to((main_checkout() / params.train.work_dir).resolve()):
        raise ValueError(
            f"train.resume_from / load_from: {given} lies in train.work_dir "
            f"{params.train.work_dir}, whose files DVC deletes before the stage starts; copy it "
            "elsewhere first"
        )
    if not path.is_file():
        raise ValueError(
            f"train.resume_from / load_from: no file {path}; a relative name is looked up in "
            f"{main_checkout()}"
        )
    return path


class State:
    """The saved state of one training, named by its fingerprint.

    `history` is the truth about the curves: a list of {"iteration": i, <metric>: value, ...}.
    """

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.folder = main_checkout() / ".dvc" / "tmp" / "instep" / fingerprint
        self.log = self.folder / "train.log"
        self._state = self.folder / "state.pt"
        self._run_id = self.folder / "run_id"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that writes this state.

        Raises:
            ValueError: another training with the same fingerprint is running.
        """
        deadline = time.monotonic() + LOCK_PATIENCE
        while (lock := _try_lock(self.folder)) is None:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"another process is doing this very training (it holds {self.folder}/lock); "
                    "wait for it, or end it"
                )
            time.sleep(0.2)
        with lock:
            self._forget_old_states()
            yield

    def _forget_old_states(self) -> None:
        ages = {}
        for path in self.folder.parent.iterdir():
            with suppress(FileNotFoundError):  # another process forgets at the same moment
                ages[path] = path.stat().st_mtime
        others = sorted(ages.keys() - {self.folder}, key=lambda path: ages[path])
        for path in others[: max(len(others) + 1 - KEPT_STATES, 0)]:
            _remove(path)

    def save(self, checkpoint: Checkpoint, history: list[dict[str, Any]]) -> None:
        """Keep a checkpoint and the curves up to it, in one step."""
        save_checkpoint({"checkpoint": checkpoint, "history": history}, self._state)
        best = self._best(checkpoint) if checkpoint["best"] else None
        for path in self.folder.glob("best-*.pt"):
            if path != best:
                path.unlink()

    @property
    def exists(self) -> bool:
        """Whether a checkpoint has been saved."""
        return self._state.is_file()

    def load(self) -> tuple[Checkpoint, list[dict[str, Any]]] | None:
        """The last saved checkpoint and the curves up to it, if there are any."""
        if not self.exists:
            return None
        saved = load_file(self._state)
        return saved["checkpoint"], saved["history"]

    def write_outputs(self, work_dir: Path) -> None:
        """Write what DVC takes over: checkpoints/{last,best}.pt, train.tsv and val.tsv."""
        saved = self.load()
        assert saved is not None, "the loop ends by saving"
        checkpoint, history = saved
        shutil.rmtree(work_dir / "checkpoints", ignore_errors=True)
        save_checkpoint(checkpoint, work_dir / "checkpoints" / "last.pt")
        if checkpoint["best"]:
            shutil.copyfile(self._best(checkpoint), work_dir / "checkpoints" / "best.pt")
        for name in ("train", "val"):
            _write_curves(work_dir / f"{name}.tsv", f"{name}/", history)

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Keep the best checkpoint so far; `save` must follow, which lets go of the one before."""
        save_checkpoint(checkpoint, self._best(checkpoint))

    def _best(self, checkpoint: Checkpoint) -> Path:
        return self.folder / f"best-{checkpoint['best']['iteration']}.pt"

    @property
    def run_id(self) -> str | None:
        """The MLflow run of this training, if one was opened."""
        return self._run_id.read_text() if self._run_id.is_file() else None

    def remember_run(self, run_id: str) -> None:
        """Keep the MLflow run of this training, whatever happens next."""
        write_atomically(self._run_id, lambda file: file.write(run_id.encode()))

    def forget(self) -> None:
        """Delete the state: the result is in DVC's hands, and the next training starts anew."""
        if self.folder.is_dir():
            _remove(self.folder)


def _write_curves(path: Path, prefix: str, history: list[dict[str, Any]]) -> None:
    """The metrics of one prefix, a column each, a row for every iteration that has one."""
    rows = [entry for entry in history if any(name.startswith(prefix) for name in entry)]
    names = [name for name in rows[0] if name.startswith(prefix)] if rows else []
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["iteration", *(name.removeprefix(prefix) for name in names)])
        table.writerows([entry["iteration"], *(entry[name] for name in names)] for entry in rows)


def _try_lock(folder: Path) -> IO[str] | None:
    """The folder's lock, held until it is closed; None while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = (folder / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return None
    return lock if os.fstat(lock.fileno()).st_nlink else None  # the folder may be gone by now


def _remove(folder: Path) -> None:
    """Delete a state that no process is writing."""
    if lock := _try_lock(folder):
        with lock:
            shutil.rmtree(folder, ignore_errors=True)
