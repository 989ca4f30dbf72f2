"""From a spool to MLflow: in order, each thing once, whatever the server or this process does.

A record is marked as taken after MLflow has answered. What was sent when no answer came is sent
again: MLflow is asked first which runs and points it has, and anything else may come twice.
"""

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from pipeline.errors import counted, one_line
from pipeline.provenance import DVC_TAGS
from pipeline.tracking.names import metric_name
from pipeline.tracking.spool import (
    DAMAGED,
    Mark,
    Record,
    Session,
    Spool,
    Start,
    all_spools,
    undamaged,
)
from pipeline.tracking.store import (
    BATCH,
    EVALUATION_TAG,
    KEY_TAG,
    PARENT_TAG,
    USER_TAG,
    Patience,
    connect,
    find_run,
    user,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run, RunTag

log = logging.getLogger("instep")

# Every training of a fingerprint has these metrics at the same steps, and saves its state before
# it goes on from such a step; which others there are depends on tracking.log_interval.
SCORES = ("val/", "val_final/", "test/")
ENDED_TAG = "ended"  # why a run was killed
VALUE_LENGTH = 6000  # the longest value of a parameter that MLflow takes
KEPT_DAYS = 30  # what MLflow has of an unfinished training is kept here for so long


@dataclass
class Target:
    """The run that a session goes to, as MLflow had it when it was asked, and what it got since.

    `last` is each metric's last step, `held` are all steps that the run had, of metrics that were
    asked for, and `added` those that it got.
    """

    run: "Run"
    new: bool
    last: dict[str, int] = field(default_factory=dict)
    held: dict[str, set[int]] = field(default_factory=dict)
    added: dict[str, set[int]] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """MLflow's."""
        return str(self.run.info.run_id)


class Delivery:
    """Tells MLflow what a spool holds.

    Whoever calls `send` holds the spool's lock. `own` is the session that this process writes;
    those that other processes write are left to them. `uri` is that of the store; without it each
    session goes where it was meant for.
    """

    def __init__(self, spool: Spool, own: Session | None = None, uri: str | None = None) -> None:
        self.run_id: str | None = None  # of the run that `own` goes to
        self._spool = spool
        self._own = own
        self._uri = uri
        self._stores: dict[tuple[str, str], tuple[MlflowClient, str]] = {}
        self._targets: dict[Path, Target] = {}
        self._damaged: set[Path] = set()  # sessions of which that is said

    def send(self) -> bool:
        """Send the next records; says whether there were any.

        Raises:
            Exception: whatever MLflow raises; nothing is lost, and another `send` tries again.
        """
        try:
            return self._send()
        except Exception:
            self._targets.clear()  # what arrived is not known
            raise

    def _send(self) -> bool:
        sessions = [*self._sessions()]
        # Files last: where they go may be another server, and be away when this one is not.
        return any(map(self._send_words, sessions)) or any(map(self._send_file, sessions))

    def _sessions(self) -> Iterator[Session]:
        """Those to be sent from here, in order.

        Raises:
            TimeoutError: an attempt at the training, before that of this process, has not ended.
        """
        for session in self._spool.sessions():
            if (self._own is not None and session.path == self._own.path) or not session.live:
                yield session
            elif session.of_training and self._own is not None:
                raise TimeoutError("an earlier attempt at the training is still ending")

    def _send_words(self, session: Session) -> bool:
        """Send a session's next records that are no files; says whether there were any."""
        mark = session.mark
        batch = list(_batch(session, mark))
        if not batch:
            return False
        if (start := self._start(session)) is None:
            return True
        if (target := self._target(session, start)) is None:
            return True  # all sessions are to be told anew
        words = [record for record in batch if record.kind not in (DAMAGED, "file")]
        numbers = [record.number for record in batch if record.kind != DAMAGED]
        if [*range(mark.number, mark.number + len(batch))] != numbers:
            self._say_damaged(session)
        if words:
            self._tell(start, target, words)
        end = batch[-1].end
        files = mark.files
        if files == mark.position and all(record.kind != "file" for record in batch):
            files = end
        status = next((w.content["status"] for w in words if w.kind == "end"), mark.status)
        session.set_mark(Mark(end, files, max([mark.number - 1, *numbers]) + 1, status))
        return True

    def _send_file(self, session: Session) -> bool:
        """Send a session's next file; says whether there was one."""
        mark = session.mark
        files = [record for record in session.pending() if record.kind in ("file", DAMAGED)]
        if not files:
            return False
        if (start := self._start(session)) is None:
            return True
        if (target := self._target(session, start)) is None:
            return True  # all sessions are to be told anew
        record = files[0]
        if record.kind == "file":
            self._tell_file(start, target, session, record)
        else:
            self._say_damaged(session)
        end = record.end if files[1:] else max(record.end, mark.position)
        session.set_mark(mark._replace(files=end))
        return True

    def _tell_file(self, start: Start, target: Target, session: Session, record: Record) -> None:
        client, _ = self._store(start)
        content = record.content
        kept = session.files / content["file"]
        if not undamaged(kept, content["crc"]):
            log.warning("%s is damaged: MLflow does not get %s", kept, content["name"])
            return
        with _unless_refused(client, target.run_id, content["name"]):
            _log_file(client, target.run_id, kept, content)

    def _start(self, session: Session) -> Start | None:
        """What a session is about; one of which that can't be known is never sent."""
        if (start := session.start) is None:
            log.warning("%s is damaged at its start: MLflow can't be told of it", session.path)
            session.set_aside()
        return start

    def _say_damaged(self, session: Session) -> None:
        if session.path not in self._damaged:
            log.warning("%s is damaged: MLflow is not told all that it held", session.path)
        self._damaged.add(session.path)

    def _store(self, start: Start) -> "tuple[MlflowClient, str]":
        uri, experiment = self._uri or start["uri"], start["experiment"]
        if (uri, experiment) not in self._stores:
            self._stores[uri, experiment] = connect(uri, experiment)
        return self._stores[uri, experiment]

    def _target(self, session: Session, start: Start) -> Target | None:
        """The run that a session goes to, created where it is not there."""
        if session.path in self._targets:
            return self._targets[session.path]
        client, experiment = self._store(start)
        if start["evaluation"] is not None:
            run, new = self._evaluation_run(client, experiment, start, start["evaluation"]), False
        else:
            found = find_run(client, experiment, None, self._spool.key)
            if found is None and self._rewound():
                return None
            tags = {KEY_TAG: self._spool.key, USER_TAG: user()}
            run = found or client.create_run(experiment, start["time"], tags, start["name"])
            new = found is None
        _remove_half_files(run)
        last = {point.key: int(point.step) for point in run.data.to_proto().metrics}
        target = self._targets[session.path] = Target(run, new, last)
        if self._own and session.path == self._own.path:
            self.run_id = target.run_id
        return target

    def _rewound(self) -> bool:
        """The run has vanished from MLflow: all that is here is told again, to a new one."""
        taken = [session for session in self._spool.sessions() if session.mark.number]
        for session in taken:
            session.rewind()
        return bool(taken)

    def _evaluation_run(
        self, client: "MlflowClient", experiment: str, start: Start, fingerprint: str
    ) -> "Run":
        """The training's own for its first evaluation; else, or without that, one below it."""
        run = find_run(client, experiment, start["run_id"], start["training"])
        if run is not None and run.data.tags.get(EVALUATION_TAG) in (None, fingerprint):
            return run
        parent = start["run_id"] if run is None else run.info.run_id
        mine = f"tags.{EVALUATION_TAG} = '{fingerprint}'"
        mine += f" and tags.`{PARENT_TAG}` = '{parent}'" if parent else ""
        same = client.search_runs([experiment], mine, max_results=1)
        tags = {EVALUATION_TAG: fingerprint, USER_TAG: user()}
        tags |= {PARENT_TAG: parent} if parent else {}
        own = same[0] if same else client.create_run(experiment, start["time"], tags, start["name"])
        if own.info.status == "RUNNING":
            client.set_terminated(own.info.run_id, end_time=start["time"])
        return own

    def _tell(self, start: Start, target: Target, words: Sequence[Record]) -> None:
        """Send one record, or points and tags."""
        from mlflow.entities import RunTag

        client, _ = self._store(start)
        kind, content = words[0].kind, words[0].content
        with _unless_refused(client, target.run_id, f"a {kind}"):
            match kind:
                case "start":
                    self._describe(client, target, start)
                case "points" | "tags":
                    self._tell_points_and_tags(client, target, words)
                case "score":
                    bare = re.sub(r"\A\d\.\d{4} ", "", str(target.run.info.run_name))
                    client.update_run(target.run_id, name=f"{content:.4f} {bare}")
                case "end" if start["evaluation"] is None:
                    if content["reason"]:
                        _log_batch(client, target.run_id, [RunTag(ENDED_TAG, content["reason"])])
                    client.set_terminated(target.run_id, content["status"], content["time"])

    def _describe(self, client: "MlflowClient", target: Target, start: Start) -> None:
        """Say what the run is about, and that it goes on where an attempt before has ended it.

        What it holds already is left out: MLflow refuses another value for a parameter.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        run = target.run
        if not target.new and start["evaluation"] is None:
            _continue(client, run, start["name"], start["tags"])
        named = {metric_name(name): value for name, value in start["params"].items()}
        params = [
            Param(name, value[:VALUE_LENGTH])
            for name, value in named.items()
            if name not in run.data.params
        ]
        tags = [RunTag(*tag) for tag in start["tags"].items()]
        _log_batch(client, target.run_id, [*params, *tags])
        if run.inputs is None or not run.inputs.dataset_inputs:
            name, md5, source = start["dataset"]
            described = Dataset(name=name, digest=md5, source_type="local", source=source)
            context = InputTag("mlflow.data.context", "training")
            client.log_inputs(target.run_id, [DatasetInput(described, [context])])

    def _tell_points_and_tags(
        self, client: "MlflowClient", target: Target, records: Sequence[Record]
    ) -> None:
        from mlflow.entities import Metric, RunTag

        points = [
            Metric(metric, value, record.content["time"], record.content["step"])
            for record in records
            if record.kind == "points"
            for metric, value in record.content["values"].items()
        ]
        new = [point for point in points if _added(client, target, point)]
        told = chain.from_iterable(r.content.items() for r in records if r.kind == "tags")
        _log_batch(client, target.run_id, [*new, *(RunTag(*tag) for tag in told)])


def deliver(spool: Spool, uri: str | None = None) -> bool:
    """Send all of a spool that no process writes; says whether MLflow has taken all.

    False where another process is sending it.

    Raises:
        Exception: whatever MLflow raises.
    """
    with spool.delivered_here() as here:
        if here:
            delivery = Delivery(spool, uri=uri)
            while delivery.send():
                pass
            spool.forget_sent()
    return here


def waiting_spools(uri: str | None = None) -> list[Spool]:
    """Those with something that MLflow has not taken, of one store or of all, the oldest first.

    What was taken of trainings that nobody has gone on with for long is forgotten on the way.
    """
    found = []
    for spool in all_spools():
        sessions = [session for session in spool.sessions() if not session.live]
        unsent = [session for session in sessions if session.unsent]
        starts = [session.start for session in unsent]
        if not unsent and spool.age > KEPT_DAYS:
            with spool.delivered_here() as here:
                if here:
                    for session in sessions:
                        session.remove()
                    spool.forget_sent()
        if any(uri is None or (start and start["uri"] == uri) for start in starts):
            found.append(spool)
    return found


def told_of(spool: Spool) -> str:
    """What waits in a spool, in words."""
    counts: dict[str, int] = {}
    for session in spool.sessions():
        for what, count in session.waiting().items():
            counts[what] = counts.get(what, 0) + count
    numbered = [
        counted(counts.pop(what), what[:-1]) for what in ("points", "files") if what in counts
    ]
    return ", ".join([*numbered, *(f"its {what}" for what in counts)])


def _batch(session: Session, mark: Mark) -> Iterator[Record]:
    """The next records but files that are sent together: points and tags, or a single other one.

    Files and damaged lines between them are there, too.
    """
    count, first = 0, ""
    for record in session.records(mark.position):
        if record.kind not in (DAMAGED, "file"):
            count += len(record.content["values"]) if record.kind == "points" else 1
            kind = "points" if record.kind == "tags" else record.kind
            if first and (kind != first or kind != "points" or count > BATCH):
                return
            first = kind
        yield record


def _added(client: "MlflowClient", target: Target, point: "Metric") -> bool:
    """Add a point to what the run is known to hold; False where it is there already.

    By as few requests as possible: since points arrive in order, those after a metric's last step
    are missing. Those before it are there, if all attempts at a training log the metric at the same
    steps. Of other metrics, which are few, the store is asked for all steps, once.
    """
    added = target.added.setdefault(point.key, set())
    last = target.last.get(point.key)
    if last is not None and point.step <= last:
        if point.key.startswith(SCORES) or point.step in added:
            return False
        if point.key not in target.held:
            history = client.get_metric_history(target.run_id, point.key)
            target.held[point.key] = {held.step for held in history}
        if point.step in target.held[point.key]:
            return False
    target.last[point.key] = point.step if last is None else max(last, point.step)
    added.add(point.step)
    return True


def _log_batch(
    client: "MlflowClient", run_id: str, entities: "Sequence[Metric | Param | RunTag]"
) -> None:
    """Send points, parameters and tags; where MLflow refuses some for what they are, the others."""
    from mlflow.entities import Metric, Param, RunTag

    try:
        client.log_batch(
            run_id,
            metrics=[one for one in entities if isinstance(one, Metric)],
            params=[one for one in entities if isinstance(one, Param)],
            tags=[one for one in entities if isinstance(one, RunTag)],
        )
    except Exception as error:
        if not _refused(client, run_id, error):
            raise
        if len(entities) == 1:
            log.warning("MLflow refuses %s for good: %s", entities[0].key, one_line(error))
            return
        middle = len(entities) // 2
        for half in (entities[:middle], entities[middle:]):
            _log_batch(client, run_id, half)


@contextmanager
def _unless_refused(client: "MlflowClient", run_id: str, what: str) -> Iterator[None]:
    """Tell MLflow something; where it refuses that for good, a warning says so, and all goes on."""
    try:
        yield
    except Exception as error:
        if not _refused(client, run_id, error):
            raise
        log.warning("MLflow refuses %s for good: %s", what, one_line(error))


def _refused(client: "MlflowClient", run_id: str, error: Exception) -> bool:
    """Whether MLflow would refuse the same again, however often: it is no fault of the server's."""
    from mlflow.exceptions import MlflowException

    return (
        isinstance(error, MlflowException)
        and error.error_code == "INVALID_PARAMETER_VALUE"
        and client.get_run(run_id).info.lifecycle_stage == "active"  # of a deleted one it says so
    )


def _log_file(client: "MlflowClient", run_id: str, kept: Path, content: Mapping[str, str]) -> None:
    """Send a file under its own name."""
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder, Patience.for_file(kept):
        named = Path(folder) / content["name"]
        named.symlink_to(kept.resolve())
        client.log_artifact(run_id, str(named), content["folder"] or None)


def _remove_half_files(run: "Run") -> None:
    """Delete what a kill has left of files, where MLflow keeps them here: it would list them."""
    uri = urlsplit(run.info.artifact_uri)
    if uri.scheme == "file":
        for half in Path(unquote(uri.path)).rglob(".artifact.uploading.*"):
            half.unlink(missing_ok=True)


def _continue(client: "MlflowClient", run: "Run", name: str, tags: dict[str, str]) -> None:
    """Open a run again, under the name of the DVC experiment that goes on with it.

    Within one experiment the run keeps its name: a user may have given it another.
    """
    held = run.data.tags
    moved = held.get("dvc.exp_name") != tags.get("dvc.exp_name")
    client.update_run(run.info.run_id, status="RUNNING", name=name if moved else None)
    for stale in ({*DVC_TAGS, ENDED_TAG} & held.keys()) - tags.keys():
        client.delete_tag(run.info.run_id, stale)
