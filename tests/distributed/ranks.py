"""Real ranks on a project of the tests, and what they make of it."""

import shutil
from pathlib import Path

import torch

from tests.forked import Forked
from tests.project import REPOSITORY, SMALL, environment, set_params
from tests.server import free_port

CHANGES = {
    "train.precision": "fp64",
    "train.iterations": 6,
    "train.batch_size": 8,
    "train.accumulation": 2,
    "train.validate": False,
    "model.head.dropout": 0.5,
    "tracking.log_interval": 10,
}


def set_up(project: Path, **changes: object) -> None:
    """The parameters of a training, and nothing left of the ones before."""
    shutil.copy(REPOSITORY / "params.yaml", project)
    set_params(project, SMALL | CHANGES | changes)
    for left in (".dvc/tmp/instep", "mlartifacts"):
        shutil.rmtree(project / left, ignore_errors=True)


def begun(
    project: Path, processes: int, module: str, *arguments: str, **extra: str
) -> list[Forked]:
    """Ranks, started by nothing that sets more than their environment."""
    meeting = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    meeting["MASTER_PORT"] = str(free_port())
    return [
        Forked(
            module,
            *arguments,
            cwd=project,
            env=environment(**meeting, **extra, RANK=rank, LOCAL_RANK=rank),
            said=project / f"rank{rank}.txt",
        )
        for rank in map(str, range(processes))
    ]


def ranks_of(
    project: Path, processes: int, module: str, *arguments: str, **extra: str
) -> list[int]:
    """The exit codes of such ranks."""
    ranks = begun(project, processes, module, *arguments, **extra)
    return [rank.wait(timeout=300) for rank in ranks]


def train(
    project: Path, processes: int, module: str = "stages.train", *arguments: str, **changes: object
) -> Path:
    """Train anew and return the last checkpoint."""
    set_up(project, **changes)
    codes = ranks_of(project, processes, module, *arguments)
    assert not any(codes), (project / "rank0.txt").read_text()
    return project / "outputs/checkpoints/last.pt"


def difference(one: Path, other: Path) -> float:
    """The largest difference of a tensor, averaged ones included, relative to its norm.

    A bias that batch normalisation takes away again learns nothing: it holds 1e-18 of rounding.
    """
    a, b = (tensors(torch.load(path, weights_only=True)) for path in (one, other))
    assert a.keys() == b.keys()
    return max(
        float((a[name] - b[name]).double().norm() / a[name].double().norm().clamp(min=1e-6))
        for name in a
    )


def tensors(checkpoint: dict) -> dict[str, torch.Tensor]:
    average = checkpoint.get("ema", {})
    return checkpoint["model"] | {f"ema.{name}": value for name, value in average.items()}
