"""MLflow's store: where it is, how long it is waited for, and what it holds of runs."""

import getpass
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from pydantic import Field, field_validator

from pipeline.errors import InputError, one_line
from pipeline.params import Positive, Section, main_checkout

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("instep")

KEY_TAG = "run.key"  # our own name of a training's run, by which it is found again
EVALUATION_TAG = "evaluation"  # the fingerprint of the evaluation whose scores a run holds
INTERVAL_TAG = "mean_iou.interval"  # the ends of the 95% interval of that evaluation's mean IoU
PARENT_TAG = "mlflow.parentRunId"
USER_TAG = "mlflow.user"
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
BATCH = 1000  # the most points that MLflow takes at once

# In seconds.
OPENING = 60.0  # for the store's tables, which another process may be creating
ANSWER = 10  # for one answer of a server
RATE = 1_000_000  # bytes a second at which a server should take a file, at least

CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
CERTIFICATE = "MLFLOW_TRACKING_SERVER_CERT_PATH"
RETRIES, LIMIT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"


class TrackingParams(Section):
    """The section `tracking`; every key is explained beside it in params.yaml."""

    uri: str | None
    experiment: str = Field(min_length=1)
    log_interval: Positive
    log_model: bool = True
    registered_model: str | None = Field(min_length=1, default=None)

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, uri: str | None) -> str | None:
        if uri is not None and uri != without_password(uri):
            raise InputError(
                "holds a user or password, which git and MLflow would keep with params.yaml; leave "
                f"them out here, and set {' and '.join(CREDENTIALS)}, or for a database "
                "MLFLOW_TRACKING_URI"
            )
        return uri


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


def artifact_of(params: TrackingParams, run_id: str, path: Path) -> bytes | None:
    """A file of a run's artifacts; None where there is none.

    Raises:
        InputError: the store can't be read.
    """
    with _asked(params, run_id) as (client, _):
        return _artifact(client, run_id, path) if _active(client, run_id) else None


@contextmanager
def _asked(params: TrackingParams, what: str) -> "Iterator[tuple[MlflowClient, str]]":
    """A client and the experiment's id, to ask for something; what fails is an InputError."""
    try:
        with brief_requests():
            connected = connect(store_uri(params), params.experiment)
        yield connected
    except Exception as error:
        raise InputError(f"MLflow can't be asked for {what}: {reason(error)}") from None


def _artifact(client: "MlflowClient", run_id: str, path: Path) -> bytes | None:
    listed = client.list_artifacts(run_id, path.parent.as_posix())
    if path.as_posix() not in {one.path for one in listed}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path.as_posix(), folder)).read_bytes()


@contextmanager
def brief_requests() -> Iterator[None]:
    """Within the block wait for seconds, not minutes, for a server that does not answer.

    After it MLflow's own time limit counts again, since a server needs its time for a large file.
    MLflow's variables of the environment, where they are set, are left as they are.
    """
    os.environ.setdefault(RETRIES, "2")  # within about five seconds
    given = os.environ.get(LIMIT)
    os.environ.setdefault(LIMIT, str(ANSWER))
    try:
        yield
    finally:
        if given is None:
            del os.environ[LIMIT]


