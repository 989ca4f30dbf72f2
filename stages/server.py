"""`python -m stages.server`, or `make server`: a team's MLflow server, on this machine."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from pipeline.errors import InputError, Interrupted
from pipeline.server import ADMIN, PASSWORD, database, settings
from stages import run_main


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.server",
        description="Serve MLflow to a team, with passwords, until Ctrl-C. It keeps runs in the "
        "PostgreSQL of MLFLOW_BACKEND_STORE_URI and files in MLFLOW_ARTIFACTS_DESTINATION; where "
        "one is not set, below the folder.",
        epilog="Other options go to `mlflow server`, as --host and --port.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(".server"),
        metavar="DIR",
        help="where what is not set is kept, and the first user's password; %(default)s",
    )
    known, others = parser.parse_known_args()
    folder = known.folder.resolve()
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)  # PostgreSQL's user comes through
    try:
        with database(folder, os.environ) as uri:
            made = settings(folder, os.environ, uri)
            if PASSWORD not in os.environ:
                print(f"the password of the user admin is in {folder / ADMIN}", flush=True)
            serve(others, made)
    except Interrupted:
        print("the server has ended")


def serve(options: list[str], made: dict[str, str]) -> None:
    """Run MLflow's server until it ends or a signal ends it.

    Raises:
        InputError: it has ended by itself.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", *options]
    with subprocess.Popen(command, env=made) as server:
        try:
            server.wait()
        finally:
            server.terminate()
    raise InputError(f"MLflow's server has ended, with code {server.returncode}: see above")


if __name__ == "__main__":
    run_main(main)
