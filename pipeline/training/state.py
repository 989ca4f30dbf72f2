"""What identifies a result, and what lets a killed training go on where it was.

The state of a running training lies outside DVC's outputs, which DVC deletes before a stage runs:
in `.dvc/tmp/instep/<fingerprint>` of the main checkout, which every way of running DVC shares.
"""

import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from filelock import FileLock, Timeout

from pipeline.disk import (
    FORMAT,
    check_format,
    file_md5,
    remove_temporary,
    write_atomically,
    write_table,
    write_text,
    writing,
)
from pipeline.errors import InputError
from pipeline.evaluation.inference import EvaluationParams
from pipeline.evaluation.metrics import HistoryEntry
from pipeline.models import ModelParams
from pipeline.models.weights import read_file, require_whole
from pipeline.params import Section, main_checkout, plain
from pipeline.training.checkpoint import (
    Checkpoint,
    Description,
    described_anew,
    load_checkpoint,
    save,
)
from pipeline.training.params import TrainParams
from pipeline.yaml12 import read_yaml

log = logging.getLogger("instep")

KEPT_DAYS = 30  # for so long after its last checkpoint an unfinished training can be gone on with
LOCK_PATIENCE = 30.0  # seconds: a killed training's last process may need a few to end
FINISHED = "finished"  # the file that marks the state of the last finished training

# These change where, how fast and how safely a training runs, not its result; nor does
# model.backbone.with_cp.
# The md5 of the files that a training starts from stands for their names.
NEUTRAL = {"gpus", "parallel", "device", "workers", "timeout", "work_dir"}
NEUTRAL |= {"load_from", "resume_from", "checkpoint"}
# Of `evaluation`, what the result of the validation during training follows from. It obeys
# batch_size, too, which changes its speed and memory alone.
VALIDATION = {"interval", "mode", "crop", "stride"}


class Means(TypedDict):
    """The sums of the loss's terms over the `steps` since the last point of the curves."""

    steps: int
    sums: dict[str, float]


class Saved(TypedDict):
    """The content of state.pt: a checkpoint, and the curves up to it.

    `history` is the truth about the curves. `hashes` are those of the weights, by iteration. The
    rest is as in the loop's Progress.
    """

    format: int
    checkpoint: Checkpoint
    history: list[HistoryEntry]
    means: Means
    hashes: dict[str, str]
    left_out: int
    unmeasured: bool


class Packed(NamedTuple):
    """A training's state, the best checkpoint until then, and the key of its MLflow run."""

    saved: Saved
    best: Checkpoint | None
    run_key: str | None


def result_params(
    *,
    augmentation: Section,
    model: ModelParams,
    train: TrainParams,
    evaluation: EvaluationParams,
) -> dict[str, Any]:
    """The parameters that change the result of a training, under their names in params.yaml."""
    options, validation, network = plain(train), plain(evaluation), plain(model)
    del network["backbone"]["with_cp"]
    return {
        "augmentation": plain(augmentation),
        "model": network,
        "train": {name: value for name, value in options.items() if name not in NEUTRAL},
        "evaluation": {name: validation[name] for name in sorted(VALIDATION)},
    }


def train_fingerprint(result: dict[str, Any], data_md5: str, code: str) -> str:
    """What a training's result follows from: parameters, data, and its `training_code`."""
    return _digest([result, data_md5, code])


def training_code(result: dict[str, Any], train: TrainParams) -> str:
    """What else a training's result follows from: code, and the files of weights it starts from."""
    files = ["resumed" if train.resume_from else "loaded", *map(file_md5, start_files(train))]
    pretrained = result["model"]["backbone"]["pretrained"]
    weights = main_checkout() / (pretrained or "")
    files.append(file_md5(weights) if pretrained != "imagenet" and weights.is_file() else "")
    return _digest([_code("train"), files])


def evaluation_code(training: str) -> str:
    """The same of an evaluation, by that of its training."""
    return _digest([training, _code("evaluate")])


def evaluation_fingerprint(params: EvaluationParams, data_md5: str, train: str) -> str:
    """What an evaluation's result follows from: a training, the settings, data and code."""
    settings = {name: value for name, value in plain(params).items() if name != "interval"}
    return _digest([settings, data_md5, _code("evaluate"), train])


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _code(stage: str) -> dict[str, str]:
    """The md5 of every file of code that dvc.yaml names, or a folder of it, as a dependency."""
    deps = [Path(dep) for dep in read_yaml(Path("dvc.yaml"))["stages"][stage]["deps"]]
    files = [file for dep in deps for file in (dep, *dep.glob("*.py")) if file.suffix == ".py"]
    return {file.as_posix(): file_md5(file) for file in files}