class Patience:
    """How long this process waits for an answer: ANSWER, and longer for one to a large file.

    A request is never sent again by itself: a server may have done what it did not answer to, and
    would do it twice. MLflow knows the limits of the environment alone.
    """

    _given: str | None = None
    _lock = threading.Lock()

    @classmethod
    def begin(cls) -> None:
        """From now on wait so; a limit that a user has set is kept."""
        os.environ[RETRIES] = "0"
        if cls._given is None:
            cls._given = os.environ.setdefault(LIMIT, str(ANSWER))

    @classmethod
    @contextmanager
    def for_file(cls, path: Path) -> Iterator[None]:
        """Within the block wait as long as the file may take."""
        assert cls._given is not None
        with cls._lock:
            os.environ[LIMIT] = str(int(cls._given) + path.stat().st_size // RATE)
            try:
                yield
            finally:
                os.environ[LIMIT] = cls._given


def quiet() -> None:
    """Have MLflow print nothing, report its use to nobody, and talk to its server alone.

    It would take large files to the server's bucket itself, which may be out of reach from here.
    """
    for name, value in (
        ("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false"),
        ("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
    ):
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  # which sets the levels of its loggers

    for name in ("alembic", "mlflow", "urllib3"):  # they tell in many lines what we say in one
        logging.getLogger(name).setLevel(logging.CRITICAL)


def connect(uri: str, experiment: str) -> "tuple[MlflowClient, str]":
    """A client of the store, and the experiment's id there.

    Raises:
        TimeoutError: another process has been creating the tables for OPENING.
    """
    quiet()
    from mlflow import MlflowClient

    if uri.startswith("http"):
        client = MlflowClient(uri)
        return client, _experiment(client, experiment)
    folder = main_checkout() / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "instep-mlflow.lock", timeout=OPENING):  # two can't create them
            _create(uri)
            client = MlflowClient(uri)
            return client, _experiment(client, experiment)
    except Timeout:
        raise TimeoutError(
            f"another process has had {folder / 'instep-mlflow.lock'} for {OPENING:g} s"
        ) from None


def _create(uri: str) -> None:
    """Make the tables of a new SQLite file beside its place: MLflow can't mend half of them.

    That is what a kill in these seconds would leave.
    """
    from mlflow import MlflowClient

    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or "?" in uri or path.exists():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    for left in path.parent.glob(f"{temporary.name}*"):  # of an earlier kill, with its journal
        left.unlink()
    MlflowClient(f"sqlite:///{temporary}")
    temporary.replace(path)


def store_uri(params: TrackingParams) -> str:
    """MLFLOW_TRACKING_URI, else tracking.uri, else mlflow.db in the main checkout.

    A relative path is one below the main checkout: a temporary workspace vanishes with its files.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or params.uri or "sqlite:///mlflow.db"
    relative = re.match(r"sqlite:///(?!/)(.+)", uri)
    return f"sqlite:///{main_checkout() / relative[1]}" if relative else uri


def user() -> str:
    """Who logs: the name that a server asks for, or else that of the system."""
    from mlflow.utils.credentials import read_mlflow_creds

    named = read_mlflow_creds().username
    try:
        return named or getpass.getuser()
    except (KeyError, OSError):  # the system knows no name, as in a container
        return "unknown"


def reason(error: Exception) -> str:
    """Why MLflow has not done what was asked for, in one line."""
    import requests

    link: BaseException | None = error
    while link is not None:
        if _refuses_user(link):
            return "user or password are wrong or missing: set " + " and ".join(CREDENTIALS)
        if isinstance(link, requests.exceptions.SSLError):
            return f"its certificate is not trusted here, see {CERTIFICATE}: {one_line(link)}"
        if isinstance(link, requests.exceptions.Timeout):
            return "no answer in time"
        if isinstance(link, requests.exceptions.ConnectionError):
            return "no connection"
        link = link.__cause__ or link.__context__
    return without_password(one_line(error))


def _refuses_user(error: BaseException) -> bool:
    """Whether a server has answered with status 401, to a request of MLflow's or with a file."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, requests.exceptions.HTTPError) and error.response is not None:
        return error.response.status_code == 401
    return isinstance(error, MlflowException) and error.error_code == "UNAUTHENTICATED"


def without_password(text: str) -> str:
    """A URI, or a message with some, as it may be shown and kept: without user and password."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _experiment(client: "MlflowClient", name: str) -> str:
    """The id of the experiment, created where the store lacks it."""
    own = client.tracking_uri == f"sqlite:///{main_checkout() / 'mlflow.db'}"
    location = (main_checkout() / "mlartifacts").as_uri() if own else None
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if location and found.artifact_location != location:
            log.warning(
                "MLflow's experiment %s keeps its files in %s, where this repository was when it "
                "was made; for new runs to keep them here, set tracking.experiment to another name",
                name,
                found.artifact_location,
            )
        return str(found.experiment_id)
    return str(client.create_experiment(name, location, EXPERIMENT_TAGS))


def find_run(
    client: "MlflowClient", experiment: str, run_id: str | None, key: str | None
) -> "Run | None":
    """A training's run by its id, or else by its key; None where the store lacks it."""
    run = _active(client, run_id) if run_id else None
    if run is None and key:
        found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        run = found[0] if found else None
    return run


def _active(client: "MlflowClient", run_id: str) -> "Run | None":
    """A run by its id; None where the store lacks it, or has it as deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None
