"""What MLflow's store holds of a run, and what happens where the store fails."""

import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import INVALID_PARAMETER_VALUE, UNAUTHENTICATED, MlflowException
from mlflow.utils.validation import _validate_metric_name
from PIL import Image

from pipeline.errors import InputError
from pipeline.tracking import delivery, store
from pipeline.tracking import tracker as tracking
from pipeline.tracking.delivery import waiting_spools
from pipeline.tracking.names import curve_of, metric_name
from pipeline.tracking.spool import Spool, Start, all_spools, new_key, spools_folder
from pipeline.tracking.store import TrackingParams, find_runs
from pipeline.tracking.tracker import (
    MlflowTracker,
    Tracker,
    open_evaluation_run,
    open_training_run,
    tracked,
)
from stages.runs import sync
from tests.project import REPOSITORY, empty_store, environment

PARAMS = TrackingParams(uri=None, experiment="tests", log_interval=1)
DATA = ("feet", "md5", "data/prepared")


@pytest.fixture(scope="module")
def store_without_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    path.write_bytes(empty_store())
    MlflowClient(f"sqlite:///{path}").create_experiment("tests")
    return path


@pytest.fixture
def folder(
    tmp_path: Path, store_without_runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: object
) -> Path:
    """A main checkout whose store is empty; the ends of runs wait for it, however slow it is."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    monkeypatch.setattr(tracking, "HASTE", 60.0)
    monkeypatch.setattr(tracking, "OPENING", 60.0)
    monkeypatch.setattr(tracking, "RETRY", 0.1)
    # Where a test takes ten seconds, the machine's load would be a point, too.
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1000")
    caplog.set_level(logging.INFO, "instep")
    shutil.copyfile(store_without_runs, tmp_path / "mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        place = (tmp_path / "mlartifacts").as_uri()
        store.execute("UPDATE experiments SET artifact_location = ? WHERE name = 'tests'", [place])
    return tmp_path


@pytest.fixture
def hasty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends of runs wait two seconds, where the store never comes back meanwhile."""
    monkeypatch.setattr(tracking, "HASTE", 2.0)


def start(folder: Path, name: str = "run", **tags: str) -> Tracker:
    """A training of a folder: its first attempt, or the next."""
    kept = folder / "run_key"
    key = kept.read_text() if kept.is_file() else None
    parameters = {"train.lr": 0.1}
    return open_training_run(
        PARAMS,
        key,
        kept.write_text,
        name=name,
        parameters=parameters,
        tags=tags,
        dataset=DATA,
    )


def evaluate(key: str | None, run_id: str | None = None) -> Tracker:
    return open_evaluation_run(
        PARAMS,
        run_id,
        key,
        fingerprint="f" * 32,
        name="evaluation",
        parameters={},
        tags={},
        dataset=DATA,
    )


def rows(folder: Path, sql: str) -> list[tuple]:
    with sqlite3.connect(folder / "mlflow.db") as store:
        return store.execute(sql).fetchall()


def artifacts(folder: Path) -> Path:
    """Where the only run's artifacts are."""
    ((uri,),) = rows(folder, "SELECT artifact_uri FROM runs")
    return Path(uri.removeprefix("file://"))


def points(folder: Path) -> Counter[tuple[str, int]]:
    """Metric and step of all points but the machine's load, each with how often it is there."""
    sampled = "key LIKE 'system/%' AND key != 'system/images_per_second'"
    return Counter(rows(folder, f"SELECT key, step FROM metrics WHERE NOT ({sampled})"))


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def broken(monkeypatch: pytest.MonkeyPatch, method: str, times: int = 1000) -> list[str]:
    """Make a method of the client fail so often; the result grows by each call."""
    calls: list[str] = []
    real = getattr(MlflowClient, method)

    def failing(*arguments: object, **named: object) -> object:
        calls.append(method)
        if len(calls) <= times:
            raise MlflowException("the disk\nof the store is full")
        return real(*arguments, **named)

    monkeypatch.setattr(MlflowClient, method, failing)
    return calls


def test_every_name_is_valid_and_no_two_become_one():
    rng = random.Random(0)
    names = {"", "/", "//", "..", "../a", "...", "a/.", "./", "\n", "a\n", "\ud800", ":", "a:7c:b"}
    names |= {"".join(rng.choices("ab|?:/. \n7c", k=rng.randint(1, 8))) for _ in range(20000)}
    names |= {"x" * n for n in (249, 250, 251, 1000)} | {"x" * 999 + "y", "?" * 100, "/" * 300}
    for name in names:
        _validate_metric_name(metric_name(name))
        assert len(metric_name(name)) <= 250
    assert len({metric_name(name) for name in names}) == len(names)
    for name in ("train/loss", "val/iou.traffic light", "evaluation/iou.Straße", "a.b/c-d_e"):
        assert metric_name(name) == name
    assert metric_name("val/iou.sky/") == "val/iou.sky:2f:"