def start_files(params: TrainParams) -> list[Path]:
    """The files that a training starts from: those of `load_from` or `resume_from`, if any.

    A relative path is one below the main checkout. `resume_from` takes the best.pt beside its file
    along, so that the best checkpoint so far is not forgotten.

    Raises:
        InputError: a file does not exist, or DVC deletes it before the training starts.
    """
    given = params.load_from or params.resume_from
    if not given:
        return []
    path = (main_checkout() / given).resolve()
    if path.is_relative_to((main_checkout() / params.work_dir).resolve()):
        raise InputError(
            f"train.resume_from / load_from: {given} lies in train.work_dir {params.work_dir}, "
            "whose files DVC deletes before the stage starts; copy it elsewhere first"
        )
    if not path.is_file():
        raise InputError(
            f"train.resume_from / load_from: no file {path}; a relative name is looked up in "
            f"{main_checkout()}"
        )
    best = path.with_name("best.pt")
    return [path, best] if params.resume_from and best.is_file() else [path]


class LogFile(logging.FileHandler):
    """A file of log lines that says what is wrong where it can't be written."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Raise the error, of which `logging` would print a traceback for every line."""
        if threading.current_thread() is threading.main_thread():  # another would die of it
            with writing(Path(self.baseFilename)):
                raise


class State:
    """The saved state of one training, named by its fingerprint.

    Two are kept, the last one and the one before it, each with the best checkpoint until then: a
    training whose last state has become broken goes on from the one before.
    """

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.folder = main_checkout() / ".dvc" / "tmp" / "instep" / fingerprint
        self.log = self.folder / "train.log"
        self._state = self.folder / "state.pt"
        self._before = self.folder / "state-before.pt"
        self._usable = True  # whether state.pt is worth keeping when another one is saved
        self._last_best: Path | None = None  # that of the last state that was saved or loaded
        self._run_key = self.folder / "run_key"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that writes this state; what others left goes.

        That is what a kill in the middle of writing left here, and other trainings left too long.

        Raises:
            InputError: another training with the same fingerprint is running.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(self.folder / "lock", timeout=LOCK_PATIENCE).acquire()
        except Timeout:
            raise InputError(
                f"another process is doing this very training (it holds {self.folder}/lock); "
                "wait for it, or end it"
            ) from None
        with held:
            if self.finished:  # `dvc repro -f`: this training is to be done anew
                for path in self.folder.iterdir():
                    if path.name not in ("lock", FINISHED):
                        path.unlink()
                (self.folder / FINISHED).unlink()  # last: a kill before it leaves nothing half done
            remove_temporary(self.folder)
            self._forget_old_states()
            yield

    def _forget_old_states(self) -> None:
        for path in self.folder.parent.iterdir():
            with suppress(FileNotFoundError):  # another process forgets at the same moment
                days = (time.time() - path.stat().st_mtime) / 86400
                if days > KEPT_DAYS and path != self.folder and _remove(path):
                    log.info("forgot the training in %s, untouched for %.0f days", path, days)

    @property
    def finished(self) -> bool:
        """Whether the training is done and DVC has its outputs."""
        return (self.folder / FINISHED).is_file()

    def finish(self) -> None:
        """DVC has the training's outputs: the next training of the same starts anew.

        The state stays for an extension, until another training is finished. One that a process is
        writing, since it does the training anew, is left alone.
        """
        if not self.folder.is_dir():
            return
        with suppress(Timeout), FileLock(self.folder / "lock", blocking=False):
            for path in self.folder.parent.iterdir():
                if path != self.folder and (path / FINISHED).is_file():
                    _remove(path)
            self._before.unlink(missing_ok=True)
            (self.folder / FINISHED).touch()

    def start_from(self, other: "State", description: Description) -> bool:
        """Take over what a finished training ended with, its curves and its best checkpoint.

        Says whether it was still there.
        """
        if not other.finished:
            return False
        with suppress(Timeout), FileLock(other.folder / "lock", blocking=False):
            if other.finished:
                saved = other.load()
                if best := other._best(saved["checkpoint"]):
                    self.save_best(described_anew(load_checkpoint(best), description))
                self.save(saved)
                return True
        return False

    def save(self, saved: Saved) -> None:
        """Keep a checkpoint and the curves up to it, in one step, and those before it.

        Raises:
            InputError: there is no room; the last two states are still there.
        """
        save(saved, self._state, self._before if self._usable else None)
        best = self._best(saved["checkpoint"])
        for path in self.folder.glob("best-*.pt"):
            if path not in (best, self._last_best):
                path.unlink()
        self._usable, self._last_best = True, best

    @property
    def exists(self) -> bool:
        """Whether a checkpoint has been saved."""
        return self._state.is_file() or self._before.is_file()

    @property
    def saved_at(self) -> int | None:
        """When that was, in nanoseconds since 1970."""
        return self._state.stat().st_mtime_ns if self._state.is_file() else None

    def load(self) -> Saved:
        """The last saved checkpoint and the curves up to it; if it is broken, the one before it.

        Raises:
            InputError: both are broken, or another version of this tool wrote them.
        """
        broken = []
        for path in (self._state, self._before):
            try:
                saved = self._read(path)
            except InputError as error:
                broken.append(str(error))
                continue
            check_format(saved, path, f"delete {self.folder} to train anew")
            if broken:
                iteration = saved["checkpoint"]["iteration"]
                log.warning("%s: taking the state before it, of iteration %d", broken[0], iteration)
            self._usable, self._last_best = not broken, self._best(saved["checkpoint"])
            return saved
        listed = "\n".join(f"  {one}" for one in broken)
        raise InputError(
            f"neither of this training's two saved states can be used:\n{listed}\n"
            f"delete {self.folder} to train anew: what it has done so far is lost"
        )

    def _read(self, path: Path) -> Saved:
        """A saved state that is as it was written, and so is the best checkpoint until then."""
        saved = cast("Saved", read_file(path))
        if saved.get("format") == FORMAT and (best := self._best(saved["checkpoint"])):
            require_whole(best)
        return saved

    def packed(self, saved: Saved) -> Packed:
        """All that another machine needs to go on with this training, whose state is `saved`."""
        best = self._best(saved["checkpoint"])
        return Packed(saved, load_checkpoint(best) if best else None, self.run_key)

    def adopt(self, packed: Packed) -> None:
        """Keep what another machine has packed."""
        if packed.best is not None:
            self.save_best(packed.best)
        self.save(packed.saved)
        if packed.run_key is not None:
            self.remember_run(packed.run_key)

    def write_outputs(self, work_dir: Path) -> None:
        """Write what DVC takes over: checkpoints/{last,best}.pt, train.tsv and val.tsv.

        Raises:
            InputError: the state that the training ended with is broken, or there is no room.
        """
        try:
            saved = self._read(self._state)
        except InputError as error:  # the one before it is not the result
            raise InputError(
                f"{error}; run the same command again: it goes on from the state before"
            ) from None
        checkpoint = saved["checkpoint"]
        shutil.rmtree(work_dir / "checkpoints", ignore_errors=True)
        save(checkpoint, work_dir / "checkpoints" / "last.pt")
        if best := self._best(checkpoint):
            _copy(best, work_dir / "checkpoints" / "best.pt")
        for name in ("train", "val"):
            write_curves(work_dir / f"{name}.tsv", f"{name}/", saved["history"])

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Keep the best checkpoint so far; `save` must follow, which lets go of the one before."""
        best = self._best(checkpoint)
        assert best is not None
        save(checkpoint, best)

    def _best(self, checkpoint: Checkpoint) -> Path | None:
        best = checkpoint["best"]
        return self.folder / f"best-{best['iteration']}.pt" if best else None

    @property
    def run_key(self) -> str | None:
        """The key of this training's MLflow run, if one was begun."""
        return self._run_key.read_text() if self._run_key.is_file() else None

    def remember_run(self, key: str) -> None:
        """Keep the key of this training's MLflow run, whatever happens next."""
        write_text(self._run_key, key)


