"""Tests run side by side: more threads than cores would only wait for each other."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.interruption import SIGNALS

os.environ.setdefault("OMP_NUM_THREADS", "1")

SLOW_FOLDERS = [Path(__file__).parent / name for name in ("distributed", "pipeline")]


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Tests that start ranks or whole projects are slow; any other is quick until it says no."""
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in SLOW_FOLDERS):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What a stage that runs in this process does to signals ends with its test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the tests of one file, gone after them: checkpoints would fill the disk."""
    path = tmp_path_factory.mktemp("shared")
    yield path
    shutil.rmtree(path)
