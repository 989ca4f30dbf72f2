"""Checkpoints: what they hold, and how they get to disk whole or not at all."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training.foreign import foreign_classes, foreign_weights, read_safely

log = logging.getLogger("instep")

Checkpoint = dict[str, Any]
OWN = {"model", "optimizer", "iteration", "best", "params"}  # by these a file is one of ours
AUXILIARY = "auxiliary_head."


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
        ValueError: the file is missing, broken, or holds what could run.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    content = read_safely(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    return content


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of this tool.

    Raises:
        ValueError: the file is missing, broken or no such checkpoint.
    """
    checkpoint = load_file(path)
    missing = OWN - checkpoint.keys()
    if missing:
        raise ValueError(
            f"{path}: not a checkpoint of this tool: no {', '.join(sorted(missing))}; the weights "
            "of another tool can be started from by train.load_from, not gone on with"
        )
    return checkpoint


def averaged(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The moving average of the weights, if the checkpoint has one, or else the weights."""
    weights: dict[str, Tensor] = checkpoint["ema" if "ema" in checkpoint else "model"]
    return weights


def load_weights(
    model: nn.Module, path: Path, strict: bool = True, classes: Sequence[str] = ()
) -> None:
    """Load the weights of a checkpoint, ours or MMSegmentation's, told apart by their content.

    Not `strict`: what does not fit is left as it is in the model, and logged. `classes` are the
    names of the model's classes; a warning says which of them have another name in the file.

    Raises:
        ValueError: the file can't be read, or lists the weights that are missing, unknown or of
            another shape; if not `strict`, only where no weight fits.
    """
    content = load_file(path)
    if content.keys() >= OWN:
        weights, theirs = averaged(content), content.get("classes") or []
    else:
        weights, theirs = foreign_weights(content, path), foreign_classes(content)
    source = str(path)
    if classes and theirs and len(theirs) != len(classes):
        source += f", of {len(theirs)} classes instead of {len(classes)},"
    fill(model, weights, source, strict)
    pairs = enumerate(zip(theirs, classes))
    renamed = [f"{i} is {there!r}, here {here!r}" for i, (there, here) in pairs if there != here]
    if renamed and len(theirs) == len(classes):
        log.warning("%s has other names for classes: %s", path, "; ".join(renamed))


def fill(model: nn.Module, weights: dict[str, Tensor], source: str, strict: bool = True) -> None:
    """Load weights by name and shape as `load_weights` does; `source` names them in the error."""
    fitting, wrong = _compare(model.state_dict(), weights)
    listed = "\n".join(f"  {line}" for line in sorted(wrong))
    if wrong and strict:
        raise ValueError(
            f"{source} does not fit the model of params.yaml:\n{listed}\n"
            "change the model, or take what fits: train.load_from with train.load_strict: false"
        )
    if not fitting:
        raise ValueError(f"{source} has no weight of the model of params.yaml:\n{listed}")
    if wrong:
        log.warning("%s is loaded but for what does not fit:\n%s", source, listed)
    model.load_state_dict(fitting, strict=False)


def _compare(
    own: dict[str, Tensor], weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that fit, and a line for each that does not.

    A count of batches may be missing, no result follows from it; an auxiliary head may be left
    over, a model that is only measured has none.
    """
    if not any(name.startswith(AUXILIARY) for name in own):
        weights = {name: w for name, w in weights.items() if not name.startswith(AUXILIARY)}
    missing = own.keys() - weights.keys()
    wrong = [f"{name}: missing" for name in missing if not name.endswith("num_batches_tracked")]
    fitting = {}
    for name, weight in weights.items():
        if name not in own:
            wrong.append(f"{name}: unknown")
        elif weight.shape != own[name].shape:
            shapes = tuple(weight.shape), tuple(own[name].shape)
            wrong.append(f"{name}: {shapes[0]} in the file, {shapes[1]} in the model")
        else:
            fitting[name] = weight
    return fitting, wrong