def test_classes_of_any_name_reach_the_store(folder: Path) -> None:
    names = ["sky/", "a|b", "a?b", "..", "/", "road", "x" * 300, "é"]
    tracker = start(folder)
    tracker.log({"iteration": 1} | {f"val/iou.{name}": i for i, name in enumerate(names)})
    tracker.log({"iteration": 2, "a//b": 0.5})
    tracker.finish("FINISHED")
    values = rows(folder, "SELECT value FROM metrics WHERE key LIKE 'val/iou/%' ORDER BY value")
    assert values == [(float(i),) for i in range(len(names))]
    assert len(points(folder)) == len(names) + 1
    assert ("val/iou/road", 1) in points(folder)


def test_of_single_classes_the_iou_alone_has_a_curve(folder: Path) -> None:
    tracker = start(folder)
    scores = {"val/mean_iou": 0.5, "val/iou.sky": 0.4, "val/dice.sky": 0.6, "val/mmseg.mFscore": 1}
    tracker.log({"iteration": 3, "train/loss": 1.0, "train/loss/dice": 0.5, **scores})
    tracker.finish("FINISHED")
    named = {name for name, _ in points(folder)}
    assert named == {"val/mean_iou", "val/iou/sky", "train/loss", "train/loss/dice"}


def test_pictures_of_a_step_are_there_once_whatever_attempt_sent_them(folder: Path) -> None:
    colours = {"sky": (0, 0, 255), "tree": (0, 255, 0)}
    image = np.full((20, 30, 3), 100, np.uint8)
    target, prediction = np.zeros((20, 30), np.uint8), np.ones((20, 30), np.uint8)
    for steps in ((5, 10), (10, 15)):
        tracker = start(folder)
        for step in steps:
            tracker.log_picture(step, "town/a?b", [image, target, prediction], colours)
        tracker.finish("KILLED")
    pictures = sorted((artifacts(folder) / "images").glob("*.png"))
    assert sorted(int(path.name.split("+")[2]) for path in pictures) == [5, 10, 15]
    assert {path.name.split("+")[0] for path in pictures} == {"town_a_b"}
    with Image.open(pictures[0]) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == 3 * 30 + 2 * 4
    assert pixels[10, [15, 34 + 15, 68 + 15]].tolist() == [
        [100, 100, 100],
        [50, 50, 178],
        [50, 178, 50],
    ]


