"""A team's server, as `make server` starts it, with what a team does to it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
import requests

from pipeline.errors import InputError
from pipeline.server import FILES, PASSWORD, PostgreSQL, settings
from tests.packages import install
from tests.project import ended, environment
from tests.server import Bucket, LocalServer

CLIENTS = 8
PATIENCE = 300  # seconds
ADMIN = ("admin", "the first user's")
MEMBERS = {"anna": "password of anna", "ben": "another password"}


class Server(LocalServer):
    """`make server` on a free port, with PostgreSQL in `folder` and files in the bucket."""

    def __init__(self, folder: Path, bucket: Bucket) -> None:
        folder.chmod(0o711)  # the user postgres comes through
        command = [sys.executable, "-m", "stages.server", "--folder", str(folder)]
        own = bucket.keys | {PASSWORD: ADMIN[1], FILES: "s3://team/runs"}
        own |= {"PYTHONPATH": os.pathsep.join(sys.path), "MLFLOW_WORKERS": "1"}
        super().__init__(command, "/health", folder, **own)

    def __exit__(self, *_: object) -> None:
        """End as by Ctrl-C, and PostgreSQL with it."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait()

    def ask(self, method: str, path: str, auth: tuple[str, str] | None, **json: object) -> int:
        """The status of an answer."""
        return requests.request(
            method, f"{self.address}{path}", auth=auth, json=json or None, timeout=PATIENCE
        ).status_code


@dataclass
class Team:
    server: Server
    database: PostgreSQL
    bucket: Bucket
    folder: Path

    def rows(self, sql: str, *values: object) -> list[tuple]:
        """Rows of MLflow's database."""
        with psycopg.connect(self.database.uri) as connection:
            return connection.execute(sql, values).fetchall()

    def told(self) -> dict[str, int]:
        """The last step that MLflow has, by the run's name."""
        sql = "SELECT runs.name, max(step) FROM runs JOIN metrics USING (run_uuid) GROUP BY 1"
        return dict(self.rows(sql))

    def step(self, number: int) -> int:
        """The last one that a client has logged."""
        path = self.folder / str(number) / "step"
        return int(path.read_text() or 0) if path.exists() else 0

    def spools(self, number: int) -> list[Path]:
        """What waits at a client."""
        return [*(self.folder / str(number) / ".dvc/tmp/instep-spool").glob("*")]

    def sync(self, number: int, user: str, password: str) -> tuple[int, str]:
        """`python -m stages.runs --sync` at a client."""
        own = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
        return ended(self.folder / str(number), "runs", "--sync", **own)


@pytest.fixture(scope="module")
def team(folder: Path) -> Iterator[Team]:
    """A server with two members, to which nobody has logged."""
    try:
        install({"pg_ctl": "postgresql"}, "--no-install-recommends")
    except AssertionError:
        if os.geteuid() == 0:
            raise
        pytest.skip("PostgreSQL is not installed, and to install it needs root")
    with (
        Bucket(folder) as bucket,
        TemporaryDirectory(prefix="team-") as own,
        Server(Path(own), bucket) as server,
    ):
        for name, password in MEMBERS.items():
            user = {"username": name, "password": password}
            assert server.ask("POST", "/api/2.0/mlflow/users/create", ADMIN, **user) == 200
        yield Team(server, PostgreSQL(Path(own)), bucket, folder)


