"""Mutated spool files: MLflow is told what is right, or a warning says what it is not told."""

import copy
import logging
import os
import re
import shutil
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

from pipeline.errors import InputError
from pipeline.tracking import delivery
from pipeline.tracking.delivery import Delivery, deliver
from pipeline.tracking.spool import Spool, Start
from pipeline.tracking.store import Patience
from tests.fuzz.door import RIGHT, anywhere, main, mutated

TORN = "accepted as what a kill leaves, of which nothing is said"
KEY = "20261126-120000-0123abcd"
START = Start(
    uri="sqlite:///never-opened.db",
    experiment="fuzz",
    name="unet (first)",
    time=1,
    params={"train.lr": "0.1", "data.classes": "['sky', 'tree']"},
    tags={"git.rev": "0123"},
    dataset=("feet", "md5", "data"),
    evaluation=None,
    run_id=None,
    training=None,
)
STEPS = 20
PIECES = (b"\n", b"\0", b'"', b"9", b"}")


class Store:
    """What a client of MLflow does of it, in memory, with one run."""

    def __init__(self) -> None:
        self.runs = 0
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.points: list[tuple[str, int, float]] = []
        self.files: list[tuple[str, bytes]] = []
        self.status = "RUNNING"

    def told(self) -> list[Any]:
        words = [self.params.items(), self.tags.items(), [self.status]]
        return [sorted(told) for told in (self.points, self.files, *words)]

    def run(self) -> Any:
        last: dict[str, int] = {}
        for key, step, _ in self.points:
            last[key] = max(step, last.get(key, step))
        metrics = [SimpleNamespace(key=key, step=step) for key, step in last.items()]
        return SimpleNamespace(
            info=SimpleNamespace(
                run_id="1",
                run_name="unet (first)",
                status=self.status,
                lifecycle_stage="active",
                artifact_uri="mlflow-artifacts:/1",
            ),
            data=SimpleNamespace(
                params=self.params,
                tags=self.tags,
                to_proto=lambda: SimpleNamespace(metrics=metrics),
            ),
            inputs=None,
        )

    def search_runs(self, *_: Any, **__: Any) -> list[Any]:
        return [self.run()] if self.runs else []

    def get_run(self, _: str) -> Any:
        return self.run()

    def create_run(self, _: str, __: int, tags: dict[str, str], ___: str) -> Any:
        self.runs += 1
        self.tags |= tags
        return self.run()

    def log_batch(self, _: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        self.points += [(point.key, point.step, point.value) for point in metrics]
        self.params |= {param.key: param.value for param in params}
        self.tags |= {tag.key: tag.value for tag in tags}

    def get_metric_history(self, _: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=step) for name, step, _ in self.points if name == key]

    def log_artifact(self, _: str, path: str, folder: str | None) -> None:
        name = f"{folder or ''}/{Path(path).name}"
        self.files = [file for file in self.files if file[0] != name]
        self.files.append((name, Path(path).read_bytes()))

    def set_terminated(self, _: str, status: str, __: int) -> None:
        self.status = status

    def log_inputs(self, *_: Any) -> None:
        pass

    def update_run(self, *_: Any, **__: Any) -> None:
        pass

    def delete_tag(self, _: str, name: str) -> None:
        self.tags.pop(name, None)


def write_spool() -> None:
    """Two sessions of one training: a killed one, and the one that finished it."""
    spool = Spool(KEY)
    for number in range(2):
        writer = spool.begin(START)
        for step in range(1 + number * STEPS, 1 + (number + 1) * STEPS):
            values = {"train/loss": 1 / step, "val/mean_iou": step / 100}
            writer.write("points", {"time": step, "step": step, "values": values})
            if step % 7 == 0:
                writer.write("tags", {f"tag{step}": str(step)})
                writer.keep(f"picture {step}".encode() * 9, "images", f"{step}.png")
        if number:
            writer.write("end", {"status": "FINISHED", "time": 9, "reason": None})
        writer.close()


class Said(logging.Handler):
    """The warnings of a case."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def here(root: Path, store: Store) -> Spool:
    """The spool below a folder; whoever delivers it finds this store."""
    os.environ["DVC_ROOT"] = str(root)
    delivery.connect = lambda *_: (store, "1")
    return Spool(KEY)


def make(root: Path) -> tuple[Store, Store]:
    """Half deliver a spool below `root`; what the store has then, and what it has in the end."""
    before = Store()
    spool = here(root, before)
    with mock.patch("secrets.token_hex", return_value="0123abcd"):  # of files' names
        write_spool()
    half = Delivery(spool)
    for _ in range(3):
        half.send()
    truth = copy.deepcopy(before)
    with TemporaryDirectory() as other:
        shutil.copytree(root, other, dirs_exist_ok=True)
        deliver(here(Path(other), truth))
    assert len(truth.points) == 4 * STEPS
    assert truth.status == "FINISHED"
    assert 0 < len(before.points) < len(truth.points)
    return before, truth


def attempt(kept: Path, before: Store, truth: Store, said: Said, rng: Random, root: Path) -> str:
    """Deliver the rest of the spool, of which one file is mutated: nothing is there that is wrong.

    Something may be missing if a warning says so; that is then judged as a refusal's message.
    """
    shutil.copytree(kept, root, dirs_exist_ok=True)
    path = rng.choice(sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size))
    original = path.read_bytes()
    damaged = mutated(original, rng, pieces=PIECES, place=_at_a_line, changes=1)
    path.write_bytes(damaged)
    store = copy.deepcopy(before)
    said.lines.clear()
    deliver(here(root, store))
    keys = [point[:2] for point in store.points]
    assert len(keys) == len(set(keys)), "a point is there twice"
    assert store.runs == 1
    assert set(store.points) <= set(truth.points)
    assert set(store.files) <= set(truth.files)
    assert store.params.items() <= truth.params.items()
    assert store.tags.items() <= truth.tags.items()
    if store.told() == truth.told():
        return RIGHT
    if said.lines:
        raise InputError("\n".join(said.lines))
    torn = path.suffix == ".jsonl" and original.startswith(damaged.rpartition(b"\n")[0])
    assert torn, f"something is missing without a word, of {path.name}"
    return TORN


def _at_a_line(content: bytearray, rng: Random) -> int:
    """The beginning of a line, or any place."""
    lines = [0, *(found.end() for found in re.finditer(b"\n", content))]
    return rng.choice([rng.choice(lines), anywhere(content, rng)])


if __name__ == "__main__":
    said = Said()
    logging.getLogger("instep").addHandler(said)
    Patience.begin()
    delivery.BATCH = 10
    with TemporaryDirectory(prefix="instep-fuzz-") as kept:
        main(partial(attempt, Path(kept), *make(Path(kept)), said))
