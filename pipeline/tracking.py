"""All that MLflow is told of runs. No failure of its store ends a training or an evaluation.

A thread tells the store what a stage logs, so that no step waits for it; what the store refuses is
told again until the stage has ended and waited for a while. MLflow can neither replace nor delete a
point, so a point that a run holds already is not sent a second time.
"""

import csv
import hashlib
import json
import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.data.store import Array
from pipeline.errors import InputError, Interrupted
from pipeline.evaluation.report import panel
from pipeline.params import Positive, Section, main_checkout
from pipeline.provenance import DVC_TAGS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

log = logging.getLogger("instep")
HistoryEntry = dict[str, Any]
Colours = Mapping[str, Sequence[int]]  # of each class, by its name

EVALUATION_TAG = "evaluation"  # the fingerprint of the evaluation whose scores a run holds
INTERVAL_TAG = "mean_iou.interval"  # the ends of the 95% interval of that evaluation's mean IoU
PARENT_TAG = "mlflow.parentRunId"
# Every training of a fingerprint has these metrics at the same steps, and saves its state before
# it goes on from such a step; which others there are depends on tracking.log_interval.
SCORES = ("val/", "val_final/", "test/")
PICTURES = "images"  # the folder of artifacts that MLflow shows as a grid, by steps
# What a person sees under "Views" on MLflow's page of an experiment: its table of runs by their
# scores. Of itself the table shows no metric.
VIEW = {
    "selectedColumns": [
        "metrics.`test/mean_iou`",
        "tags.`mean_iou.interval`",
        "metrics.`val/best_mean_iou`",
    ],
    "orderByKey": "metrics.`test/mean_iou`",
    "orderByAsc": False,
}
# What MLflow's pages of an experiment are made for, trainings and not language models; and the
# view, as MLflow keeps those that people save there.
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.sharedViewState.scores": json.dumps(
        {"name": "Scores", "createdAt": 0, "state": json.dumps(VIEW)}
    ),
}
TABLES_TAG = "mlflow.loggedArtifacts"  # by which MLflow knows that a file is a table
BATCH = 1000  # the most points that MLflow takes at once
NAME_LENGTH = 250  # the longest name that MLflow takes

# All in seconds.
OPENING = 60.0  # a stage's start waits no longer for the store (which may have tables to create)
ANSWER = 10  # nor for one answer of a server
PATIENCE = 60.0  # the end of a stage waits as long for the store to take the rest
HASTE = 5.0  # as long after a signal: whoever has sent it may soon send SIGKILL
SPARE = 2.0  # and this much longer for the answer to a request that is under way
RETRY = 1.0


class TrackingParams(Section):
    """The section `tracking`; every key is explained beside it in params.yaml."""

    uri: str | None
    experiment: str = Field(min_length=1)
    log_interval: Positive
    log_model: bool = True
    registered_model: str | None = Field(min_length=1, default=None)


@dataclass(frozen=True)
class TrackedRun:
    """What MLflow holds of a run: parameters as text, of each metric the last value."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]


def find_runs(params: TrackingParams) -> list[TrackedRun]:
    """All runs of the experiment, the newest first.

    Raises:
        InputError: the store can't be read.
    """
    with _asked(params, "its runs") as (client, experiment):
        found: list[Run] = []
        token: str | None = None
        while token != "":
            page = client.search_runs([experiment], max_results=BATCH, page_token=token)
            found += page
            token = page.token or ""
    return [
        TrackedRun(
            one.info.run_id,
            one.info.run_name,
            one.info.status,
            params=one.data.params,
            tags=one.data.tags,
            metrics=one.data.metrics,
        )
        for one in found
    ]


def artifact_of(params: TrackingParams, name: str, path: Path) -> bytes | None:
    """A file of a run's artifacts, by the run's id or its name; None where there is none.

    Raises:
        InputError: several runs have this name, or the store can't be read.
    """
    with _asked(params, name) as (client, experiment):
        quote = "'" if '"' in name else '"'
        named = f"attributes.run_name = {quote}{name}{quote}"
        run = find_run(client, name) if re.fullmatch("[0-9a-f]{32}", name) else None
        runs = [run] if run else client.search_runs([experiment], named)
        held = {one.info.run_id: _artifact(client, one.info.run_id, path) for one in runs}
    found = {one: content for one, content in held.items() if content is not None}
    if len(found) > 1:
        raise InputError(
            f"{len(found)} MLflow runs are called {name}; name one by its id: {', '.join(found)}"
        )
    return next(iter(found.values()), None)


@contextmanager
def _asked(params: TrackingParams, what: str) -> "Iterator[tuple[MlflowClient, str]]":
    """A client and the experiment's id, to ask for something; what fails is an InputError."""
    try:
        with brief_requests():
            connected = connect(params)
        yield connected
    except Exception as error:
        raise InputError(f"MLflow can't be asked for {what}: {one_line(error)}") from None


