"""Mutated spool files: MLFlow is told what is right, or a warning says what it is not told.

`python -m tests.fuzz.spool --cases 2000` prints a tally, and exits with 1 after anything else.
"""

import argparse
import copy
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.tracking import delivery
from pipeline.tracking.delivery import Delivery, deliver
from pipeline.tracking.spool import Spool, Start
from pipeline.tracking.store import Patience

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
        return [self.points, self.files, self.params.items(), self.tags.items(), [self.status]]

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


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes, damaged once."""
    lines = content.splitlines(keepends=True)
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    one = rng.randrange(len(lines)) if lines else 0
    match rng.randrange(10 if lines else 6):
        case 0 if content:
            place = rng.randrange(len(content))
            return (
                content[:place]
                + bytes([content[place] ^ 1 << rng.randrange(8)])
                + content[place + 1 :]
            )
        case 1:
            return content[:a] + content[b:]
        case 2:
            return content[:a] + content[a:b] + content[a:b] + content[b:]
        case 3:
            return content[:a] + rng.randbytes(rng.randrange(1, 50)) + content[a:]
        case 4:
            return content[:a]
        case 5:
            return rng.randbytes(rng.randrange(200))
        case 6:
            return b"".join(lines[:one] + lines[one + 1 :])
        case 7:
            return b"".join(lines[: one + 1] + lines[one:])
        case 8:
            return b"".join(rng.sample(lines, len(lines)))
        case _:
            place = rng.randrange(len(content))
            return (
                content[:place]
                + rng.choice([b"\n", b"\0", b'"', b"9", b"}"])
                + content[place + 1 :]
            )


def judge(store: Store, truth: Store, warned: bool) -> str:
    """`right`, `refused`, or what is wrong."""
    keys = [point[:2] for point in store.points]
    if len(keys) != len(set(keys)):
        return "a point is there twice"
    if store.runs != 1:
        return f"{store.runs} runs"
    for name in ("points", "files"):
        if set(getattr(store, name)) - set(getattr(truth, name)):
            return f"{name} that nobody has logged"
    for name in ("params", "tags"):
        if getattr(store, name).items() - getattr(truth, name).items():
            return f"{name} that nobody has logged"
    whole = sorted(store.points) == sorted(truth.points) and sorted(store.files) == sorted(
        truth.files
    )
    if whole:
        return "right"
    return "refused" if warned else "something is missing without a word"


class Warnings(logging.Handler):
    """Whether something was said since it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def emit(self, record: logging.LogRecord) -> None:
        self.said = True


def main() -> None:
    """Damage one file a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings = Warnings()
    log = logging.getLogger("instep")
    log.addHandler(warnings)
    log.propagate = False
    tally: Counter[str] = Counter()
    Patience.begin()
    with tempfile.TemporaryDirectory(prefix="instep-fuzz-") as made:
        os.environ["DVC_ROOT"] = made
        folder, kept = Spool(KEY).folder, Path(made) / "kept"
        write_spool()
        before, truth = Store(), Store()
        connected = [before]
        delivery.BATCH = 10
        delivery.connect = lambda *_: (connected[0], "1")
        half = Delivery(Spool(KEY))
        for _ in range(3):
            half.send()
        shutil.copytree(folder, kept)
        connected[0] = truth = copy.deepcopy(before)
        deliver(Spool(KEY))
        assert len(truth.points) == 4 * STEPS
        assert truth.status == "FINISHED"
        assert 0 < len(before.points) < len(truth.points)
        names = sorted(
            p.relative_to(kept) for p in kept.rglob("*") if p.is_file() and p.stat().st_size
        )
        for case in range(options.cases):
            rng = random.Random(f"{options.seed} {case}")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(kept, folder)
            path = folder / rng.choice(names)
            original = path.read_bytes()
            damaged = mutated(original, rng)
            path.write_bytes(damaged)
            # What a kill may leave, too: nothing is said of it.
            whole_lines = damaged.rpartition(b"\n")[0]
            torn = path.suffix == ".jsonl" and original.startswith(whole_lines)
            connected[0] = store = copy.deepcopy(before)
            warnings.said = False
            try:
                deliver(Spool(KEY))
                found = judge(store, truth, warnings.said or torn)
            except Exception:
                found = traceback.format_exc()
            if found not in ("right", "refused"):
                print(f"case {case}, {path.name}: {found}")
                found = "anything else"
            tally[found] += 1
    print(", ".join(f"{name}: {tally[name]}" for name in ("right", "refused", "anything else")))
    sys.exit(1 if tally["anything else"] else 0)


if __name__ == "__main__":
    main()
