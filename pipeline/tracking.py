"""The only module that talks to MLflow. Logging happens in a thread and never holds up a step.

Whatever a run must hold can be said again without harm: points that MLflow has are not sent a
second time, since it can neither replace nor delete one.
"""

import logging
import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.params import Positive, Section, main_checkout

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("instep")
Entry = dict[str, Any]

EVALUATION_TAG = "evaluation"  # the fingerprint of the evaluation whose scores a run holds
PARENT_TAG = "mlflow.parentRunId"
PATIENCE = 60.0  # seconds that the end of a stage waits for the last points to be sent
RETRY = 1.0


class TrackingParams(Section):
    """The section `tracking`; every key is explained beside it in params.yaml."""

    uri: str | None
    experiment: str = Field(min_length=1)
    log_interval: Positive


class Tracker:
    """Tracks nothing: for every rank but the first, and where MLflow is not installed."""

    run_id: str | None = None

    def log(self, entry: Entry) -> None:
        """Send {"iteration": step, <metric>: value, ...} soon; values of None are left out."""

    def log_artifacts(self, paths: Iterable[Path], folder: str) -> None:
        """Copy files, and the content of folders, into a folder of the run's artifacts."""

    def finish(self, status: str) -> None:
        """Send what is left, and end the run with this status: FINISHED or FAILED."""


class MlflowTracker(Tracker):
    """Tracks into one MLflow run. Points it already holds are not sent again.

    A training's tracker also samples the machine's load, and ends the run.
    """

    def __init__(self, client: "MlflowClient", run_id: str, training: bool) -> None:
        self.run_id: str = run_id
        self._client = client
        self._training = training
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()
        if training:
            from mlflow.system_metrics import system_metrics_monitor

            untyped: Any = system_metrics_monitor.SystemMetricsMonitor
            self._monitor = untyped(run_id, resume_logging=True, tracking_uri=client.tracking_uri)
            self._monitor.start()

    def log(self, entry: Entry) -> None:
        self._entries.put(entry | {"at": int(time.time() * 1000)})

    def _send_all(self) -> None:
        """Send entries as they come; after the last, try for a while what the store refused."""
        waiting: list[Entry] = []
        deadline: float | None = None
        sent: set[tuple[str, int]] | None = None
        while deadline is None or (waiting and time.monotonic() < deadline):
            taken = [self._entries.get()] if deadline is None else []
            while not self._entries.empty():
                taken.append(self._entries.get())
            if None in taken:
                deadline = time.monotonic() + PATIENCE
            waiting += [entry for entry in taken if entry is not None]
            try:
                sent = self._points() if sent is None else sent
                self._send(waiting, sent)
                waiting = []
            except Exception as error:  # a broken store must not end a training
                log.warning("MLflow did not take %d entries: %s", len(waiting), error)
                time.sleep(RETRY)

    def _points(self) -> set[tuple[str, int]]:
        """Metric and step of every point that the run holds."""
        return {
            (key, point.step)
            for key in self._client.get_run(self.run_id).data.metrics
            for point in self._client.get_metric_history(self.run_id, key)
        }

    def _send(self, entries: list[Entry], sent: set[tuple[str, int]]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(metric_name(name), float(value), entry["at"], entry["iteration"])
            for entry in entries
            for name, value in entry.items()
            if name not in ("iteration", "at") and value is not None
        ]
        new = [point for point in points if (point.key, point.step) not in sent]
        for start in range(0, len(new), 1000):  # the most that MLflow takes at once
            batch = new[start : start + 1000]
            self._client.log_batch(self.run_id, metrics=batch)
            sent |= {(point.key, point.step) for point in batch}

    def log_artifacts(self, paths: Iterable[Path], folder: str) -> None:
        try:
            for path in paths:
                copy = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                copy(self.run_id, str(path), folder)
        except Exception as error:
            log.warning("MLflow did not take the artifacts: %s", error)

    def finish(self, status: str) -> None:
        self._entries.put(None)
        self._thread.join(2 * PATIENCE)
        if self._training:
            self._monitor.finish()
            try:
                self._client.set_terminated(self.run_id, status)
            except Exception as error:
                log.warning("MLflow did not take the end of run %s: %s", self.run_id, error)


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

    dataset: its name, its md5 and where it lies.
    """
    client = _connect(params)
    if client is None:
        return Tracker()
    run = _find(client, run_id)
    if run is None:
        run = client.create_run(_experiment(client, params), run_name=name)
        remember(run.info.run_id)
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    _describe(client, run, parameters, tags, dataset)
    return MlflowTracker(client, run.info.run_id, training=True)


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
    one below it.
    """
    client = _connect(params)
    if client is None:
        return Tracker()
    run = _find(client, run_id)
    if run is None or run.data.tags.get(EVALUATION_TAG) not in (None, fingerprint):
        experiment = _experiment(client, params)
        mine = f"tags.{EVALUATION_TAG} = '{fingerprint}'"
        mine += f" and tags.`{PARENT_TAG}` = '{run_id}'" if run_id else ""
        same = client.search_runs([experiment], mine, max_results=1)
        if same:
            run = same[0]
        else:
            parent = {PARENT_TAG: run_id} if run_id else {}
            run = client.create_run(
                experiment, run_name=name, tags=parent | {EVALUATION_TAG: fingerprint}
            )
            client.set_terminated(run.info.run_id)
    _describe(client, run, parameters, tags | {EVALUATION_TAG: fingerprint}, dataset)
    return MlflowTracker(client, run.info.run_id, training=False)


