"""Real projects for the tests: a copy of this repository with a small data set of its own."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import cv2
import numpy as np
from ruamel.yaml import YAML

from tests.forked import DVC, Forked

REPOSITORY = Path(__file__).resolve().parents[1]
STARTED_BY_OTHERS = ("DVC_", "MLFLOW_", "TORCHELASTIC_", "GIT_", "SLURM", "SBATCH_")

STAGES = ("prepare", "train", "evaluate", "report", "gate")
ABSENT = object()  # a key that is not to stand in params.yaml

# A training of seconds, on photographs of mixed sizes. The network is the quickest there is: of
# a crop of 32 its map is one pixel, so it learns which class is frequent, and no more.
SMALL = {
    "data.name": "feet",
    "data.format.name": "pairs",
    "data.root": "data/feet",
    "data.classes": ["background", "foot", "arch"],
    "data.format.splits.source": "given",
    "augmentation.crop_size": [32, 32],
    "augmentation.ratio_range": [0.5, 2.0],
    "augmentation.photometric": True,
    "model.head.name": "pspnet",
    "model.backbone.name": "mit_b0",
    "model.backbone.output_stride": 32,
    "model.backbone.pretrained": None,
    "model.head.channels": 16,
    "model.head.dropout": 0.1,
    "train.workers": 0,
    "train.seed": 0,
    "train.batch_size": 4,
    "train.accumulation": 1,
    "train.iterations": 8,
    "train.optimizer": "sgd",
    "train.lr": 0.01,
    "train.schedule.warmup_iters": 2,
    "train.checkpoint.interval": 4,
    "evaluation.interval": 4,
    "evaluation.baseline": None,
    "tracking.log_interval": 1,
}

# What networks change of SMALL. Those whose maps are coarse get more pixels: of a map of one pixel
# attention learns nothing, and batch normalisation of so few values is chaotic.
NETWORKS: dict[str, dict[str, object]] = {
    "pspnet": {"model.backbone.name": "resnet18", "model.backbone.output_stride": 8},
    "pointrend": {
        "model.head.name": "pointrend",
        "model.head.train_points": 64,
        "model.backbone.name": "resnet18c",
        "augmentation.crop_size": [64, 64],
    },
    "segformer": {
        "model.head.name": "segformer",
        "model.head.aux_weight": 0.4,
        "model.backbone.drop_path": 0.2,
        "augmentation.crop_size": [64, 64],
    },
    # Its BN carries the activation; random weights would leave means of 0, and only rounding.
    "lite0": {
        "model.head.name": "unet",
        "model.head.channels": [128, 64, 48, 32, 16],
        "model.backbone.name": "efficientnet_lite0",
        "model.backbone.pretrained": "imagenet",
        "train.iterations": 5,
    },
    "eomt": {
        "model.head.name": "eomt",
        "model.head.channels": ABSENT,
        "model.head.dropout": ABSENT,
        "model.head.num_queries": 6,
        "model.head.num_blocks": 2,
        "model.head.train_points": 64,
        "model.backbone.name": "vit_tiny_patch16_dinov3",
        "model.backbone.drop_path": 0.1,
        "model.loss": None,
        "augmentation.crop_size": [64, 64],
        "train.optimizer": "adamw",
        "train.lr": 0.001,
        "train.layer_decay": 0.8,
    },
    "library": {
        "model.head.name": "smp.FPN",
        "model.head.channels": ABSENT,
        "model.head.dropout": ABSENT,
        "model.backbone.name": "resnet18",
        "augmentation.crop_size": [64, 64],
        "train.iterations": 5,
    },
}


def make_project(folder: Path, counts: dict[str, int], **changes: object) -> Path:
    """A git repository with this code, `counts` images a split below data/feet, and params.

    It has an MLflow store that is empty.
    """
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in run(listed, REPOSITORY).stdout.splitlines():
        source = REPOSITORY / name
        if source.is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    (folder / "mlflow.db").write_bytes(empty_store())
    draw_feet(folder / "data/feet", counts)
    set_params(folder, SMALL | changes)
    run(["git", "init", "-q", "-b", "main"], folder)
    commit(folder, "A small project")
    return folder


@cache
def empty_store() -> bytes:
    """An MLflow store without a run: to create its tables takes MLflow seconds."""
    from mlflow import MlflowClient

    with TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db")
        return Path(folder, "mlflow.db").read_bytes()


def untrained(project: Path, folder: Path, **changes: object) -> Path:
    """A copy of a project that is prepared, without what it has trained."""
    trained = shutil.ignore_patterns("outputs", "tmp", "mlartifacts")
    shutil.copytree(project, folder, ignore=trained)
    (folder / "mlflow.db").write_bytes(empty_store())
    set_params(folder, changes)
    return folder


def draw_feet(root: Path, counts: dict[str, int]) -> None:
    """Images of mixed sizes, each a foot-like ellipse with an arch, and their class ids."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            height, width = (int(side) for side in rng.integers(40, 96, 2))
            target = np.zeros((height, width), np.uint8)
            centre = (width // 2 + int(rng.integers(-5, 6)), height // 2)
            cv2.ellipse(target, centre, (width // 3, height // 3), 0, 0, 360, 1, -1)
            cv2.ellipse(target, centre, (width // 6, height // 8), 30, 0, 360, 2, -1)
            colours = rng.integers(0, 256, (3, 3))
            image = colours[target] + rng.integers(-20, 21, (height, width, 3))
            target[:3] = 255
            for kind, data in (
                ("images", np.clip(image, 0, 255).astype(np.uint8)),
                ("targets", target),
            ):
                path = root / kind / split / f"foot {number:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(path), data)


def set_params(project: Path, changes: dict[str, object]) -> None:
    """Change params.yaml, key by dotted key, in their order.

    The name of a head or a format takes the keys of the one before it away.
    """
    yaml = YAML()
    path = project / "params.yaml"
    document = yaml.load(path)
    for name, value in changes.items():
        *sections, key = name.split(".")
        section = document
        for part in sections:
            section = section.setdefault(part, {})
        if key == "name" and sections[-1] in ("head", "format"):
            section.clear()
        section[key] = value
        if value is ABSENT:
            del section[key]
    yaml.dump(document, path)


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without what a surrounding DVC, MLflow, torchrun or Slurm set."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(STARTED_BY_OTHERS)}
    paths = {"PATH": f"{Path(sys.executable).parent}:{own['PATH']}"}
    identity = {"GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@example.org"}
    identity |= {"GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@example.org"}
    return own | paths | identity | extra


def run(
    command: list[str], cwd: Path, check: bool = True, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is in the error if it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}")
    return done


def dvc(project: Path, *arguments: str, check: bool = True, **extra: str) -> str:
    """What `dvc ...` prints, which is to end well, unless `check` is False."""
    return _said(DVC, project, arguments, check, extra)


def wait_for_queue(project: Path, count: int) -> None:
    """Until so many of the experiments that were queued have ended well; one that fails is told."""
    deadline = time.monotonic() + 900
    while (said := dvc(project, "queue", "status")).count("Success") < count:
        failed = [line.split()[1] for line in said.splitlines() if line.endswith("Failed")]
        assert not failed, dvc(project, "queue", "logs", failed[0])
        assert time.monotonic() < deadline, said
        time.sleep(2)


def stage(project: Path, name: str, *arguments: str, check: bool = True, **extra: str) -> str:
    """What `python -m stages.NAME ...` prints, which is to end well, unless `check` is False."""
    return _said(f"stages.{name}", project, arguments, check, extra)


def ended(project: Path, name: str, *arguments: str, **extra: str) -> tuple[int, str]:
    """The exit code of `python -m stages.NAME ...`, and what it prints."""
    return _ended(f"stages.{name}", project, arguments, extra)


def reproduced(project: Path, last: str = "gate") -> None:
    """Leave what `dvc repro LAST` leaves: in a third of the time, as DVC starts no stage itself."""
    names = STAGES[: STAGES.index(last) + 1]
    for name in names:
        stage(project, name)
    dvc(project, "commit", "--force", *names)


def _said(
    module: str, project: Path, arguments: Sequence[str], check: bool, extra: Mapping[str, str]
) -> str:
    code, said = _ended(module, project, arguments, extra)
    if check and code:
        raise AssertionError(f"{module} {arguments} ended with {code}:\n{said}")
    return said


def _ended(
    module: str, project: Path, arguments: Sequence[str], extra: Mapping[str, str]
) -> tuple[int, str]:
    with NamedTemporaryFile() as file:
        own = {"env": environment(**extra), "said": Path(file.name)}
        code = Forked(module, *arguments, cwd=project, **own).wait()
        return code, Path(file.name).read_text()


def commit(project: Path, message: str) -> None:
    run(["git", "add", "-A"], project)
    run(["git", "commit", "-q", "-m", message], project)


def metrics(project: Path) -> dict[str, object]:
    return json.loads((project / "metrics.json").read_text())


def query(project: Path, sql: str) -> list[tuple]:
    """Rows of the MLflow store."""
    with sqlite3.connect(f"file:{project / 'mlflow.db'}?mode=ro", uri=True) as store:
        return store.execute(sql).fetchall()
