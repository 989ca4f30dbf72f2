"""What a stage has MLflow told of its run. No failure of MLflow's ends or delays a stage.

All goes to a spool on disk first, and from there to MLflow, by a thread.
"""

import csv
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.data.table import Array
from pipeline.errors import Interrupted, one_line
from pipeline.evaluation.metrics import HistoryEntry
from pipeline.evaluation.report import panel, png
from pipeline.tracking.delivery import Delivery, deliver, told_of, waiting_spools
from pipeline.tracking.load import sample_load
from pipeline.tracking.names import curve_of, metric_name
from pipeline.tracking.spool import Spool, Start, began, new_key, valid
from pipeline.tracking.store import (
    EVALUATION_TAG,
    Patience,
    TrackingParams,
    quiet,
    reason,
    store_uri,
    without_password,
)

log = logging.getLogger("instep")
Colours = Mapping[str, Sequence[int]]  # of each class, by its name

PICTURES = "images"  # the folder of artifacts that MLflow shows as a grid, by steps
TABLES_TAG = "mlflow.loggedArtifacts"  # by which MLflow knows that a file is a table
PICTURES_TAG = "mlflow.loggedImages"  # and that there are pictures
THUMBNAIL = 256  # pixels of the longer side of what MLflow shows of a picture first

# All in seconds.
OPENING = 3.0  # a training's start waits no longer for its run to be opened
PATIENCE = 60.0  # a stage's end waits no longer for MLflow to take the rest
HASTE = 5.0  # nor so long where MLflow takes nothing, or after a signal: SIGKILL may follow
RETRY, LONGEST_RETRY = 1.0, 10.0  # from one try to the next: each time twice as long
GATHERING = 0.5  # what is logged within it is sent together
MOMENT = 0.05
SYNC = "python -m stages.runs --sync"