def _artifact(client: "MlflowClient", run_id: str, path: Path) -> bytes | None:
    listed = client.list_artifacts(run_id, path.parent.as_posix())
    if path.as_posix() not in {one.path for one in listed}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path.as_posix(), folder)).read_bytes()


class Tracker:
    """Tracks nothing: for every rank but the first, and where there is no MLflow store."""

    run_id: str | None = None

    def log(self, entry: HistoryEntry) -> None:
        """Send {"iteration": step, <metric>: value, ...} soon; values of None are left out."""

    def log_picture(self, step: int, name: str, layers: Sequence[Array], colours: Colours) -> None:
        """Send an image (H,W,3), its target and its prediction (H,W) as one picture of a step."""

    def log_artifacts(self, paths: Iterable[Path], folder: str) -> None:
        """Copy files, and the content of folders, into a folder of the run's artifacts."""

    def log_table(self, path: Path, folder: str) -> None:
        """Copy a file of tab-separated values into a folder, as JSON that MLflow shows as a table.

        A row is one of the file, under its first line's names.
        """

    def log_result(self, score: float, tags: Mapping[str, str], text: str) -> None:
        """Put an evaluation's score before the run's name, and `text`, Markdown, on its page.

        MLflow's table of runs shows no metric until one asks for it.
        """

    def finish(self, status: str) -> None:
        """Send what is left, and end the run with this status: FINISHED, FAILED or KILLED.

        Says in one line of the log what the store did not take.
        """