def test_a_repository_that_was_moved_is_told_where_its_files_go(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = folder / "before"
    before.mkdir()
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    for name, place in (("moved", before), ("here", folder)):
        client.create_experiment(name, (place / "mlartifacts").as_uri())
        params = TrackingParams(uri=None, experiment=name, log_interval=1)
        assert find_runs(params) == []
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert f"MLflow's experiment moved keeps its files in {before.as_uri()}/mlartifacts" in told[0]


def test_a_file_of_a_table_is_shown_as_one(folder: Path) -> None:
    (folder / "classes.tsv").write_text("class\tiou\nsky\t0.5\ntree\t\n", encoding="utf-8")
    tracker = start(folder)
    tracker.log_table(folder / "classes.tsv", "evaluation")
    for score in (0.5, 0.625):
        tracker.log_result(score, {"mean_iou.interval": "0.5 to 0.7"}, "**good**")
    tracker.finish("FINISHED")
    table = json.loads((artifacts(folder) / "evaluation/classes.json").read_text())
    assert table == {"columns": ["class", "iou"], "data": [["sky", 0.5], ["tree", None]]}
    tags = dict(rows(folder, "SELECT key, value FROM tags"))
    assert tags["mlflow.note.content"] == "**good**"
    assert tags["mean_iou.interval"] == "0.5 to 0.7"
    assert rows(folder, "SELECT name FROM runs") == [("0.6250 run",)]
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [
        {"path": "evaluation/classes.json", "type": "table"}
    ]


@pytest.mark.slow
def test_kills_at_any_moment_leave_every_point_once(folder: Path) -> None:
    script = [sys.executable, "-m", "tests.kill_tracker", str(folder)]
    done = subprocess.run(
        script, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    _, history = json.loads((folder / "state.json").read_text())
    logged = {(curve_of(name), entry["iteration"]) for entry in history for name in entry}
    held = points(folder)
    assert set(held.values()) == {1}
    assert {point for point in logged if point[0]} <= held.keys()
    assert len(held) > 6 * 1050


def test_another_log_interval_after_a_kill_leaves_no_gap(folder: Path) -> None:
    for steps in ((4, 8), (5, 6, 7, 8, 9), range(4, 13)):
        tracker = start(folder)
        for step in steps:
            tracker.log({"iteration": step, "train/loss": 1.0})
        tracker.finish("KILLED")
    assert points(folder) == {("train/loss", step): 1 for step in range(4, 13)}


@pytest.mark.slow
def test_a_run_is_asked_for_few_things(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = broken(monkeypatch, "get_metric_history", times=0)
    scores = {f"val/iou.class {number}": 0.5 for number in range(150)}
    history = [{"iteration": i, "train/loss": 1.0, "train/lr": 0.1} | scores for i in range(1, 21)]
    for _ in range(2):
        tracker = start(folder)
        for entry in history:
            tracker.log(entry)
        tracker.finish("KILLED")
    assert asked == []
    assert set(points(folder).values()) == {1}
    assert len(points(folder)) == 20 * 152


def test_tables_that_another_process_creates_delay_the_start_by_so_much(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "OPENING", 0.5)
    (folder / ".dvc/tmp").mkdir(parents=True)
    with FileLock(folder / ".dvc/tmp/instep-mlflow.lock"):
        began = time.monotonic()
        tracker = start(folder)
        assert time.monotonic() - began < 30
    tracker.log({"iteration": 1, "val/mean_iou": 0.5})
    tracker.finish("FINISHED")
    assert points(folder) == {("val/mean_iou", 1): 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["get_experiment_by_name", "create_run", "get_run", "update_run", "search_runs"]
)
def test_what_a_store_that_fails_as_a_run_is_opened_has_missed_is_sent_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    if method in ("get_run", "update_run"):  # another attempt's
        start(folder).finish("KILLED")
    with monkeypatch.context() as context:
        context.setattr(tracking, "HASTE", 2.0)
        broken(context, method)
        tracker = evaluate(None, "0" * 32) if method == "get_run" else start(folder)
        tracker.log({"iteration": 1, "val/mean_iou": 0.5})
        wait_until(lambda: any("takes nothing" in one for one in caplog.messages))
        tracker.finish("FINISHED")
        (line,) = (one for one in caplog.messages if "of this run wait in" in one)
        # The tracker's thread may still be at its last try, which the store must fail as well.
        wait_until(lambda: len(waiting_spools()) == 1)
    (spool,) = waiting_spools()
    assert "1 point, its parameters and tags, its end of this run wait in" in line
    assert f"{spool.folder}: the disk of the store is full; the next run sends them" in line
    start(folder, "next").finish("FINISHED")
    wait_until(lambda: not waiting_spools())
    assert points(folder) == {("val/mean_iou", 1): 1}


@pytest.mark.parametrize("method", ["log_batch", "log_inputs", "set_terminated"])
def test_what_a_store_refuses_for_a_while_arrives_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    broken(monkeypatch, method, times=3)
    tracker = start(folder, who="me")
    for iteration in range(1, 4):
        tracker.log({"iteration": iteration, "val/mean_iou": 0.5})
    tracker.finish("FINISHED")
    assert points(folder) == {("val/mean_iou", iteration): 1 for iteration in range(1, 4)}
    assert rows(folder, "SELECT key, value FROM params") == [("train.lr", "0.1")]
    assert rows(folder, "SELECT digest FROM datasets") == [("md5",)]
    assert ("who", "me") in rows(folder, "SELECT key, value FROM tags")
    assert rows(folder, "SELECT status FROM runs") == [("FINISHED",)]
    assert len(caplog.messages) == 2  # that it waits, and that it has arrived


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_a_password_is_neither_kept_nor_shown(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:se@cret@127.0.0.1:9")
    start(folder).finish("FINISHED")
    assert "MLflow at http://127.0.0.1:9 takes nothing" in caplog.text
    wait_until(lambda: bool(waiting_spools("http://127.0.0.1:9")))
    (spool,) = waiting_spools()
    monkeypatch.setattr(store, "connect", fails)
    monkeypatch.setattr(delivery, "connect", fails)
    with pytest.raises(InputError, match="it does not answer") as caught:
        find_runs(PARAMS)
    with pytest.raises(InputError, match="A password is kept nowhere"):
        sync("http://me:se@cret@127.0.0.1:9")
    files = [path for path in spool.folder.rglob("*") if path.is_file()]
    said = [caplog.text, str(caught.value), *capsys.readouterr()]
    assert not [text for text in [*map(Path.read_text, files), *said] if "cret" in text]


def fails(uri: str, *_: object) -> None:
    raise OSError(f"{uri} is asked, and it does not answer")


def test_who_a_server_refuses_is_told_what_to_set():
    refused = requests.Response()
    refused.status_code = 401
    file = requests.exceptions.HTTPError("401 Client Error", response=refused)
    run = MlflowException("error code 401 != 200", error_code=UNAUTHENTICATED)
    for error in (file, run):
        assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in store.reason(error)
    untrusted = requests.exceptions.SSLError("certificate verify failed: self-signed certificate")
    assert "see MLFLOW_TRACKING_SERVER_CERT_PATH: certificate verify" in store.reason(untrusted)


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_what_waits_is_said_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(folder)
    tracker.log({"iteration": 1, "val/mean_iou": 0.5})
    wait_until(lambda: bool(points(folder)))
    for method in ("log_batch", "set_terminated", "log_artifact", "log_artifacts"):
        broken(monkeypatch, method)
    for iteration in range(2, 9):
        tracker.log({"iteration": iteration, "train/loss": 1.0, "val/mean_iou": 0.5})
    (folder / "pictures").mkdir()
    for name in ("a", "b"):
        (folder / "pictures" / name).touch()
    tracker.log_artifacts([folder / "pictures"], "pictures")
    tracker.log_artifacts([folder / "pictures/a"], "")
    tracker.finish("FINISHED")
    tracker.finish("FINISHED")
    _, line = caplog.messages
    assert line.startswith("14 points, 3 files, its end of this run wait in")


def test_what_the_store_refuses_for_good_holds_up_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = MlflowClient.log_batch

    def picky(client: MlflowClient, run_id: str, **given: list) -> None:
        if any("bad" in one.key for kind in given.values() for one in kind):
            raise MlflowException("no such names", error_code=INVALID_PARAMETER_VALUE)
        real(client, run_id, **given)

    monkeypatch.setattr(MlflowClient, "log_batch", picky)
    tracker = start(folder, bad="tag", good="tag")
    for iteration in range(1, 8):
        tracker.log({"iteration": iteration, "val/mean_iou": 0.5, f"val/bad{iteration}": 0.5})
    tracker.finish("FINISHED")
    assert points(folder) == {("val/mean_iou", iteration): 1 for iteration in range(1, 8)}
    assert ("good", "tag") in rows(folder, "SELECT key, value FROM tags")
    assert rows(folder, "SELECT status FROM runs") == [("FINISHED",)]
    assert sum("refuses" in line and "bad" in line for line in caplog.messages) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "told"), [("file", "is not told all that it held"), ("start", "can't be told of it")]
)
def test_a_line_that_is_damaged_while_a_file_waits_is_told_of(
    kind: str,
    told: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as away:
        away.setattr(tracking, "HASTE", 2.0)
        broken(away, "log_artifact")
        tracker = start(folder)
        (folder / "table.csv").touch()
        tracker.log_artifacts([folder / "table.csv"], "")
        tracker.finish("FINISHED")
        wait_until(lambda: not any(s.live for spool in all_spools() for s in spool.sessions()))
    (path,) = spools_folder().rglob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    kinds = [json.loads(line[9:])[1] for line in lines]
    damaged = kinds.index(kind)
    assert (kinds[0], kinds[-1]) == ("start", "end")
    lines[damaged] = b"X" + lines[damaged][1:]
    path.write_bytes(b"".join(lines))
    caplog.clear()
    sync(None)
    assert told in caplog.text
    assert not waiting_spools()
    if kind == "start":  # another session may get the number, and its mark would be this one's
        assert not [*spools_folder().rglob("*.sent")]


def test_a_lost_spool_makes_no_point_twice(folder: Path) -> None:
    tracker = start(folder)
    history = [{"iteration": i, "train/loss": 1.0, "val/mean_iou": 0.5} for i in range(1, 5)]
    for steps in (4, 6):
        for entry in [*history, {"iteration": 6, "train/loss": 0.5}][:steps]:
            tracker.log(entry)
        tracker.finish("KILLED")
        shutil.rmtree(spools_folder())
        tracker = start(folder)
    tracker.finish("FINISHED")
    assert set(points(folder).values()) == {1}
    assert len(points(folder)) == 9


def test_a_full_disk_delays_what_is_told_and_loses_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(folder)
    assert isinstance(tracker, MlflowTracker)
    writer = tracker._writer
    with Path("/dev/full").open("wb", buffering=0) as full:
        real, writer._file = writer._file, full
        for iteration in range(1, 4):
            tracker.log({"iteration": iteration, "val/mean_iou": 0.5})
        writer._file = real
    tracker.log({"iteration": 4, "val/mean_iou": 0.5})
    tracker.finish("FINISHED")
    assert points(folder) == {("val/mean_iou", iteration): 1 for iteration in range(1, 5)}
    (line,) = caplog.messages
    assert "No space left on device" in line


def test_without_mlflow_nothing_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for tracker in (start(folder), evaluate(None)):
        tracker.log({"iteration": 1, "val/mean_iou": 0.5})
        tracker.finish("FINISHED")
        assert tracker.run_id is None
    assert caplog.messages == ["this run is tracked nowhere, MLflow is not installed"] * 2
    assert not spools_folder().exists()
    assert not (folder / "run_key").exists()


def test_what_an_attempt_says_comes_after_what_the_one_before_it_said(folder: Path) -> None:
    key = new_key()
    (folder / "run_key").write_text(key)
    about = Start(
        uri="",
        experiment="tests",
        name="run",
        time=1,
        params={},
        tags={},
        dataset=DATA,
        evaluation=None,
        run_id=None,
        training=None,
    )
    before = Spool(key).begin(about)  # of a process that has not ended
    before.write("points", {"time": 1, "step": 1, "values": {"train/loss": 1.0}})
    tracker = start(folder)
    tracker.log({"iteration": 2, "train/loss": 0.5})
    time.sleep(0.5)
    assert not points(folder)
    before.close()
    tracker.finish("FINISHED")
    assert points(folder) == {("train/loss", 1): 1, ("train/loss", 2): 1}


def test_a_key_that_is_none_begins_another_run(folder: Path) -> None:
    (folder / "run_key").write_text("../../elsewhere")
    start(folder).finish("FINISHED")
    assert (folder / "run_key").read_text() != "../../elsewhere"
    assert rows(folder, "SELECT status FROM runs") == [("FINISHED",)]


def test_what_is_told_of_an_old_training_is_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder).finish("KILLED")
    (spool,) = all_spools()
    wait_until(lambda: not any(session.live for session in spool.sessions()))
    for path in (spool.folder, *spool.folder.iterdir()):
        os.utime(path, (0, 0))
    monkeypatch.setattr(delivery, "KEPT_DAYS", 1e6)
    assert waiting_spools() == []
    assert spool.sessions()
    monkeypatch.undo()
    monkeypatch.setenv("DVC_ROOT", str(folder))

    def forgotten() -> bool:
        """The tracker's thread may hold the spool for a moment more, and so do looks at it."""
        for path in (spool.folder, *spool.folder.iterdir()) if spool.folder.exists() else ():
            os.utime(path, (0, 0))
        assert waiting_spools() == []
        return not spool.folder.exists()

    wait_until(forgotten)


def test_an_error_in_the_training_fails_its_run(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracked(start(folder)):
        raise ZeroDivisionError
    assert rows(folder, "SELECT status FROM runs") == [("FAILED",)]
    with tracked(start(folder)):
        assert rows(folder, "SELECT status FROM runs") == [("RUNNING",)]
    assert rows(folder, "SELECT status FROM runs") == [("FINISHED",)]


def test_a_run_has_the_name_and_the_tags_of_the_experiment_that_goes_on_with_it(
    folder: Path,
) -> None:
    def named() -> tuple[str, dict[str, str]]:
        ((name,),) = rows(folder, "SELECT name FROM runs")
        tags = dict(rows(folder, "SELECT key, value FROM tags"))
        assert tags.pop("mlflow.runName") == name
        return name, {key: value for key, value in tags.items() if key.startswith("dvc.")}

    first = {"dvc.exp_name": "first", "dvc.baseline_rev": "1"}
    start(folder, "first", **first).finish("KILLED")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").update_run(
        rows(folder, "SELECT run_uuid FROM runs")[0][0], name="by hand"
    )
    start(folder, "first", **first).finish("KILLED")
    assert named() == ("by hand", first)
    second = {"dvc.exp_name": "second", "dvc.baseline_rev": "2"}
    start(folder, "second", **second).finish("KILLED")
    assert named() == ("second", second)
    start(folder, "plain").finish("KILLED")
    assert named() == ("plain", {})
