"""Checkpoints: what they hold, and how they get to disk whole or not at all."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pipeline import distributed
from pipeline.disk import FORMAT, check_format, write_atomically
from pipeline.errors import InputError, shown
from pipeline.models.vit import ViT
from pipeline.models.weights import (
    CHECKSUM,
    DESCRIPTION,
    OWN,
    averaged,
    classes_of,
    is_own,
    model_md5,
    network_of,
    read_file,
    tensors_md5,
    weights_of,
)
from pipeline.params import main_checkout

log = logging.getLogger("instep")

GOES_ON = OWN | {"best", "iteration", "optimizer"}
AUXILIARY = "auxiliary_head."
LISTED = 12  # weights in a message
KINDS = {"missing": ": missing", "unknown": ": unknown", "of another shape": " in the file, "}


class Best(TypedDict):
    """Which validation had the highest mean IoU so far."""

    iteration: int
    mean_iou: float


class Description(TypedDict):
    """What a checkpoint says of itself: enough to use its weights without this repository.

    `params` are the parameters that change the result, by the sections of params.yaml.
    """

    classes: Sequence[str]
    palette: Sequence[Sequence[int]]
    ignore_index: int
    exif: str
    frequency: Sequence[float]
    params: dict[str, Any]


class Checkpoint(Description):
    """All that a training goes on from, after `iteration` optimizer steps.

    `ema` is the moving average of the weights, `scaler` the state of the gradient scaler.
    """

    format: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    iteration: int
    best: Best | None
    scaler: NotRequired[dict[str, Any]]
    ema: NotRequired[dict[str, Tensor]]


def build_checkpoint(
    states: dict[str, Any], iteration: int, best: Best | None, description: Description
) -> Checkpoint:
    """A checkpoint of `states`, the learner's, whole and on the CPU.

    Nothing in it differs between two equal runs, so equal runs have equal files.
    """
    meta = {"format": FORMAT, "iteration": iteration, "best": best}
    return cast("Checkpoint", _canonical(states) | _canonical(meta | dict(description)))


def weights_md5(network: nn.Module) -> str:
    """md5 over the names, types, shapes and bytes of all that a network holds.

    Of a sharded one all ranks have to ask for it.
    """
    held = network.state_dict().items()
    return tensors_md5((name, distributed.whole(tensor)) for name, tensor in held)


def described_anew(checkpoint: Checkpoint, description: Description) -> Checkpoint:
    """The same checkpoint, as another training with the same result would have written it."""
    return cast("Checkpoint", _canonical(dict(checkpoint) | dict(description)))


def _canonical(value: Any) -> Any:
    """Equal content, equal bytes: pickle would record which strings and tuples are one object."""
    match value:
        case Tensor():
            return value.detach().contiguous()
        case dict():
            return {_canonical(name): _canonical(item) for name, item in value.items()}
        case list() | tuple():
            return [_canonical(item) for item in value]
        case str():
            return sys.intern(value)
        case _:
            return value


def save(content: Any, path: Path, before: Path | None = None) -> None:
    """Write a checkpoint, or what holds one, atomically; `before` is where the old file goes.

    Raises:
        InputError: there is no room for it; the text says how much it needs and how much there is.
    """
    size = _tensor_bytes(content)
    write_atomically(path, lambda file: torch.save(content, file), size=size, before=before)


def _tensor_bytes(content: Any) -> int:
    """What a file needs at least. The rest of it is small."""
    match content:
        case Tensor():
            return content.nbytes
        case dict():
            return sum(map(_tensor_bytes, content.values()))
        case list() | tuple():
            return sum(map(_tensor_bytes, content))
        case _:
            return 0


def save_model(checkpoint: Checkpoint, temperature: float | None, path: Path) -> None:
    """Write what predictions need of a checkpoint as one file of safetensors, atomically.

    It holds the weights that are measured and, as JSON in its metadata, the checkpoint's
    description, the `temperature` that calibrates it, null where none is known, and a checksum of
    all these.

    Raises:
        InputError: there is no room for it; the text says how much it needs and how much there is.
    """
    known = {name: checkpoint[name] for name in ("format", *Description.__annotations__)}  # type: ignore[literal-required]
    weights, described = averaged(dict(checkpoint)), known | {"temperature": temperature}
    described |= {CHECKSUM: model_md5(described, weights)}
    content = save_tensors(weights, {DESCRIPTION: json.dumps(described, ensure_ascii=False)})
    write_atomically(path, lambda file: file.write(content), size=len(content))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of this tool.

    Raises:
        InputError: the file is missing, broken, no such checkpoint or one of another version.
    """
    checkpoint = read_file(path)
    missing = GOES_ON - checkpoint.keys()
    if missing:
        raise InputError(
            f"{path}: not a checkpoint of this tool: no {', '.join(sorted(missing))}; weights "
            "alone can be started from by train.load_from, not gone on with"
        )
    check_format(checkpoint, path, "take its weights alone, by train.load_from")
    return cast("Checkpoint", checkpoint)


