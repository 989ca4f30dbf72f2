"""Row 27: a kill while MLflow's tables are made leaves nothing that a later run can't use."""

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


def connecting(folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", CONNECT, str(folder)],
        cwd=folder,
        env=environment(PYTHONPATH=str(REPOSITORY)),
    )


@pytest.mark.slow
def test_a_kill_while_the_tables_are_made_costs_nothing(tmp_path: Path) -> None:
    made = [tmp_path / name for name in ("mlflow.db", ".mlflow.db.tmp")]
    for least in (1, 250_000, 500_000):  # of about 950,000 bytes
        process = connecting(tmp_path)
        while not any(file.stat().st_size >= least for file in made if file.exists()):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert connecting(tmp_path).wait() == 0
    assert query(tmp_path, "SELECT name FROM experiments ORDER BY 1") == [("Default",), ("instep",)]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".dvc", "mlflow.db"]
