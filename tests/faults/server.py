"""A real MLflow server on loopback, and a proxy before it that answers badly when told to."""

import http.client
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.server import LocalServer, free_port


class Server(LocalServer):
    """`mlflow server` with a SQLite file and a folder of artifacts below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "server.db"
        self.artifacts = folder / "artifacts"
        command = [
            *("mlflow", "server", "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self.database}"),
            *("--artifacts-destination", str(self.artifacts)),
        ]
        super().__init__(command, "/health", folder)

    def rows(self, sql: str, *values: object) -> list[tuple]:
        with sqlite3.connect(f"file:{self.database}?mode=ro", uri=True) as store:
            return store.execute(sql, values).fetchall()

    def content(self, experiment: str) -> list[dict[str, object]]:
        """All that the runs of an experiment hold, but ids, dates and the machine's load.

        A point that is there twice is there twice.
        """
        runs = self.rows(
            "SELECT run_uuid, runs.name, runs.status FROM runs "
            "JOIN experiments USING (experiment_id) WHERE experiments.name = ? ORDER BY start_time",
            experiment,
        )
        return [
            {
                "name": name,
                "status": status,
                "params": dict(self.rows("SELECT key, value FROM params WHERE run_uuid = ?", run)),
                "tags": {
                    key: value
                    for key, value in self.rows(
                        "SELECT key, value FROM tags WHERE run_uuid = ?", run
                    )
                    if key not in ("run.key", "mlflow.parentRunId")
                },
                "points": sorted(
                    point
                    for point in self.rows(
                        "SELECT key, step, value FROM metrics WHERE run_uuid = ?", run
                    )
                    if not point[0].startswith("system/")
                ),
                "data": self.rows(
                    "SELECT d.name, digest FROM datasets d JOIN inputs i ON "
                    "i.source_id = d.dataset_uuid WHERE i.destination_id = ?",
                    run,
                ),
                "files": self.files(run),
            }
            for run, name, status in runs
        ]

    def files(self, run: str) -> dict[str, bytes]:
        ((experiment,),) = self.rows("SELECT experiment_id FROM runs WHERE run_uuid = ?", run)
        folder = self.artifacts / str(experiment) / run / "artifacts"
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            re.sub(
                r"\+timestamp\+[^+.]*", "", path.relative_to(folder).as_posix()
            ): path.read_bytes()
            for path in found
        }


class Proxy:
    """Passes requests on to a port, unless it is told to be away, mute or slow.

    `asked` lists method and path of every request that has arrived. `lose` is asked about each
    request whether its answer gets lost: the server obeys it, and the connection breaks.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.asked: list[str] = []
        self.delay = 0.0
        self.lose: Callable[[str], bool] = lambda _: False
        self._speaking = threading.Event()
        self._speaking.set()
        self._listener: ThreadingHTTPServer | None = None
        self.back()

    def away(self) -> None:
        """Refuse connections."""
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None

    def mute(self) -> None:
        """Accept connections, and answer nothing."""
        self._speaking.clear()

    def back(self) -> None:
        """Pass requests on; those of the time of silence are lost."""
        self._speaking.set()
        if self._listener is None:
            proxy = self

            class Handler(BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    proxy.answer(self)

                do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

                def log_message(self, *_: object) -> None:
                    pass

            class Listener(ThreadingHTTPServer):
                daemon_threads = True
                block_on_close = False

                def handle_error(self, *_: object) -> None:
                    pass

            self._listener = Listener(("127.0.0.1", self.port), Handler)
            threading.Thread(target=self._listener.serve_forever, args=[0.05], daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        path = handler.path.partition("?")[0]
        self.asked.append(f"{handler.command} {path}")
        if not self._speaking.is_set():
            self._speaking.wait()
            return
        time.sleep(self.delay)
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
        try:
            connection.request(handler.command, handler.path, body, dict(handler.headers))
            response = connection.getresponse()
            content = response.read()
        except OSError:  # the server itself is away
            return
        finally:
            connection.close()
        if self.lose(f"{handler.command} {path}"):
            return
        handler.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


def lost_once(part: str) -> Callable[[str], bool]:
    """Loses the answer to the first request that has this in its path."""
    left = [part]

    def lose(request: str) -> bool:
        return bool(left) and left[0] in request and bool(left.pop())

    return lose
