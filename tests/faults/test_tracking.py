"""MLflow's server away, mute, slow, restarted: it costs no step, and nothing is lost or doubled."""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.errors import InputError
from pipeline.tracking import tracker as tracking
from pipeline.tracking.delivery import waiting_spools
from pipeline.tracking.spool import all_spools, spools_folder
from pipeline.tracking.store import TrackingParams
from pipeline.tracking.tracker import Tracker, open_evaluation_run, open_training_run
from stages.runs import sync
from tests.faults.server import Proxy, Server, lost_once
from tests.project import REPOSITORY, ended, environment, make_project, stage

pytestmark = pytest.mark.slow

STEPS = 30
CLASSES = [f"class {number}" for number in range(150)]
DATA = ("feet", "md5", "data/prepared")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server(folder) as made:
        yield made


@pytest.fixture
def proxy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: object
) -> Iterator[Proxy]:
    """The way to the server, for the runs of an empty main checkout."""
    made = Proxy(server.port)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # Where a test takes ten seconds, the machine's load would be a point, too.
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1000")
    monkeypatch.setattr("pipeline.tracking.store.Patience._given", None)
    monkeypatch.setattr(tracking, "HASTE", 60.0)
    caplog.set_level(logging.INFO, "instep")
    yield made
    made.back()
    made.away()