class Tracker:
    """Tracks nothing: for every rank but the first, and where there is no MLflow store."""

    key: str | None = None  # our own name of a training's run, by which it is found again

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, if MLflow has given it one by now."""
        return None

    def wait(self, seconds: float) -> None:
        """Until MLflow has opened the run or refused to, but no longer than this."""

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

    def finish(self, status: str, reason: str | None = None) -> None:
        """End the run with this status, FINISHED, FAILED or KILLED, and wait a while for MLflow.

        Says in one line of the log what MLflow has not taken, and how to send it. `reason` becomes
        a tag of a run that was killed. The first status counts: an error may follow a signal, since
        a rank has lost the others.
        """


class MlflowTracker(Tracker):
    """Tracks into one MLflow run, by way of a spool.

    A training's tracker also samples the machine's load, and ends the run.
    """

    def __init__(self, spool: Spool, start: Start, uri: str) -> None:
        training = start["evaluation"] is None
        self.key = spool.key if training else None
        # What an attempt before this one has said: it is replayed from the state.
        self._logged = spool.points() if training else set()
        self._spool, self._uri = spool, uri
        self._writer = spool.begin(start)
        self._delivery = Delivery(spool, self._writer.session, uri)
        self._trouble = ""  # why MLflow has not taken something, as long as that is so
        self._news, self._settled = threading.Event(), threading.Event()
        self._ended, self._done, self._given_up = (threading.Event() for _ in range(3))
        self._ending, self._said = threading.Lock(), False
        self._others = threading.Thread(target=self._send_others, name="mlflow-others", daemon=True)
        threading.Thread(target=self._send_all, name="mlflow", daemon=True).start()
        if training:
            threading.Thread(target=self._sample, name="load", daemon=True).start()

    @property
    def run_id(self) -> str | None:
        self._settled.wait(PATIENCE)
        return self._delivery.run_id

    def wait(self, seconds: float) -> None:
        self._settled.wait(seconds)

    def _send_all(self) -> None:
        """The thread: send what the spool holds, until the end."""
        pause = RETRY
        while not self._done.is_set() and not self._given_up.is_set():
            with self._spool.delivered_here() as here:
                if here:  # else another process is sending what an earlier attempt has left
                    pause = self._send_here(pause)
            if not self._done.is_set():
                self._news.wait(pause if here and not self._ended.is_set() else RETRY)
                self._news.clear()
        self._writer.close()

    def _send_here(self, pause: float) -> float:
        """Send until all is sent, or MLflow takes nothing: then for how long to leave it alone."""
        while True:
            ended = self._ended.is_set()
            try:
                sent = self._delivery.send()
            except Exception as error:  # a broken store must not end a training
                self._say_trouble(reason(error))
                return min(2 * pause, LONGEST_RETRY)
            if self._trouble:
                log.info("MLflow has taken what waited")
            self._trouble, pause = "", RETRY
            if self._delivery.run_id:
                self._settled.set()
                if self._others.ident is None:
                    self._others.start()
            if sent:
                continue
            if ended:
                self._writer.close()
                with suppress(OSError):  # then it is forgotten later
                    self._spool.forget_sent()
                self._done.set()
                return pause
            self._news.wait()
            self._news.clear()
            self._ended.wait(GATHERING)

    def _say_trouble(self, why: str) -> None:
        known, self._trouble = self._trouble, why
        self._settled.set()
        if not known:
            log.warning(
                "MLflow at %s takes nothing: %s; what is logged waits in %s",
                without_password(self._uri),
                why,
                self._spool.folder,
            )

    def _send_others(self) -> None:
        """The other thread: send what runs before this one have left."""
        for spool in waiting_spools(without_password(self._uri)):
            try:
                if spool.key != self._spool.key and deliver(spool, self._uri):
                    log.info("MLflow has taken what waited of an earlier run, %s", spool.key)
            except Exception as error:
                log.warning("%s still wait in %s: %s", told_of(spool), spool.folder, reason(error))
                return

    def _sample(self) -> None:
        """The third: sample the machine's load."""
        start = began(self._spool.key)
        try:
            for load in sample_load(self._ended):
                self._write_points(int(time.time() - start), load)
        except Exception as error:
            log.warning("MLflow can't sample the machine's load: %s", one_line(error))

    def log(self, entry: HistoryEntry) -> None:
        step = entry["iteration"]
        values = {
            metric_name(curve): float(value)
            for name, value in entry.items()
            if (curve := curve_of(name)) and value is not None
        }
        self._write_points(step, values)

    def _write_points(self, step: int, values: Mapping[str, float]) -> None:
        new = {name: value for name, value in values.items() if (name, step) not in self._logged}
        if new:
            self._write("points", {"time": _now(), "step": step, "values": new})

    def _write(self, kind: str, content: Any) -> None:
        if not self._ended.is_set():  # else a signal has ended the run already
            self._writer.write(kind, content)
            self._news.set()

    def log_picture(self, step: int, name: str, layers: Sequence[Array], colours: Colours) -> None:
        key = re.sub(r"[^a-zA-Z0-9_\-. ]", "_", name)[-100:]  # what MLflow takes
        image, target, prediction = layers
        drawn = panel(image, target, prediction, colours)
        small, thumbnail = Image.fromarray(drawn), BytesIO()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(thumbnail, "webp")
        # As MLflow calls pictures. Another attempt at the training gives the same one this name.
        told = int(1000 * began(self._spool.key)) + step
        unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{key} {step}")
        called = f"{key}+step+{step}+timestamp+{told}+{unique}"
        self._keep(png(drawn), PICTURES, f"{called}.png")
        self._keep(thumbnail.getvalue(), PICTURES, f"{called}+compressed.webp")
        self._write("tags", {PICTURES_TAG: "True"})

    def log_artifacts(self, paths: Iterable[Path], folder: str) -> None:
        for path in paths:
            if path.is_dir():
                for file in sorted(file for file in path.rglob("*") if file.is_file()):
                    there = Path(folder) / file.relative_to(path).parent
                    self._keep(file, there.as_posix(), file.name)
            else:
                self._keep(path, folder, path.name)

    def _keep(self, content: Path | bytes, folder: str, name: str) -> None:
        if not self._ended.is_set():
            self._writer.keep(content, folder, name)
            self._news.set()

    def log_table(self, path: Path, folder: str) -> None:
        with path.open(newline="", encoding="utf-8") as file:
            columns, *rows = csv.reader(file, delimiter="\t")
        content = {"columns": columns, "data": [[_number(cell) for cell in row] for row in rows]}
        table = f"{path.stem}.json"
        self._keep(json.dumps(content).encode(), folder, table)
        shown = {"path": f"{folder}/{table}", "type": "table"}
        self._write("tags", {TABLES_TAG: json.dumps([shown])})

    def log_result(self, score: float, tags: Mapping[str, str], text: str) -> None:
        self._write("tags", {**tags, "mlflow.note.content": text})
        self._write("score", score)

    def finish(self, status: str, reason: str | None = None) -> None:
        begun = time.monotonic()
        limit = begun + (HASTE if status == "KILLED" else PATIENCE)
        with self._ending:
            self._write("end", {"status": status, "time": _now(), "reason": reason})
            self._ended.set()
            self._news.set()
        while not self._done.wait(MOMENT) and time.monotonic() < limit:
            if self._trouble and time.monotonic() > begun + HASTE:
                break
        if self._done.is_set():
            if self._others.ident is not None and status != "KILLED":
                self._others.join(max(0, limit - time.monotonic()))
            return
        self._given_up.set()
        self._news.set()
        with self._ending:  # a signal's thread and the main one may both be here
            if not self._said:
                log.warning(
                    "%s of this run wait in %s: %s; the next run sends them, or `%s` does",
                    told_of(self._spool),
                    self._spool.folder,
                    self._trouble or "there was no time for more",
                    SYNC,
                )
            self._said = True