def load_weights(
    model: nn.Module, path: Path, strict: bool = True, classes: Sequence[str] = ()
) -> None:
    """Load the weights of a checkpoint, ours or MMSegmentation's, told apart by their content.

    Not `strict`: what does not fit is left as it is in the model, and logged. `classes` are the
    names of the model's classes; a warning says which of them have another name in the file.

    Raises:
        InputError: the file can't be read, or lists the weights that are missing, unknown or of
            another shape; if not `strict`, only where no weight fits.
    """
    content = read_file(path)
    weights, theirs = weights_of(content, path), classes_of(content)
    source = str(path)
    if is_own(content) and (network := network_of(content)):
        source += f", {network},"
    if classes and theirs and len(theirs) != len(classes):
        source += f", of {len(theirs)} classes instead of {len(classes)},"
    fill(model, weights, source, strict)
    pairs = enumerate(zip(theirs, classes))
    renamed = [f"{i} is {there!r}, here {here!r}" for i, (there, here) in pairs if there != here]
    if renamed and len(theirs) == len(classes):
        log.warning("%s has other names for classes: %s", path, "; ".join(renamed))


def fill(model: nn.Module, weights: dict[str, Tensor], source: str, strict: bool = True) -> None:
    """Load weights by name and shape as `load_weights` does; `source` names them in the error."""
    for name, module in model.named_modules():
        if isinstance(module, ViT):
            module.adopt_grid(weights.get(f"{name}.pos_embed"))
    fitting, wrong = _compare(model.state_dict(), weights)
    listed = _listed(wrong)
    if wrong and strict:
        raise InputError(
            f"{source} does not fit the model of params.yaml:\n{listed}\n"
            "change the model, or take what fits: train.load_from with train.load_strict: false"
        )
    if not fitting:
        raise InputError(f"{source} has no weight of the model of params.yaml:\n{listed}")
    if wrong:
        log.warning("%s is loaded but for what does not fit:\n%s", source, listed)
    model.load_state_dict(fitting, strict=False)


def _listed(wrong: list[str]) -> str:
    """Lines for a message; of very many a few of each kind, and all of them in a file."""
    lines = [f"  {shown(line)}\n" for line in sorted(wrong)]
    if len(lines) > LISTED:
        path = main_checkout() / ".dvc" / "tmp" / "instep-weights.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
        kinds = {kind: [line for line in lines if sign in line] for kind, sign in KINDS.items()}
        lines = []
        for kind, own in kinds.items():
            few = own[: LISTED // len(KINDS)]
            lines += few
            lines += [f"  ... {len(own)} {kind} in all\n"] if len(own) > len(few) else []
        lines.append(f"  all are listed in {path}\n")
    return "".join(lines)[:-1]


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
        elif weight.is_floating_point() != own[name].is_floating_point():
            kinds = weight.dtype, own[name].dtype
            wrong.append(f"{name}: {kinds[0]} in the file, {kinds[1]} in the model")
        else:
            fitting[name] = weight
    return fitting, wrong
