"""Clients of a team's server, each a process with a spool of its own.

`python -m tests.team_clients FOLDER USER:PASSWORD ...` starts one for each user. Client 0 keeps in
FOLDER/0 what it does: its last step, its log, and the file that it logs at its end, which is when
there is a file FOLDER/end, and which it then reads back.
"""

import logging
import os
import sys
import time
from pathlib import Path

import mlflow  # noqa: F401  # once, before the fork

from pipeline.tracking.store import TrackingParams, artifact_of
from pipeline.tracking.tracker import open_training_run


def client(folder: Path, end: Path, user: str, number: int) -> None:
    folder.mkdir()
    os.environ["DVC_ROOT"] = str(folder)
    os.environ["MLFLOW_TRACKING_USERNAME"], _, password = user.partition(":")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = password
    logging.getLogger("instep").addHandler(logging.FileHandler(folder / "log"))
    params = TrackingParams(uri=None, experiment="team", log_interval=1)
    tracker = open_training_run(
        params,
        None,
        (folder / "key").write_text,
        name=f"client {number}",
        parameters={"train.seed": number},
        tags={"fingerprint": f"{number:032}"},
        dataset=("feet", "md5", "data/feet"),
    )
    step = 0
    while not end.exists():
        step += 1
        tracker.log({"iteration": step, "train/loss": number + 1 / step})
        (folder / "step").write_text(str(step))
        time.sleep(0.4)
    (folder / "model.bin").write_bytes(os.urandom(300_000))
    tracker.log_artifacts([folder / "model.bin"], "checkpoints")
    tracker.finish("FINISHED")
    if tracker.run_id is not None:
        held = artifact_of(params, tracker.run_id, Path("checkpoints/model.bin"))
        assert held == (folder / "model.bin").read_bytes()


def main(folder: Path, users: list[str]) -> None:
    children = []
    for number, user in enumerate(users):
        if (child := os.fork()) == 0:
            client(folder / str(number), folder / "end", user, number)
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), statuses


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