@pytest.fixture
def hasty(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends of runs wait two seconds, where the server does not come back meanwhile."""
    monkeypatch.setattr(tracking, "HASTE", 2.0)


def start(experiment: str, folder: Path) -> Tracker:
    """A training: its first attempt in this folder, or the next."""
    kept = folder / "run_key"
    return open_training_run(
        TrackingParams(uri=None, experiment=experiment, log_interval=1),
        kept.read_text() if kept.is_file() else None,
        kept.write_text,
        name="unet (first)",
        parameters={f"train.option{number}": number for number in range(120)},
        tags={"fingerprint": "f" * 32, "git.rev": "0123"},
        dataset=DATA,
    )


def work(tracker: Tracker, first: int = 1, last: int = STEPS) -> float:
    """Steps of a training; the longest of them in seconds, but for those that draw a picture."""
    longest = 0.0
    for step in range(first, last + 1):
        entry = {"iteration": step, "train/loss": 1 / step, "train/lr": 0.1}
        if step % 10 == 0:
            entry |= {"val/mean_iou": step / STEPS}
            entry |= {f"val/iou.{name}": step / STEPS for name in CLASSES}
            image = np.full((20, 30, 3), step, np.uint8)
            layers = [image, image[..., 0] * 0, image[..., 0] * 0 + 1]
            tracker.log_picture(step, "town", layers, {"sky": (0, 0, 255), "tree": (0, 255, 0)})
        began = time.perf_counter()
        tracker.log(entry)
        longest = max(longest, time.perf_counter() - began)
        time.sleep(0.02)
    return longest


def end(tracker: Tracker, folder: Path, status: str = "FINISHED") -> None:
    """The end of a training, whose files are gone soon after it."""
    (folder / "large.bin").write_bytes(b"weights" * 500_000)
    (folder / "train.log").write_text("lines\n")
    tracker.log_artifacts([folder / "large.bin"], "checkpoints")
    tracker.log_artifacts([folder / "train.log"], "")
    tracker.finish(status)
    (folder / "large.bin").unlink()
    (folder / "train.log").write_text("other lines\n")


@pytest.fixture(scope="module")
def undisturbed(server: Server, folder: Path) -> dict[str, object]:
    """What the server holds of a training that nothing has disturbed."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("DVC_ROOT", str(folder / "undisturbed"))
        context.setenv("MLFLOW_TRACKING_URI", server.address)
        (folder / "undisturbed").mkdir()
        tracker = start("undisturbed", folder / "undisturbed")
        assert tracker.run_id is not None
        work(tracker)
        end(tracker, folder / "undisturbed")
        assert not waiting_spools()
    (content,) = server.content("undisturbed")
    assert content["status"] == "FINISHED"
    assert len(content["points"]) == 2 * STEPS + 3 * 151
    assert len(content["params"]) == 120
    assert len(content["files"]) == 2 + 3 * 2
    return content


def synced(folder: Path, proxy: Proxy, code: int = 0) -> str:
    """What `python -m stages.runs --sync` prints."""
    own = {"DVC_ROOT": str(folder), "MLFLOW_TRACKING_URI": proxy.uri}
    ending, said = ended(REPOSITORY, "runs", "--sync", **own)
    assert ending == code, said
    return said


def no_thread_is_left() -> None:
    """Wait for the threads of trackers that have ended: they would still send."""
    deadline = time.monotonic() + 120
    while any(session.live for spool in all_spools() for session in spool.sessions()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sync_here(proxy: Proxy) -> None:
    """What `python -m stages.runs --sync` does, in this process."""
    no_thread_is_left()
    sync(proxy.uri)


def nothing_is_left() -> bool:
    return not waiting_spools() and not [*spools_folder().iterdir()]


def test_a_server_that_is_away_at_the_start_gets_the_run_when_it_comes(
    proxy: Proxy, server: Server, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    """Row 11: away at the start."""
    proxy.away()
    began = time.monotonic()
    tracker = start("away at the start", tmp_path)
    assert time.monotonic() - began < 30
    assert work(tracker, 1, 15) < 2
    assert tracker.run_id is None
    proxy.back()
    work(tracker, 16)
    end(tracker, tmp_path)
    assert server.content("away at the start") == [undisturbed]
    assert nothing_is_left()


@pytest.mark.usefixtures("hasty")
def test_a_server_that_is_away_all_the_time_is_told_afterwards(
    proxy: Proxy,
    server: Server,
    tmp_path: Path,
    undisturbed: dict[str, object],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Row 11: away until the end; a command sends it."""
    proxy.away()
    tracker = start("away", tmp_path)
    work(tracker)
    began = time.monotonic()
    end(tracker, tmp_path)
    assert time.monotonic() - began < 40
    first, last = caplog.messages
    assert "takes nothing" in first
    (folder,) = spools_folder().iterdir()
    waiting = "513 points, 8 files, its parameters and tags, its end"
    assert last.startswith(f"{waiting} of this run wait in {folder}: ")
    assert last.endswith("the next run sends them, or `python -m stages.runs --sync` does")

    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        sync_here(proxy)
    assert f"{waiting} still wait in {folder}" in capsys.readouterr().out
    proxy.back()
    assert synced(tmp_path, proxy) == f"sent {waiting} of run {folder.name}\n"
    assert server.content("away") == [undisturbed]
    assert nothing_is_left()
    sync_here(proxy)
    assert capsys.readouterr().out == "nothing waits: MLflow has all that was logged\n"


def test_a_server_that_never_answers_delays_neither_start_nor_end(
    proxy: Proxy,
    server: Server,
    tmp_path: Path,
    undisturbed: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row 11: a port that accepts and is mute; an answer is waited for a minute, by a thread."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setattr(tracking, "PATIENCE", 5.0)
    proxy.mute()
    began = time.monotonic()
    tracker = start("mute", tmp_path)
    assert time.monotonic() - began < 30
    assert work(tracker) < 2
    began = time.monotonic()
    end(tracker, tmp_path)
    assert time.monotonic() - began < 30
    assert server.content("mute") == []
    proxy.back()
    sync_here(proxy)
    assert server.content("mute") == [undisturbed]
    assert nothing_is_left()


def test_a_server_that_dies_and_is_slow_in_the_middle_loses_nothing(
    proxy: Proxy, server: Server, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    """Row 12: dies in the middle, comes back slow, is mute, comes back."""
    tracker = start("disturbed", tmp_path)
    longest = work(tracker, 1, 5)
    proxy.away()
    longest = max(longest, work(tracker, 6, 10))
    proxy.delay = 0.3
    proxy.back()
    longest = max(longest, work(tracker, 11, 20))
    proxy.delay = 0.0
    proxy.mute()
    longest = max(longest, work(tracker, 21, 27))
    time.sleep(1)
    proxy.back()
    longest = max(longest, work(tracker, 28))
    end(tracker, tmp_path)
    assert longest < 2
    assert server.content("disturbed") == [undisturbed]
    assert nothing_is_left()


@pytest.mark.parametrize(
    "request_",
    ["experiments/create", "runs/create", "log-batch", "log-inputs", "/artifacts/", "runs/update"],
)
def test_a_lost_answer_makes_nothing_twice(
    proxy: Proxy, server: Server, tmp_path: Path, undisturbed: dict[str, object], request_: str
) -> None:
    """Row 12: the server obeys, and its answer gets lost."""
    lose = lost_once(request_)
    proxy.lose = lose
    tracker = start(f"lost {request_}", tmp_path)
    work(tracker)
    end(tracker, tmp_path)
    assert not lose(request_), "no answer was lost"
    assert server.content(f"lost {request_}") == [undisturbed]


def test_a_batch_of_points_whose_answer_gets_lost_is_there_once(
    proxy: Proxy, server: Server, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    """Row 12: every second answer to points gets lost."""
    tracker = start("lost points", tmp_path)
    assert tracker.run_id is not None
    count = 0

    def lose(request: str) -> bool:
        nonlocal count
        count += "log-batch" in request
        return "log-batch" in request and count % 2 == 0

    proxy.lose = lose
    work(tracker)
    end(tracker, tmp_path)
    assert count > 1, "no answer was lost"
    sync_here(proxy)
    assert server.content("lost points") == [undisturbed]


def test_a_run_opens_with_ten_requests_at_most(
    proxy: Proxy, server: Server, tmp_path: Path
) -> None:
    """Row 12: 150 classes, 120 parameters; the first attempt, and one that goes on."""
    for attempt in range(2):
        proxy.asked.clear()
        tracker = start("few requests", tmp_path)
        deadline = time.monotonic() + 120
        while "POST /api/2.0/mlflow/runs/log-batch" not in proxy.asked and attempt == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        work(tracker, 1, 0)
        time.sleep(1)
        assert 3 <= len(proxy.asked) <= 10, proxy.asked
        proxy.asked.clear()
        for step in range(1, 21):
            tracker.log({"iteration": step} | {f"val/iou.{name}": 0.5 for name in CLASSES})
        tracker.finish("KILLED")
        no_thread_is_left()
        assert len(proxy.asked) <= 10 + 6, proxy.asked
    (content,) = server.content("few requests")
    assert len(content["points"]) == len(set(content["points"])) == 20 * 150


@pytest.mark.usefixtures("hasty")
def test_a_killed_attempt_that_nobody_could_be_told_of_is_told_with_the_next(
    proxy: Proxy, server: Server, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    """Row 11: away during a killed attempt, whose state is behind its spool."""
    proxy.away()
    tracker = start("killed", tmp_path)
    work(tracker, 1, 17)
    tracker.finish("KILLED", "SIGTERM")
    no_thread_is_left()
    proxy.back()
    tracker = start("killed", tmp_path)
    work(tracker, 1, 10)  # the history
    work(tracker, 11)
    end(tracker, tmp_path)
    assert server.content("killed") == [undisturbed]
    assert nothing_is_left()


def test_a_run_that_was_killed_says_why(proxy: Proxy, server: Server, tmp_path: Path) -> None:
    start("why", tmp_path).finish("KILLED", "SIGTERM")
    (content,) = server.content("why")
    assert (content["status"], content["tags"]["ended"]) == ("KILLED", "SIGTERM")
    start("why", tmp_path).finish("FINISHED")
    (content,) = server.content("why")
    assert content["status"] == "FINISHED"
    assert "ended" not in content["tags"]


def test_a_run_that_has_vanished_is_told_anew(
    proxy: Proxy, server: Server, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    from mlflow import MlflowClient

    tracker = start("vanished", tmp_path)
    work(tracker, 1, 17)
    tracker.finish("KILLED")
    (first,) = server.rows(
        "SELECT run_uuid FROM runs JOIN experiments USING (experiment_id) "
        "WHERE experiments.name = 'vanished'"
    )[0]
    MlflowClient(proxy.uri).delete_run(first)
    tracker = start("vanished", tmp_path)
    work(tracker, 18)
    end(tracker, tmp_path)
    _, again = server.content("vanished")
    assert again == undisturbed


@pytest.mark.usefixtures("hasty")
def test_two_that_send_at_once_send_it_once(
    proxy: Proxy, server: Server, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    proxy.away()
    tracker = start("two", tmp_path)
    work(tracker)
    end(tracker, tmp_path)
    no_thread_is_left()
    proxy.delay = 0.2
    proxy.back()
    sending = "from stages.runs import sync; sync(None)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", sending],
            cwd=REPOSITORY,
            env=environment(DVC_ROOT=str(tmp_path)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("sent 513 points" in one for one in said) == 1, said
    assert server.content("two") == [undisturbed]


@pytest.mark.usefixtures("hasty")
def test_an_evaluation_finds_the_run_that_was_told_of_later(
    proxy: Proxy, server: Server, tmp_path: Path
) -> None:
    """Row 11: training and first evaluation are one run, a second evaluation one below it."""
    proxy.away()
    tracker = start("evaluated", tmp_path)
    tracker.log({"iteration": 1, "train/loss": 0.5})
    tracker.finish("FINISHED")
    params = TrackingParams(uri=None, experiment="evaluated", log_interval=1)
    for number in range(2):
        evaluation = open_evaluation_run(
            params,
            None,
            tracker.key,
            fingerprint=f"{number}" * 32,
            name=f"evaluation {number}",
            parameters={"evaluation.flip": bool(number)},
            tags={},
            dataset=DATA,
        )
        evaluation.log({"iteration": 0, "test/mean_iou": 0.5 + number})
        evaluation.log_result(0.5 + number, {}, "**good**")
        evaluation.finish("FINISHED")
    proxy.back()
    sync_here(proxy)
    first, second = server.content("evaluated")
    assert first["name"] == "0.5000 unet (first)"
    assert first["points"] == [("test/mean_iou", 0, 0.5), ("train/loss", 1, 0.5)]
    assert second["name"] == "1.5000 evaluation 1"
    assert second["points"] == [("test/mean_iou", 0, 1.5)]
    assert {first["status"], second["status"]} == {"FINISHED"}
    assert nothing_is_left()


@pytest.mark.usefixtures("hasty")
def test_what_waits_outlives_the_state_of_its_training(
    proxy: Proxy, server: Server, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    """Row 11: the training is done anew while the first one's run still waits."""
    proxy.away()
    for _ in range(2):
        tracker = start("anew", tmp_path)
        work(tracker)
        end(tracker, tmp_path)
        (tmp_path / "run_key").unlink()
    no_thread_is_left()
    proxy.back()
    tracker = start("anew", tmp_path)  # the next run sends them
    work(tracker)
    end(tracker, tmp_path)
    assert server.content("anew") == [undisturbed] * 3
    assert nothing_is_left()


def test_a_real_training_behind_a_bad_server_is_told_as_one_behind_a_good_one(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    """Row 11, row 12: `stages.train` and `stages.evaluate`, then `--sync`."""
    project = make_project(tmp_path / "project", {"train": 8, "val": 3, "test": 3})
    store = {"MLFLOW_TRACKING_URI": proxy.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
    for name in ("prepare", "train", "evaluate"):
        stage(project, name, **store)
    proxy.mute()
    said = stage(project, "train", **store)
    assert said.count("--sync") == 1
    proxy.back()
    proxy.away()
    said = stage(project, "evaluate", **store)
    assert said.count("--sync") == 1
    proxy.back()
    stage(project, "runs", "--sync", **store)
    good, bad = server.content("instep")
    for told in (good, bad):  # run.json and the log hold ids and times
        assert told["files"].keys() >= {"run.json", "train.log", "evaluation/scores.json"}
        del told["files"]["run.json"], told["files"]["train.log"]
    assert good == bad
    assert good["status"] == "FINISHED"
    assert ("test/mean_iou", 0) in {point[:2] for point in good["points"]}
    assert nothing_left(project)


def nothing_left(project: Path) -> bool:
    return not [*(project / ".dvc/tmp/instep-spool").iterdir()]


@pytest.mark.usefixtures("hasty")
def test_a_server_that_is_restarted_at_the_end_loses_nothing(
    proxy: Proxy, server: Server, tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    """Row 12: the process itself is stopped, then killed, and started again after the end."""
    tracker = start("restarted", tmp_path)
    work(tracker, 1, 10)
    assert server.process is not None
    family = [psutil.Process(server.process.pid)]
    family += family[0].children(recursive=True)
    for process in family:
        process.suspend()
    work(tracker, 11, 20)
    server.kill()
    work(tracker, 21)
    end(tracker, tmp_path)
    assert len(waiting_spools()) <= 1
    server.start()
    sync_here(proxy)
    assert server.content("restarted") == [undisturbed]
