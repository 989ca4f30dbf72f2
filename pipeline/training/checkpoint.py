"""Checkpoints: what they hold, and how they get to disk whole or not at all."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Checkpoint = dict[str, Any]


def build_checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, meta: dict[str, Any]
) -> Checkpoint:
    """Model, optimizer, the number of iterations done, and `meta`: tensors and plain data.

    Nothing in it differs between two equal runs, so equal runs have equal files.
    """
    parts = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": iteration,
    }
    return {**_canonical(parts), **_canonical(meta)}


def _canonical(value: Any) -> Any:
    """Equal content, equal bytes: pickle would record which strings and tuples are one object."""
    match value:
        case Tensor():
            return value.detach().cpu().clone(memory_format=torch.contiguous_format)
        case dict():
            return {_canonical(name): _canonical(item) for name, item in value.items()}
        case list() | tuple():
            return [_canonical(item) for item in value]
        case str():
            return sys.intern(value)
        case _:
            return value


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then put it in place.

    A kill at any moment leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint atomically."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load_file(path: Path) -> dict[str, Any]:
    """Read tensors and plain data on the CPU, without running anything that may be in the file.

    Raises:
        ValueError: the file is missing, broken, or holds anything else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different kind for each way of being broken
        raise ValueError(f"{path}: not a checkpoint that can be loaded safely: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    return content


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of this tool.

    Raises:
        ValueError: the file is missing, broken or no such checkpoint.
    """
    checkpoint = load_file(path)
    missing = {"model", "optimizer", "iteration", "best", "params"} - checkpoint.keys()
    if missing:
        raise ValueError(f"{path}: not a checkpoint of this tool: no {', '.join(sorted(missing))}")
    return checkpoint


def averaged(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the moving average of the weights as its model, if it has one."""
    return checkpoint | {"model": checkpoint.get("ema", checkpoint["model"])}


def load_weights(model: nn.Module, checkpoint: Checkpoint, source: str) -> None:
    """Load the weights of a checkpoint into a model; `source` names it in the error.

    Raises:
        ValueError: lists the tensors that are missing, unknown or of another shape.
    """
    weights: dict[str, Tensor] = checkpoint["model"]
    own = model.state_dict()
    wrong = [f"{name}: missing" for name in own.keys() - weights.keys()]
    wrong += [f"{name}: unknown" for name in weights.keys() - own.keys()]
    wrong += [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if wrong:
        listed = "\n".join(f"  {line}" for line in sorted(wrong))
        raise ValueError(f"{source} does not fit the model of params.yaml:\n{listed}")
    model.load_state_dict(weights)
