"""Servers on loopback, each in a process of its own: what MLflow serves, and a bucket of S3."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import boto3

from tests.project import environment


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


class LocalServer:
    """A command that listens on a free port of --host, from its first answer for `page` on.

    It runs in `folder`, and what it says is in server.log there.
    """

    def __init__(self, command: list[str], page: str, folder: Path, **extra: str) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self._page, self._folder, self._extra = page, folder, extra
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        said = self._folder / "server.log"
        with said.open("wb") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=environment(**quiet, **self._extra),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 240
        try:
            while not self.answers():
                assert self.process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.1)
        except BaseException:
            self.kill()
            raise

    def answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", self._page)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Bucket(LocalServer):
    """A service as S3 with the bucket `team`, which it forgets at its end.

    `keys` are those to it, and where it is for boto3 and MLflow.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__([sys.executable, "-m", "moto.server"], "/moto-api/", folder)
        self.keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
        self.keys |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": self.address}
        self.keys |= {"MLFLOW_S3_ENDPOINT_URL": self.address}
        named = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        self.client: Any = boto3.client(
            "s3", region_name="us-east-1", endpoint_url=self.address, **named
        )
        self.client.create_bucket(Bucket="team")

    def files(self) -> dict[str, bytes]:
        """What the bucket holds, by key."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="team")
        keys = [one["Key"] for page in pages for one in page.get("Contents", [])]
        return {key: self.client.get_object(Bucket="team", Key=key)["Body"].read() for key in keys}