@pytest.fixture(scope="module")
def logged(team: Team) -> Team:
    """Eight clients have logged while database and server went, and one with a wrong password."""
    users = [f"{name}:{password}" for name, password in MEMBERS.items()] * (CLIENTS // 2)
    command = [sys.executable, "-m", "tests.team_clients", str(team.folder), *users, "anna:wrong"]
    own = {"MLFLOW_TRACKING_URI": team.server.address, "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
    own |= {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1000"}
    own |= {"MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": "1"}  # as if the files were large
    with (team.folder / "clients.log").open("wb") as log:
        clients = subprocess.Popen(
            command, env=environment(**own), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: len(team.told()) == CLIENTS, clients, log.name)
        team.database.stop("immediate")
        wait_for_new_steps(team, clients, log.name, team.database.start)
        team.server.kill()
        team.database.stop("immediate")
        wait_for_new_steps(team, clients, log.name, team.server.start)
        (team.folder / "end").touch()
        assert clients.wait(timeout=PATIENCE) == 0, Path(log.name).read_text()
    finally:
        clients.kill()
        clients.wait()
    return team


def wait_for_new_steps(
    team: Team, clients: "subprocess.Popen[bytes]", log: str, begin: Callable[[], None]
) -> None:
    """Let each client log some steps, begin again with what has ended, and wait for these steps."""
    first = [team.step(number) for number in range(CLIENTS)]
    wait_until(
        lambda: all(team.step(number) > first[number] + 1 for number in range(CLIENTS)),
        clients,
        log,
    )
    last = [team.step(number) for number in range(CLIENTS)]
    begin()
    wait_until(
        lambda: all(team.told()[f"client {n}"] >= last[n] for n in range(CLIENTS)), clients, log
    )


def wait_until(reached: Callable[[], bool], clients: "subprocess.Popen[bytes]", log: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert clients.poll() is None, Path(log).read_text()
        assert time.monotonic() < deadline, Path(log).read_text()
        time.sleep(0.3)


def test_nothing_of_eight_clients_is_lost_while_server_and_database_are_restarted(
    logged: Team,
) -> None:
    runs = dict(logged.rows("SELECT name, run_uuid FROM runs WHERE status = 'FINISHED'"))
    assert runs.keys() == {f"client {number}" for number in range(CLIENTS)}
    for number in range(CLIENTS):
        sql = "SELECT key, step, value FROM metrics WHERE run_uuid = %s ORDER BY step"
        points = logged.rows(sql, runs[f"client {number}"])
        steps = range(1, logged.step(number) + 1)
        assert points == [("train/loss", step, number + 1 / step) for step in steps]
        sql = "SELECT value FROM tags WHERE key = 'mlflow.user' AND run_uuid = %s"
        assert logged.rows(sql, runs[f"client {number}"]) == [([*MEMBERS][number % 2],)]
        assert not logged.spools(number)


def test_files_go_through_the_server_into_the_bucket(logged: Team) -> None:
    files = logged.bucket.files()
    said = (logged.database.data.parent / "server.log").read_text()
    assert "PUT /api/2.0/mlflow-artifacts/artifacts/" in said
    assert "/mpu/" not in said  # by which large files go into the bucket without the server
    rows = logged.rows("SELECT name, run_uuid, experiment_id FROM runs ORDER BY name")
    for name, run_id, experiment in rows[:CLIENTS]:
        kept = (logged.folder / name.split()[1] / "model.bin").read_bytes()
        key = f"runs/{experiment}/{run_id}/artifacts/checkpoints/model.bin"
        assert files[key] == kept


def test_a_wrong_password_is_said_and_what_was_logged_is_sent_with_the_right_one(
    logged: Team,
) -> None:
    said = (logged.folder / f"{CLIENTS}/log").read_text()
    assert f"MLflow at {logged.server.address} takes nothing: user or password are wrong" in said
    assert "wrong" not in said.replace("are wrong or missing", "")  # the password
    code, said = logged.sync(CLIENTS, "anna", "wrong")
    assert code == 1
    assert "user or password are wrong or missing: set MLFLOW_TRACKING_USERNAME" in said
    code, said = logged.sync(CLIENTS, "anna", MEMBERS["anna"])
    assert code == 0, said
    (run_id, status) = logged.rows(
        "SELECT run_uuid, status FROM runs WHERE name = %s", f"client {CLIENTS}"
    )[0]
    assert status == "FINISHED"
    steps = logged.rows("SELECT step FROM metrics WHERE run_uuid = %s ORDER BY step", run_id)
    assert steps == [(step,) for step in range(1, logged.step(CLIENTS) + 1)]
    kept = (logged.folder / f"{CLIENTS}/model.bin").read_bytes()
    assert kept in logged.bucket.files().values()
    assert not logged.spools(CLIENTS)


def test_members_log_into_what_others_have_made_and_do_not_delete_it(logged: Team) -> None:
    (run_id,), *_ = logged.rows("SELECT run_uuid FROM runs")

    def answers(path: str, **json: object) -> list[int]:
        return sorted(
            logged.server.ask("POST", f"/api/2.0/mlflow/{path}", member, **json)
            for member in MEMBERS.items()
        )

    assert answers("runs/set-tag", run_id=run_id, key="seen", value="yes") == [200, 200]
    assert answers("users/create", username="eve", password="one more password") == [403, 403]
    assert answers("runs/delete", run_id=run_id) == [200, 403]  # who made the experiment may


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/api/3.0/mlflow/server-info", 200),
        ("/static-files/index.html", 200),
        ("/version", 401),
        ("/", 401),
        ("/graphql", 401),
        ("/signup", 401),
        ("/api/2.0/mlflow/experiments/get-by-name?experiment_name=team", 401),
        ("/api/2.0/mlflow-artifacts/artifacts?path=1", 401),
        ("/api/2.0/mlflow-artifacts/artifacts/1/file", 401),
        ("/get-artifact?run_id=1&path=file", 401),
    ],
)
def test_who_has_no_password_sees_that_a_server_is_there(
    team: Team, path: str, status: int
) -> None:
    assert team.server.ask("GET", path, None) == status


def test_without_postgresql_or_with_a_long_path_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.server.programs", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"MLFLOW_BACKEND_STORE_URI is not set.*apt-get install"):
        PostgreSQL(tmp_path).start()
    with pytest.raises(InputError, match="107 bytes; name a shorter --folder"):
        PostgreSQL(tmp_path / ("long" * 25))


def test_secrets_that_the_server_makes_are_the_owner_s(tmp_path: Path) -> None:
    made = settings(tmp_path, {}, "postgresql://mlflow:50%25@/postgres")
    assert made[PASSWORD] == settings(tmp_path, {}, "postgresql:///other")[PASSWORD]
    for name in ("admin-password", "basic_auth.ini"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
