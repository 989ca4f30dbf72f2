"""Evaluations by name: the workspace's, those of DVC's experiments and revisions, of MLflow's runs.

The only module that reads what DVC keeps.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.table import Array
from pipeline.disk import MODEL, write_bytes
from pipeline.errors import InputError
from pipeline.evaluation.comparison import Result
from pipeline.evaluation.per_image import PER_IMAGE, PerImage
from pipeline.evaluation.report import PREDICTIONS, read_mask
from pipeline.experiment import Params
from pipeline.params import main_checkout
from pipeline.tracking.store import TrackedRun, artifact_of, find_runs
from pipeline.yaml12 import parse_yaml

WORKSPACE = "workspace"


def find(name: str, params: Params) -> Result:
    """What was measured under a name: `workspace`, an experiment, any revision, an MLflow run.

    Raises:
        InputError: nothing is called so, or it holds no evaluation.
    """
    if name == WORKSPACE:
        return _of_files(name, params.train.work_dir, lambda path: Path(path).read_bytes())
    files, unknown = _revision(name)
    if files is not None:
        return _of_files(name, _work_dir(name, files), files.cat_file)
    content = _artifact(name, params, PER_IMAGE)
    if content is None:
        raise InputError(
            f"{name} is no experiment, no revision and no MLflow run with an evaluation; "
            "`dvc exp list` and `python -m stages.runs` name what there is, and `workspace` is "
            f"what lies here ({unknown})"
        )
    return Result(name, PerImage.load(content, f"{name}: {PER_IMAGE}"))


def find_model(name: str, params: Params) -> Path:
    """The file of the model that was trained under a name, as `find` knows names.

    What lies elsewhere is copied below `.dvc/tmp`.

    Raises:
        InputError: nothing is called so, or it holds no model.
    """
    work_dir = params.train.work_dir
    if name == WORKSPACE:
        path = Path(work_dir) / "checkpoints" / MODEL
        if not path.is_file():
            raise InputError(f"{path}: no such file; `dvc repro` trains it, `dvc pull` brings it")
        return path
    files, unknown = _revision(name)
    if files is not None:
        path = Path(_work_dir(name, files)) / "checkpoints" / MODEL
        try:
            content = files.cat_file(path.as_posix())
        except FileNotFoundError:
            raise InputError(
                f"{name}: there is no {path}; run `dvc repro` there, or `dvc pull` what a remote "
                "has"
            ) from None
    else:
        content = _artifact(name, params, Path("checkpoints") / MODEL)
        if content is None:
            raise InputError(
                f"{name} is no file, no experiment, no revision and no MLflow run with a model; "
                f"`dvc exp list` and `python -m stages.runs` name what there is ({unknown})"
            )
    digest = hashlib.md5(content).hexdigest()
    kept = main_checkout() / ".dvc" / "tmp" / "instep-models" / f"{digest}{Path(MODEL).suffix}"
    if not kept.is_file():
        write_bytes(kept, content)
    return kept


def runs_called(name: str, runs: Sequence[TrackedRun]) -> list[TrackedRun]:
    """The runs of an id, the beginning of one, a name, or what a name ends by: an experiment."""
    last = f"({name})"  # an experiment, or a fingerprint
    found = [run for run in runs if name in (run.run_id, run.name) or run.name.endswith(last)]
    return found or [run for run in runs if len(name) >= 4 and run.run_id.startswith(name)]


def ambiguous(name: str, runs: Sequence[str]) -> InputError:
    """That several runs, by their ids, are called so."""
    return InputError(f"{len(runs)} runs are called {name}; name one by its id: {', '.join(runs)}")


def _artifact(name: str, params: Params, path: Path) -> bytes | None:
    """A file of the artifacts of the run of this name that has it, if there is one.

    Raises:
        InputError: several have it, or MLflow's store can't be read.
    """
    runs = runs_called(name, find_runs(params.tracking))
    held = {run.run_id: artifact_of(params.tracking, run.run_id, path) for run in runs}
    found = {one: content for one, content in held.items() if content is not None}
    if len(found) > 1:
        raise ambiguous(name, list(found))
    return next(iter(found.values()), None)


def _revision(name: str) -> tuple[Any, str]:
    """The files of a revision of the main checkout, or why there is none of this name.

    A queued experiment's own workspace knows neither branches nor other experiments.
    """
    from dvc.api import DVCFileSystem
    from dvc.scm import RevError

    files = DVCFileSystem(str(main_checkout()), rev=name)
    try:
        files.ls("")  # the revision is looked up when it is first read
    except RevError as error:
        return None, str(error)
    return files, ""


def _work_dir(name: str, files: Any) -> str:
    try:
        text = files.read_text("params.yaml", encoding="utf-8")
        return str(parse_yaml(text, f"params.yaml of {name}")["train"]["work_dir"])
    except (FileNotFoundError, KeyError, TypeError, UnicodeDecodeError):
        raise InputError(f"{name}: its params.yaml is missing or names no train.work_dir") from None


def _of_files(name: str, work_dir: str, read: Callable[[str], bytes]) -> Result:
    path = Path(work_dir) / PER_IMAGE
    try:
        content = read(path.as_posix())
    except FileNotFoundError:
        raise InputError(
            f"{name}: there is no {path}; run `dvc repro` there, or `dvc pull` what a remote has"
        ) from None

    def mask(image: str) -> Array | None:
        try:
            return read_mask(read((Path(work_dir) / PREDICTIONS / f"{image}.png").as_posix()))
        except FileNotFoundError:
            return None

    return Result(name, PerImage.load(content, f"{name}: {path}"), mask)
