"""Row 27: what a kill has left in MLflow's store hinders no later run."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.project import REPOSITORY, environment, query

CONNECT = """
import sys
from pipeline.tracking.store import connect
connect(f"sqlite:///{sys.argv[1]}/mlflow.db", "instep")
"""
SEND = """
from pathlib import Path
from pipeline.tracking.store import TrackingParams
from pipeline.tracking.tracker import open_training_run

key = Path("key")
tracker = open_training_run(
    TrackingParams(uri=None, experiment="e", log_interval=1),
    key.read_text() if key.is_file() else None,
    key.write_text,
    name="run",
    parameters={},
    tags={},
    dataset=("data", "md5", "source"),
)
tracker.log_artifacts([Path("large.bin")], "checkpoints")
tracker.finish("FINISHED")
"""


def started(program: str, folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        cwd=folder,
        env=environment(PYTHONPATH=str(REPOSITORY)),
    )


def size_of(path: Path) -> int:
    """0 where there is no such file, as of one that another process is about to delete."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_a_kill_while_the_tables_are_made_costs_nothing(tmp_path: Path) -> None:
    made = [tmp_path / name for name in ("mlflow.db", ".mlflow.db.tmp")]
    for least in (1, 250_000, 500_000):  # of about 950,000 bytes
        process = started(CONNECT, tmp_path)
        while not any(size_of(file) >= least for file in made):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert started(CONNECT, tmp_path).wait() == 0
    assert query(tmp_path, "SELECT name FROM experiments ORDER BY 1") == [("Default",), ("instep",)]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".dvc", "mlflow.db"]


@pytest.mark.slow
def test_a_kill_while_a_file_is_sent_leaves_no_half_of_it(tmp_path: Path) -> None:
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(200_000_000)
    process, place = started(SEND, tmp_path), tmp_path / "mlartifacts"
    while not [*place.glob("*/artifacts/checkpoints/.artifact.uploading.*")]:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [*place.glob("*/artifacts/checkpoints/large.bin")]
    assert started(SEND, tmp_path).wait() == 0
    (sent,) = place.glob("*/artifacts/checkpoints/*")
    assert sent.name == "large.bin"
    assert sent.stat().st_size == 200_000_000