class Writer:
    """Writes on a thread of its own, one thing at a time, while the program goes on.

    What goes wrong is raised by the next `wait`. Leaving the context waits too, so that nothing is
    written after it; a process that is killed loses what it has begun to write.
    """

    def __enter__(self) -> "Writer":
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[object] | None = None
        return self

    def start(self, write: Callable[[], object]) -> None:
        """Begin to write; what was begun before has been waited for."""
        assert self._last is None
        self._last = self._pool.submit(write)

    def wait(self) -> None:
        """Until all is on disk."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown()
        if error is None:  # which else would be hidden
            self.wait()


def write_curves(path: Path, prefix: str, history: list[dict[str, Any]]) -> None:
    """The metrics of one prefix, a column each, a row for every iteration that has one."""
    rows = [entry for entry in history if any(name.startswith(prefix) for name in entry)]
    # Where all steps since the last point were left out, the point has no loss.
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
    write_table(
        path,
        ["iteration", *(name.removeprefix(prefix) for name in names)],
        [[entry["iteration"], *(entry.get(name) for name in names)] for entry in rows],
    )


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as given:
        write_atomically(
            target,
            lambda file: shutil.copyfileobj(given, file, 2**24),
            size=source.stat().st_size,
        )


def _remove(folder: Path) -> bool:
    """Delete a state, unless a process is writing it; says whether it is gone."""
    try:
        with FileLock(folder / "lock", blocking=False):
            shutil.rmtree(folder, ignore_errors=True)
    except (Timeout, FileNotFoundError):
        return False
    return True