class MlflowTracker(Tracker):
    """Tracks into one MLflow run. Points it already holds are not sent again.

    `run` is the run as the store has it now, `describe` tells the store what the run is about. A
    training's tracker also samples the machine's load, and ends the run.
    """

    def __init__(
        self, client: "MlflowClient", run: "Run", describe: Callable[[], None], training: bool
    ) -> None:
        self.run_id: str = run.info.run_id
        self._name: str = run.info.run_name
        self._client = client
        self._descriptions: list[Callable[[], object]] = [describe]
        self._training = training
        # Of each metric the last step that the run holds; all its steps, where that is too little.
        self._last = {point.key: int(point.step) for point in run.data.to_proto().metrics}
        self._steps: dict[str, set[int]] = {}
        self._waiting: list[Metric] = []  # what the store has not taken yet
        self._undrawn: list[tuple[int, str, Callable[[], Array]]] = []
        self._drawn: set[tuple[str, int]] | None = None  # names and steps of the run's pictures
        self._lost_files = 0
        self._trouble, self._file_trouble = "", ""  # why the store has refused something
        self._status: str | None = None  # which is to be told, and the one that has been
        self._told: str | None = None
        self._deadline: float | None = None  # set by `finish`
        self._news = threading.Event()
        self._reporting = threading.Lock()
        self._reported = False
        self._monitor = _sample_load(client, run) if training else None
        self._load_ended = training and self._monitor is None
        self._thread = threading.Thread(target=self._tell_all, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, entry: HistoryEntry) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(metric_name(curve), float(value), now, entry["iteration"])
            for name, value in entry.items()
            if (curve := curve_of(name)) and value is not None
        ]
        if self._deadline is None:  # else a signal has ended the run already
            self._waiting += points
            self._news.set()

    def _tell_all(self) -> None:
        """The thread: tell the store all that is logged, until the end or its deadline."""
        while True:
            deadline = self._deadline
            self._tell()
            if deadline and (not self._missing() or time.monotonic() > deadline):
                break
            if self._trouble:
                time.sleep(RETRY)
            elif not deadline:
                self._news.wait()
            self._news.clear()
        if self._monitor is not None:
            process = self._monitor._process
            self._load_ended = process is None or not process.is_alive()
            self._monitor.finish()

    def _tell(self) -> None:
        """Try to tell the store each thing that it lacks."""
        problem = None
        told = (self._tell_description, self._tell_points, self._tell_pictures, self._tell_end)
        for tell in told:
            try:
                tell()
            except Exception as error:  # a broken store must not end a training
                problem = error
        if problem and not self._trouble:
            log.warning("MLflow refuses what is logged, which waits: %s", one_line(problem))
        elif self._trouble and not problem:
            log.info("MLflow has taken what waited")
        self._trouble = one_line(problem) if problem else ""

    def _tell_description(self) -> None:
        while self._descriptions:
            self._descriptions[0]()
            del self._descriptions[0]

    def _tell_points(self) -> None:
        """Send points in the order in which they were logged: a kill leaves the first of them.

        A database takes each batch whole or not at all.
        """
        while count := min(len(self._waiting), BATCH):
            batch = [point for point in self._waiting[:count] if self._is_new(point)]
            self._client.log_batch(self.run_id, metrics=batch)
            for point in batch:
                self._last[point.key] = max(point.step, self._last.get(point.key, point.step))
                self._steps.get(point.key, set()).add(point.step)
            del self._waiting[:count]

    def _tell_pictures(self) -> None:
        """Send pictures, those that the run lacks: an earlier attempt may have sent some."""
        while self._undrawn:
            step, name, draw = self._undrawn[0]
            if self._drawn is None:
                held = self._client.list_artifacts(self.run_id, PICTURES)
                # How MLflow calls them: images/NAME+step+STEP+timestamp+...
                parts = [Path(file.path).name.split("+") for file in held]
                self._drawn = {(one[0], int(one[2])) for one in parts if len(one) > 2}
            if (name, step) not in self._drawn:
                self._client.log_image(self.run_id, draw(), key=name, step=step)
                self._drawn.add((name, step))
            del self._undrawn[0]

    def _is_new(self, point: "Metric") -> bool:
        """Whether the run lacks this point, by as few requests as possible.

        Since points arrive in order, those after a metric's last step are missing. Those before it
        are there, if all attempts at a training log the metric at the same steps. Of other metrics,
        which are few, the store is asked for all steps, once.
        """
        last = self._last.get(point.key)
        if last is None or point.step > last:
            return True
        if point.key.startswith(SCORES):
            return False
        if point.key not in self._steps:
            history = self._client.get_metric_history(self.run_id, point.key)
            self._steps[point.key] = {held.step for held in history}
        return point.step not in self._steps[point.key]

    def _tell_end(self) -> None:
        status = self._status
        if self._training and status != self._told:
            self._client.set_terminated(self.run_id, status)
            self._told = status

    def _missing(self) -> list[str]:
        """What the store has not taken and may still take, in words."""
        missing = [f"{len(self._waiting)} points"] if self._waiting else []
        missing += [f"{len(self._undrawn)} pictures"] if self._undrawn else []
        if self._descriptions:
            missing.append("its parameters and tags")
        if self._training and self._status != self._told:
            missing.append("its end")
        return missing

    def log_picture(self, step: int, name: str, layers: Sequence[Array], colours: Colours) -> None:
        if self._deadline is None:
            key = re.sub(r"[^a-zA-Z0-9_\-. ]", "_", name)[-100:]  # what MLflow takes
            image, target, prediction = layers
            drawing = partial(panel, image, target, prediction, colours)
            self._undrawn.append((step, key, drawing))
            self._news.set()

    def log_table(self, path: Path, folder: str) -> None:
        with path.open(newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file, delimiter="\t")
        content = {"columns": columns, "data": [[_number(cell) for cell in row] for row in rows]}
        with tempfile.TemporaryDirectory() as made:
            table = Path(made) / f"{path.stem}.json"
            table.write_text(json.dumps(content), encoding="utf-8")
            self.log_artifacts([table], folder)
        shown = {"path": f"{folder}/{path.stem}.json", "type": "table"}
        self._set_tag(TABLES_TAG, json.dumps([shown]))

    def log_result(self, score: float, tags: Mapping[str, str], text: str) -> None:
        for name, value in {**tags, "mlflow.note.content": text}.items():
            self._set_tag(name, value)
        bare = re.sub(r"\A\d\.\d{4} ", "", self._name)
        self._later(partial(self._client.update_run, self.run_id, name=f"{score:.4f} {bare}"))

    def _set_tag(self, name: str, value: str) -> None:
        self._later(partial(self._client.set_tag, self.run_id, name, value))

    def _later(self, describe: Callable[[], object]) -> None:
        self._descriptions.append(describe)
        self._news.set()

    def log_artifacts(self, paths: Iterable[Path], folder: str) -> None:
        for path in paths:
            copy = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            try:
                if not self._lost_files:  # a store that has failed once would only cost more time
                    copy(self.run_id, str(path), folder)
                    continue
            except Exception as error:
                self._file_trouble = one_line(error)
            self._lost_files += sum(file.is_file() for file in (path, *path.rglob("*")))

    def finish(self, status: str) -> None:
        if self._status != "KILLED":  # an error may follow: a rank has lost the others
            self._status = status
        patience = HASTE if self._status == "KILLED" else PATIENCE
        self._deadline = time.monotonic() + patience
        self._news.set()
        self._thread.join(patience + SPARE)
        with self._reporting:  # a signal's thread and the main one may both be here
            missing = self._missing()
            if self._lost_files:
                missing.append(f"{self._lost_files} files")
            if self._load_ended:
                missing.append("the rest of the machine's load")
            if missing and not self._reported:
                reason = self._trouble or self._file_trouble or "no answer in time"
                log.warning("MLflow's run %s lacks %s: %s", self.run_id, ", ".join(missing), reason)
            self._reported = True