def metric_name(name: str) -> str:
    """A name with only the characters that MLflow allows in one."""
    return re.sub(r"[^\w\-./ :]", "_", name)


def git_tags() -> dict[str, str]:
    """The commit a stage runs on, and whether tracked files differ from it.

    params.yaml and what DVC writes do not count: they are tracked by the run itself.
    """
    status = _git("status", "--porcelain", "--untracked-files=no")
    revision = _git("rev-parse", "HEAD")
    if status is None or revision is None:
        return {}
    own = {"params.yaml", "dvc.lock", "metrics.json"}
    changed = {line[3:] for line in status.splitlines()} - own
    revision = revision.strip()
    return {
        "git.rev": revision,
        "git.dirty": str(bool(changed)).lower(),
        "mlflow.source.git.commit": revision,
    }


def dvc_tags() -> dict[str, str]:
    """Which DVC experiment a stage runs for; empty in a plain `dvc repro`."""
    names = {"dvc.exp_name": "DVC_EXP_NAME", "dvc.baseline_rev": "DVC_EXP_BASELINE_REV"}
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _connect(params: TrackingParams) -> "MlflowClient | None":
    try:
        from mlflow import MlflowClient
    except ImportError:
        log.warning("MLflow is not installed: this run is tracked nowhere")
        return None
    from filelock import FileLock

    for name in ("alembic", "mlflow"):  # a new database tells the story of its tables otherwise
        logging.getLogger(name).setLevel(logging.WARNING)
    folder = main_checkout() / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "instep-mlflow.lock"):  # two can't create the tables at once
            client = MlflowClient(_store_uri(params))
            _experiment(client, params)
    except Exception as error:  # a broken store must not keep a training from its work
        log.warning("MLflow can't be reached, this run is tracked nowhere: %s", error)
        return None
    return client


def _store_uri(params: TrackingParams) -> str:
    """MLFLOW_TRACKING_URI, else tracking.uri, else mlflow.db in the main checkout.

    A relative path is one below the main checkout: a temporary workspace vanishes with its files.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.uri or "sqlite:///mlflow.db"
    relative = re.match(r"sqlite:///(?!/)(.+)", uri)
    return f"sqlite:///{main_checkout() / relative[1]}" if relative else uri


def _experiment(client: "MlflowClient", params: TrackingParams) -> str:
    """The id of the experiment, created where the store lacks it."""
    found = client.get_experiment_by_name(params.experiment)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    local = client.tracking_uri.startswith("sqlite:")
    location = (main_checkout() / "mlartifacts").as_uri() if local else None
    return str(client.create_experiment(params.experiment, location))


def _find(client: "MlflowClient", run_id: str | None) -> "Run | None":
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
