"""`python -m tests.slow_s3`: a service as S3 that is far away, and fails now and then."""

import argparse
import time
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

Start = Callable[..., Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay", type=float, required=True, help="seconds before each answer")
    parser.add_argument("--failing", type=int, required=True, help="of so many answers, the last")
    options = parser.parse_args()
    service = DomainDispatcherApplication(create_backend_app)
    numbers = count(1)

    def answer(asked: dict[str, Any], start: Start) -> Iterable[bytes]:
        if asked["REQUEST_METHOD"] in ("GET", "HEAD", "PUT") and "/moto" not in asked["PATH_INFO"]:
            time.sleep(options.delay)
            if next(numbers) % options.failing == 0:
                start("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code></Error>"]
        return service(asked, start)

    run_simple(options.host, options.port, answer, threaded=True)


if __name__ == "__main__":
    main()