def _now() -> int:
    return int(1000 * time.time())


def _number(cell: str) -> str | float | None:
    """What a table's cell holds: a number, nothing, or text."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


@contextmanager
def tracked(tracker: Tracker) -> Iterator[None]:
    """Do the work of a `with` block, and end the tracker's run as the work ends.

    FINISHED where the block ends, KILLED where a signal has ended it, FAILED by anything else.
    """
    try:
        yield
    except Interrupted as ended:
        tracker.finish("KILLED", str(ended))
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    else:
        tracker.finish("FINISHED")


def open_training_run(
    params: TrackingParams,
    key: str | None,
    remember: Callable[[str], None],
    name: str,
    parameters: Mapping[str, Any],
    tags: dict[str, str],
    dataset: tuple[str, str, str],
) -> Tracker:
    """Continue the run that has this key, or begin a new one, whose key is remembered at once.

    dataset: its name, its md5 and where it lies. MLflow is waited for so that a run is usually
    open when this returns; where MLflow is not installed the result tracks nothing.
    """
    if not _installed():
        return Tracker()
    key = valid(key)
    if key is None:
        key = new_key()
        remember(key)
    start = _start(params, name, parameters, tags=tags, dataset=dataset)
    tracker = _open(Spool(key), start, store_uri(params))
    tracker.wait(OPENING)
    return tracker


def open_evaluation_run(
    params: TrackingParams,
    run_id: str | None,
    key: str | None,
    fingerprint: str,
    name: str,
    parameters: Mapping[str, Any],
    tags: dict[str, str],
    dataset: tuple[str, str, str],
) -> Tracker:
    """The run that holds this evaluation's scores.

    The training's own, which has this id or key, for its first evaluation; for any other, and where
    MLflow lacks that run, one below it. Where MLflow is not installed the result tracks nothing.
    """
    if not _installed():
        return Tracker()
    key = valid(key)
    tags = tags | {EVALUATION_TAG: fingerprint}
    start = _start(params, name, parameters, tags=tags, dataset=dataset)
    start |= {"evaluation": fingerprint, "run_id": run_id, "training": key}
    return _open(Spool(key or new_key()), start, store_uri(params))


def _start(
    params: TrackingParams,
    name: str,
    parameters: Mapping[str, Any],
    *,
    tags: dict[str, str],
    dataset: tuple[str, str, str],
) -> Start:
    return Start(
        uri=without_password(store_uri(params)),
        experiment=params.experiment,
        name=name,
        time=_now(),
        params={name: str(value) for name, value in parameters.items()},
        tags=tags,
        dataset=dataset,
        evaluation=None,
        run_id=None,
        training=None,
    )


def _installed() -> bool:
    """Import MLflow: here, and not in a thread beside a training that begins."""
    try:
        quiet()
    except ImportError as error:
        missing = error.name == "mlflow"
        why = "MLflow is not installed" if missing else f"MLflow can't be used: {one_line(error)}"
        log.warning("this run is tracked nowhere, %s", why)
        return False
    Patience.begin()
    return True


def _open(spool: Spool, start: Start, uri: str) -> Tracker:
    try:
        return MlflowTracker(spool, start, uri)
    except OSError as error:
        log.warning("this run is tracked nowhere, its spool can't be written: %s", one_line(error))
        return Tracker()
