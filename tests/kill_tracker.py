"""Attempts at one training of scores alone, each but the last killed: `python -m ... FOLDER`.

An attempt goes on from what the one before saved, and logs at an interval of its own.
"""

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

from mlflow import MlflowClient

from pipeline.tracking.store import TrackingParams
from pipeline.tracking.tracker import open_training_run

ITERATIONS, VALIDATION = 30, 5
SCORES = [f"val/iou.class {c}" for c in range(1050)]
INTERVALS = [4, 2, 3, 5, 1]  # of the attempts; the last is not killed


def entry(iteration: int, interval: int) -> dict[str, float]:
    """What the loop logs at an iteration; 1,050 scores where it validates."""
    made: dict[str, float] = {"iteration": iteration}
    if iteration % interval == 0:
        made |= {"train/loss": iteration / 2, "time/images_per_second": time.time()}
    if iteration % VALIDATION == 0:
        made |= dict.fromkeys(SCORES, iteration / ITERATIONS)
    return made


def attempt(folder: Path, interval: int) -> None:
    saved = folder / "state.json"
    iteration, history = json.loads(saved.read_text()) if saved.is_file() else (0, [])
    run = folder / "run_key"
    tracker = open_training_run(
        TrackingParams(uri=None, experiment="kills", log_interval=1),
        run.read_text() if run.is_file() else None,
        run.write_text,
        name="run",
        parameters={},
        tags={},
        dataset=("data", "md5", "source"),
    )
    for old in history:
        tracker.log(old)
    while iteration < ITERATIONS:
        iteration += 1
        if len(made := entry(iteration, interval)) > 1:
            history.append(made)
            tracker.log(made)
            time.sleep(0.02)
        if iteration % VALIDATION == 0:
            (folder / "state.tmp").write_text(json.dumps((iteration, history)))
            (folder / "state.tmp").rename(saved)
    tracker.finish("FINISHED")


def main(folder: Path) -> None:
    """Kill each attempt a moment after the store has taken something new of it."""
    os.environ["DVC_ROOT"] = str(folder)
    logging.getLogger("instep").addHandler(logging.StreamHandler())
    rng, batches = random.Random(0), folder / "batches"
    log_batch = MlflowClient.log_batch

    def counted(*arguments: object, **named: object) -> None:
        log_batch(*arguments, **named)
        with batches.open("a") as file:
            file.write(".")

    MlflowClient.log_batch = counted
    batches.touch()
    kills = 0
    for interval in INTERVALS:
        last = interval == INTERVALS[-1]
        enough = len(batches.read_text()) + rng.randint(2, 6)
        child = os.fork()
        if child == 0:
            attempt(folder, interval)
            os._exit(0)
        ended = 0
        while not ended and (last or len(batches.read_text()) < enough):
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0
            continue
        time.sleep(rng.random() / 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert kills > 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