@contextmanager
def tracked(tracker: Tracker) -> Iterator[None]:
    """Do the work of a `with` block, and end the tracker's run as the work ends.

    FINISHED where the block ends, KILLED where a signal has ended it, FAILED by anything else.
    """
    try:
        yield
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise
    else:
        tracker.finish("FINISHED")


def open_training_run(
    params: TrackingParams,
    run_id: str | None,
    remember: Callable[[str], None],
    name: str,
    parameters: dict[str, Any],
    tags: dict[str, str],
    dataset: tuple[str, str, str],
) -> Tracker:
    """Continue the run, if the store has it, or open a new one and have it remembered at once.

    dataset: its name, its md5 and where it lies. Where the store fails, the result tracks nothing.
    """
    try:
        with brief_requests():
            client, experiment = connect(params)
            run = find_run(client, run_id)
            if run is None:
                run = client.create_run(experiment, run_name=name)
                remember(run.info.run_id)
            else:
                _continue(client, run, name, tags)
    except Exception as error:
        return _untracked(error)
    describe = partial(_describe, client, run, parameters, tags, dataset)
    return MlflowTracker(client, run, describe, training=True)


def open_evaluation_run(
    params: TrackingParams,
    run_id: str | None,
    fingerprint: str,
    name: str,
    parameters: dict[str, Any],
    tags: dict[str, str],
    dataset: tuple[str, str, str],
) -> Tracker:
    """The run that holds this evaluation's scores.

    The training's own for its first evaluation; for any other, and where the store lacks that run,
    one below it. Where the store fails, the result tracks nothing.
    """
    try:
        with brief_requests():
            client, experiment = connect(params)
            run = find_run(client, run_id)
            if run is None or run.data.tags.get(EVALUATION_TAG) not in (None, fingerprint):
                run = _evaluation_run(
                    client, experiment, parent=run_id, fingerprint=fingerprint, name=name
                )
    except Exception as error:
        return _untracked(error)
    tags = tags | {EVALUATION_TAG: fingerprint}
    describe = partial(_describe, client, run, parameters, tags, dataset)
    return MlflowTracker(client, run, describe, training=False)


