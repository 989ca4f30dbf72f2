"""A team's MLflow server on this machine, and a PostgreSQL database where none is given.

What it is told stands in MLflow's own variables of the environment; what is set there stays so.
"""

import os
import pwd
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.errors import InputError, shown

DATABASE = "MLFLOW_BACKEND_STORE_URI"
FILES = "MLFLOW_ARTIFACTS_DESTINATION"
CONFIG, PASSWORD = "MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_AUTH_ADMIN_PASSWORD"
ADMIN = "admin-password"  # a file of the folder
LONGEST_SOCKET = 107  # bytes of a socket's path, at most: unix(7)

# What differs from MLflow's own. Members see all experiments and log into each, whoever made it;
# to delete them is for who made them. A password is compared with its hash, which takes a tenth of
# a second, once in a minute and not for each request.
AUTHENTICATION = {"default_permission": "EDIT", "auth_cache_ttl_seconds": "60"}
DEFAULTS = {
    "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",  # what MLflow has no rule for is refused
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # for language models
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def settings(folder: Path, given: Mapping[str, str], uri: str) -> dict[str, str]:
    """The server's environment: what is given, and what it lacks. `uri` is the database's.

    Secrets that are made here stand in files of `folder` which its owner alone can read.
    """
    made = DEFAULTS | {
        DATABASE: uri,
        # It signs the form for new users, and all processes of a server need the same.
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }
    if FILES not in given:
        (folder / "artifacts").mkdir(mode=0o700, exist_ok=True)
        made[FILES] = str(folder / "artifacts")
    if PASSWORD not in given:
        made[PASSWORD] = _admin_password(folder / ADMIN)
    if CONFIG not in given:
        made[CONFIG] = str(folder / "basic_auth.ini")
        _write_secret(folder / "basic_auth.ini", _config(uri))
    return {**made, **given, DATABASE: uri}


@contextmanager
def database(folder: Path, given: Mapping[str, str]) -> Iterator[str]:
    """The URI of the database that is given, or of one in `folder` that runs as long as the block.

    Raises:
        InputError: PostgreSQL can't be had here.
    """
    if uri := given.get(DATABASE):
        yield uri
        return
    own = PostgreSQL(folder)
    own.start()
    try:
        yield own.uri
    finally:
        own.stop()


class PostgreSQL:
    """A PostgreSQL of our own, with its data and its socket in `folder`/postgresql.

    It listens on that socket alone, and the system lets nobody come to it but its owner: so it asks
    for no password. Where this process is root's, the owner is the user postgres, as PostgreSQL
    refuses to be root.
    """

    def __init__(self, folder: Path) -> None:
        self.data = folder / "postgresql"
        self.uri = f"postgresql://mlflow@/postgres?host={quote(str(self.data))}"
        self._log = self.data / "server.log"
        socket = self.data / ".s.PGSQL.5432"
        if len(os.fsencode(socket)) > LONGEST_SOCKET:
            raise InputError(
                f"{socket}: a socket's path may have {LONGEST_SOCKET} bytes; name a shorter "
                f"--folder, or set {DATABASE} to the URI of a database"
            )

    def start(self) -> None:
        """Have it running: it may be so since a server before was killed.

        Raises:
            InputError: it does not start.
        """
        _program("pg_ctl")  # before it is asked for the user that comes with it
        if not (self.data / "PG_VERSION").exists():
            self._create()
        if self._execute(["pg_ctl", "status"], check=False).returncode:
            own = "-c listen_addresses='' -c unix_socket_directories=."
            self._execute(["pg_ctl", "start", "--log", str(self._log), "--options", own])

    def stop(self, mode: str = "fast") -> None:
        """End it with all connections, if it runs: properly, or as if by a kill (immediate)."""
        self._execute(["pg_ctl", "stop", "--mode", mode], check=False)

    def _create(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True)
        if user := self._owner().get("user"):
            shutil.chown(self.data, user, user)
        options = ("--username=mlflow", "--auth=trust", "--encoding=UTF8", "--no-locale")
        self._execute(["initdb", *options])

    def _execute(
        self, command: Sequence[str], check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Run one of PostgreSQL's programs on the data."""
        program, *arguments = command
        done = subprocess.run(
            [_program(program), *arguments, "--pgdata", str(self.data)],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for the server, which is to end before
            **self._owner(),
        )
        if check and done.returncode:
            lines = done.stdout.strip().splitlines()
            why = next((line for line in lines if line.startswith(program)), "nothing is said")
            raise InputError(
                f"{self.data}: {shown(why)}; mend that, for which {self._log} may say more, name "
                f"another --folder, or set {DATABASE} to the URI of a database"
            )
        return done

    def _owner(self) -> dict[str, Any]:
        """As whom PostgreSQL runs, for subprocess."""
        if os.geteuid():
            return {}
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            raise InputError(
                "PostgreSQL refuses to run as root, and there is no user postgres; run this as "
                f"another user, or set {DATABASE} to the URI of a database"
            ) from None
        return {"user": "postgres", "group": "postgres", "extra_groups": []}


def programs() -> str:
    """Where programs are looked for: PATH, and where Debian has PostgreSQL's, the newest first."""
    found = Path("/usr/lib/postgresql").glob("*/bin")
    versions = sorted(found, key=lambda path: float(path.parent.name), reverse=True)
    return os.pathsep.join([os.environ["PATH"], *map(str, versions)])


def _program(name: str) -> str:
    if found := shutil.which(name, path=programs()):
        return found
    raise InputError(
        f"{DATABASE} is not set, and PostgreSQL's {name} is not installed; run `apt-get install "
        "postgresql`, or set it to the URI of a database"
    )


def _admin_password(path: Path) -> str:
    """The first user's, made once. MLflow looks at it while it has no such user."""
    if not path.exists():
        _write_secret(path, secrets.token_urlsafe(16))
    return path.read_text()


def _config(uri: str) -> str:
    """What MLflow's basic authentication reads; it keeps users and roles in the same database."""
    own = AUTHENTICATION | {"database_uri": uri.replace("%", "%%"), "admin_username": "admin"}
    return "".join(["[mlflow]\n", *(f"{name} = {value}\n" for name, value in own.items())])


def _write_secret(path: Path, text: str) -> None:
    """Only its owner can read it, from the beginning."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
