"""Checkpoints that others wrote: read without their code and without running anything."""

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from pipeline.models.mmseg import from_mmseg


class Unread:
    """Takes the place of an object that holds no weights, and keeps nothing of it."""

    def __init__(self, *arguments: object) -> None:
        """Whatever it is made of, nothing is looked up and nothing called."""

    def __setstate__(self, state: object) -> None:
        """Forget the state."""


def _empty(*arguments: object) -> dict[Any, Any]:
    return {}


# What MMSegmentation's checkpoints name besides tensors and plain data, and what stands in for it.
STAND_INS: dict[str, Any] = {
    "mmengine.logging.message_hub.MessageHub": Unread,
    "mmengine.logging.history_buffer.HistoryBuffer": Unread,
    "mmengine.config.config.ConfigDict": dict,
    "builtins.getattr": Unread,  # how a pickle names HistoryBuffer's methods
    "collections.defaultdict": _empty,
    **dict.fromkeys(("builtins.dict", "builtins.list", "builtins.int", "builtins.float"), Unread),
    "numpy.dtype": Unread,
    "numpy.ndarray": Unread,
    "numpy.core.multiarray._reconstruct": Unread,  # numpy 1
    "numpy.core.multiarray.scalar": Unread,
    "numpy._core.multiarray._reconstruct": Unread,  # numpy 2
    "numpy._core.multiarray.scalar": Unread,
}


def read_safely(path: Path) -> Any:
    """What torch.save wrote: tensors on the CPU, plain data, and `Unread` for what is harmless.

    Raises:
        ValueError: the file is broken, or names anything else that a pickle could run.
    """
    allowed: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different kind for each way of being broken
        if found := re.search(r"\bGLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: not a checkpoint that can be loaded safely: it names {found[1]}, which "
                "is neither a tensor nor plain data and could run code; if you trust the file, "
                "save its state_dict alone, where it was made"
            ) from None
        # torch's own message recommends to load the file unsafely; its cause does not.
        reason = error.__context__ if isinstance(error, UnpicklingError) else error
        raise ValueError(
            f"{path}: not a checkpoint that can be loaded safely: {reason or error}"
        ) from error


def foreign_weights(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint of MMSegmentation, or of a bare state_dict, under our names.

    Of averaged weights (EMA) these are the ones that MMSegmentation's test.py measures, those of
    `state_dict` itself: mmengine's hook has put the averages there and the others into
    `ema_state_dict`; mmcv's hook keeps the other copy beside each parameter, as `ema_a_b` of `a.b`.
    Sources: mmengine/hooks/ema_hook.py (0.10.7), mmcv/runner/hooks/ema.py (1.x).

    Raises:
        ValueError: it is neither of the two.
    """
    given = content.get("state_dict", content)
    bare = given is content
    if not isinstance(given, dict) or (bare and not all(map(_is_weight, given.items()))):
        raise ValueError(
            f"{path}: no weights: neither a checkpoint of this tool, nor one of MMSegmentation "
            "(with a state_dict), nor a state_dict itself"
        )
    weights = dict(filter(_is_weight, given.items()))
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    copies = {f"ema_{name.replace('.', '_')}" for name in weights}
    return from_mmseg({name: value for name, value in weights.items() if name not in copies})


def _is_weight(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[0], str) and isinstance(entry[1], Tensor)


def foreign_classes(content: dict[str, Any]) -> list[str]:
    """The names of the classes, from `meta`; none where it does not tell."""
    meta = content.get("meta")
    dataset = meta.get("dataset_meta") if isinstance(meta, dict) else None
    for holder in (dataset, meta):
        if isinstance(holder, dict):
            names = holder.get("classes") or holder.get("CLASSES")
            if isinstance(names, list | tuple):
                return [str(name).strip() for name in names]  # ADE20K's 'bed ' has a blank
    return []