def _evaluation_run(
    client: "MlflowClient", experiment: str, parent: str | None, fingerprint: str, name: str
) -> "Run":
    """The run of its own that holds this evaluation's scores, created where the store lacks it."""
    mine = f"tags.{EVALUATION_TAG} = '{fingerprint}'"
    mine += f" and tags.`{PARENT_TAG}` = '{parent}'" if parent else ""
    same = client.search_runs([experiment], mine, max_results=1)
    if same:
        return same[0]
    tags = {PARENT_TAG: parent} if parent else {}
    run = client.create_run(experiment, run_name=name, tags=tags | {EVALUATION_TAG: fingerprint})
    client.set_terminated(run.info.run_id)
    return run


def curve_of(name: str) -> str | None:
    """What a number of the history is called in MLflow, whose page of charts it must not crowd.

    Of the scores of single classes the IoU alone is there, apart from the others; how fast the
    training is stands beside the machine's load.
    """
    if name == "iteration":
        return None
    section, _, score = name.partition("/")
    if section == "time":  # beside the machine's load, on a page of its own
        return f"system/{score}"
    kind, dot, of = score.partition(".")
    if not dot:
        return name
    return f"{section}/{kind}/{of}" if kind == "iou" else None


def metric_name(name: str) -> str:
    """The name as MLflow takes it: another for every other name, and most of them unchanged.

    A character that MLflow refuses becomes its number between colons, `a|b` -> `a:7c:b`; so do a
    colon, and slashes and dots where MLflow, which takes a name for a path, refuses the path:
    `/a`, `a//b`, `a/`, `a/../b`. Of a name that is too long, the end becomes the md5 of the whole.
    """
    refused = r"[^\w\-./ ]|(?<![^/])/|/\Z|(?<![^/])\.(?=\.?(?:/|\Z))|\A\.(?=\.)"
    valid = re.sub(refused, lambda found: f":{ord(found[0]):x}:", name) or "::"
    if len(valid) > NAME_LENGTH:
        digest = hashlib.md5(name.encode("utf-8", "surrogatepass")).hexdigest()
        valid = f"{valid[: NAME_LENGTH - len(digest) - 2]}:{digest}:"
    return valid


def _untracked(error: Exception) -> Tracker:
    """The tracker of a stage for which there is no store; says so."""
    missing = isinstance(error, ImportError) and error.name == "mlflow"
    reason = "MLflow is not installed" if missing else f"MLflow can't be used: {one_line(error)}"
    log.warning("this run is tracked nowhere, %s", reason)
    return Tracker()


def _number(cell: str) -> str | float | None:
    """What a table's cell holds: a number, nothing, or text."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def one_line(error: Exception) -> str:
    """An error's message in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


@contextmanager
def brief_requests() -> Iterator[None]:
    """Within the block wait for seconds, not minutes, for a server that does not answer.

    After it MLflow's own time limit counts again, since a server needs its time for a large file.
    MLflow's variables of the environment, where they are set, are left as they are.
    """
    limit = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # within about five seconds
    given = os.environ.get(limit)
    os.environ.setdefault(limit, str(ANSWER))
    try:
        yield
    finally:
        if given is None:
            del os.environ[limit]


def connect(params: TrackingParams) -> "tuple[MlflowClient, str]":
    """A client of the store, and the experiment's id there.

    Raises:
        TimeoutError: it took longer than OPENING.
    """
    answers: queue.SimpleQueue[tuple[MlflowClient, str] | Exception] = queue.SimpleQueue()

    def answer_once() -> None:
        try:
            answers.put(_open_store(params))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=answer_once, name="mlflow-open", daemon=True).start()
    try:
        answer = answers.get(timeout=OPENING)
    except queue.Empty:
        raise TimeoutError(
            f"no answer in {OPENING:g} s; MLFLOW_TRACKING_URI, or tracking.uri, names the store"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _open_store(params: TrackingParams) -> "tuple[MlflowClient, str]":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reports its use to its makers
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from filelock import FileLock
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow", "urllib3"):  # they tell in many lines what we say in one
        logging.getLogger(name).setLevel(logging.CRITICAL)
    folder = main_checkout() / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "instep-mlflow.lock"):  # two can't create the tables at once
        client = MlflowClient(_store_uri(params))
        return client, _experiment(client, params)


def _store_uri(params: TrackingParams) -> str:
    """MLFLOW_TRACKING_URI, else tracking.uri, else mlflow.db in the main checkout.

    A relative path is one below the main checkout: a temporary workspace vanishes with its files.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.uri or "sqlite:///mlflow.db"
    relative = re.match(r"sqlite:///(?!/)(.+)", uri)
    return f"sqlite:///{main_checkout() / relative[1]}" if relative else uri


def _experiment(client: "MlflowClient", params: TrackingParams) -> str:
    """The id of the experiment, created where the store lacks it."""
    own = client.tracking_uri == f"sqlite:///{main_checkout() / 'mlflow.db'}"
    location = (main_checkout() / "mlartifacts").as_uri() if own else None
    found = client.get_experiment_by_name(params.experiment)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if location and found.artifact_location != location:
            log.warning(
                "MLflow's experiment %s keeps its files in %s, where this repository was when it "
                "was made; for new runs to keep them here, set tracking.experiment to another name",
                params.experiment,
                found.artifact_location,
            )
        return str(found.experiment_id)
    return str(client.create_experiment(params.experiment, location, EXPERIMENT_TAGS))


def find_run(client: "MlflowClient", run_id: str | None) -> "Run | None":
    """A run by its id; None where the store lacks it, or has it as deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _continue(client: "MlflowClient", run: "Run", name: str, tags: dict[str, str]) -> None:
    """Open a run again, under the name of the DVC experiment that goes on with it.

    Within one experiment the run keeps its name: a user may have given it another.
    """
    held = run.data.tags
    moved = held.get("dvc.exp_name") != tags.get("dvc.exp_name")
    client.update_run(run.info.run_id, status="RUNNING", name=name if moved else None)
    for stale in (DVC_TAGS.keys() & held.keys()) - tags.keys():
        client.delete_tag(run.info.run_id, stale)


def _sample_load(client: "MlflowClient", run: "Run") -> Any:
    """A thread of MLflow's that sends the machine's load, or None where it can't be started."""
    try:
        from mlflow.system_metrics import system_metrics_monitor

        untyped: Any = system_metrics_monitor.SystemMetricsMonitor
        again = bool(run.data.metrics)
        monitor = untyped(run.info.run_id, resume_logging=again, tracking_uri=client.tracking_uri)
        monitor.start()
    except Exception as error:
        log.warning("MLflow can't sample the machine's load: %s", one_line(error))
        return None
    return monitor


def _describe(
    client: "MlflowClient",
    run: "Run",
    parameters: dict[str, Any],
    tags: dict[str, str],
    dataset: tuple[str, str, str],
) -> None:
    """Log what the run does not hold yet: MLflow refuses another value for a parameter it has."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

    new = [
        Param(metric_name(name), str(value)[:6000])  # the most that MLflow takes
        for name, value in parameters.items()
        if metric_name(name) not in run.data.params
    ]
    client.log_batch(run.info.run_id, params=new, tags=[RunTag(*tag) for tag in tags.items()])
    if run.inputs is None or not run.inputs.dataset_inputs:
        name, md5, source = dataset
        described = Dataset(name=name, digest=md5, source_type="local", source=source)
        context = InputTag("mlflow.data.context", "training")
        client.log_inputs(run.info.run_id, [DatasetInput(described, [context])])
