"""Files of weights, ours and others': read without their code and without running anything.

Known are torch.save's files (.pt, .pth) and safetensors; checkpoints of this tool, of
MMSegmentation and of EoMT, and bare state_dicts, such as timm's and OpenMMLab's of an encoder.
"""

import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import InputError, shown
from pipeline.models.eomt_names import from_eomt
from pipeline.models.mmseg import from_mmseg
from pipeline.params import GIVEN

OWN = {"model", "params"}  # by these a file is one of ours
DESCRIPTION = "instep"  # the metadata of our safetensors: several keys would change their order
CHECKSUM = "md5"  # of such a file's description, the name of its `model_md5`
ZIP = b"PK\x03\x04"  # how a file of torch.save begins
FOLDER = 0x10  # of a part's attributes: torch would read nothing, and leave its memory as it is
UNSAFE = "not a checkpoint that can be loaded safely"
ALTERED = "since it was written it has been altered, and has another checksum; copy or make it anew"
BACKBONE = "backbone."
# What reading and renaming raise, where the content of a file is of no form that is known.
MALFORMED = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


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


def read_file(path: Path) -> dict[str, Any]:
    """Tensors on the CPU, plain data, and `Unread` for what is harmless.

    Raises:
        InputError: the file is missing or broken, holds anything but a dict, or names what a pickle
            could run.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    if is_own(content) and (wrong := _wrong_in(content)):
        raise InputError(f"{path}: not a checkpoint that this tool wrote: {wrong}")
    return content


def _wrong_in(content: dict[str, Any]) -> str:
    """What a checkpoint or a model of ours can't have; it may come from anybody."""
    for name in ("model", "ema"):
        weights = content.get(name, {})
        if not isinstance(weights, dict) or not all(map(_is_weight, weights.items())):
            return f"{name} is no dict of weights"
    if not isinstance(content.get("optimizer", {}), dict):
        return "optimizer is no dict"
    sections = content["params"]
    if not isinstance(sections, dict) or not all(
        isinstance(one, dict) for one in sections.values()
    ):
        return "params is no dict of sections"
    for name in ("format", "iteration"):
        if type(content.get(name, 0)) is not int:
            return f"{name} is no whole number"
    classes = content.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
        return "classes is no list of names"
    best = content.get("best")
    if best is not None and not (
        isinstance(best, dict)
        and type(best.get("iteration")) is int
        and isinstance(best.get("mean_iou"), float)
    ):
        return "best is no iteration with its mean_iou"
    return ""


def read_description(path: Path) -> dict[str, Any]:
    """What a file of safetensors of ours says of its weights; nothing of another tool's.

    Raises:
        InputError: the file can't be read.
    """
    with _opened(path) as file:
        return _described(file)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors by name; of a file of ours its description, and below `model` the tensors."""
    with _opened(path) as file:
        described = _described(file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if described and described.pop(CHECKSUM, None) != model_md5(described, tensors):
        raise InputError(f"{path}: not a model that can be read: {ALTERED}")
    return {**described, "model": tensors} if described else tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, *MALFORMED) as error:
        raise InputError(f"{path}: not a file of safetensors that can be read: {error}") from None


def _described(file: Any) -> dict[str, Any]:
    return dict(json.loads((file.metadata() or {}).get(DESCRIPTION, "{}")))


def require_whole(path: Path) -> None:
    """Check that a file of torch.save is there, and as it was written.

    torch writes a CRC-32 of every part into the zip archive that such a file is, but does not look
    at it.

    Raises:
        InputError: it is missing, empty, cut off, or a byte of it is another one.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not path.stat().st_size:
        raise InputError(f"{path}: {UNSAFE}: it is empty")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # Of what is compressed a few bytes could fill the memory.
            compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
            altered = any(part.external_attr & FOLDER for part in parts)
            altered = altered or (not compressed and archive.testzip() is not None)
    except Exception as error:  # zipfile, too, has a kind for each way of being broken
        raise InputError(f"{path}: {UNSAFE}: it is cut off or broken ({error})") from None
    if altered:
        raise InputError(f"{path}: {UNSAFE}: {ALTERED}")
    if compressed:
        raise InputError(
            f"{path}: {UNSAFE}: parts of it are compressed, and torch.save compresses nothing; of "
            "a model of TorchScript, save the state_dict"
        )


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        begin = file.read(len(ZIP))
    if begin in (ZIP, b""):  # else it may be of torch before 1.6, without any checksum
        require_whole(path)
    allowed: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about torch
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different kind for each way of being broken
        if found := re.search(r"\bGLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: {UNSAFE}: it names {found[1]}, which "
                "is neither a tensor nor plain data and could run code; if you trust the file, "
                "save its state_dict alone, where it was made"
            ) from None
        raise InputError(f"{path}: {UNSAFE}: {_reason(error)}") from error
    if begin != ZIP and isinstance(content, dict) and is_own(content):
        raise InputError(
            f"{path}: not a checkpoint that this tool wrote: it has the form of torch before 1.6, "
            "which has no checksum"
        )
    return content


def tensors_md5(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """md5 over names, types, shapes and bytes, in their order."""
    digest = hashlib.md5()
    for name, tensor in tensors:
        own = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {own.dtype} {tuple(own.shape)}".encode())
        digest.update(own.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_md5(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The checksum of a file of safetensors of ours: of its description and of its tensors."""
    parts = [described, tensors_md5(sorted(tensors.items()))]
    return hashlib.md5(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    """Why torch can't read a file, in a line, without its advice to load the file unsafely."""
    cause = (error.__context__ or error) if isinstance(error, UnpicklingError) else error
    reason = str(cause).partition("\n")[0].partition(". ")[0]
    advised = not reason or "weights_only" in reason
    return f"{type(cause).__name__} where it is read" if advised else reason


def is_own(content: dict[str, Any]) -> bool:
    """Whether a file's content is a checkpoint, or a model, of this tool."""
    return content.keys() >= OWN


def averaged(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The moving average of the weights, if a checkpoint of ours has one, or else the weights."""
    weights: dict[str, Tensor] = checkpoint["ema" if "ema" in checkpoint else "model"]
    return weights


def weights_of(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of a network in the content of a file, under our names.

    Raises:
        InputError: there are none.
    """
    if is_own(content):
        return averaged(content)
    return _under_our_names(_as_named_there(content, path), path)


def backbone_weights(path: Path) -> dict[str, Tensor]:
    """The weights of an encoder under its own names, from its own file or a whole network's.

    Raises:
        InputError: the file can't be read, or holds no weights.
    """
    content = read_file(path)
    given = weights_of(content, path)
    if not any(name.startswith(BACKBONE) for name in given):
        own = {BACKBONE + name: weight for name, weight in given.items()}
        given = _under_our_names(own, path)
    return {
        name.removeprefix(BACKBONE): weight
        for name, weight in given.items()
        if name.startswith(BACKBONE)
    }


def _under_our_names(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    try:
        return from_mmseg(from_eomt(weights))
    except MALFORMED as error:
        raise InputError(
            f"{path}: its weights have names of a network that is known, and not its shapes: "
            f"{error!r}"
        ) from error


def _as_named_there(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights in the content of another tool's file, under the names that they have there.

    Of averaged weights (EMA) of MMSegmentation these are the ones that its test.py measures, those
    of `state_dict` itself: mmengine's hook has put the averages there and the others into
    `ema_state_dict`; mmcv's hook keeps the other copy beside each parameter, as `ema_a_b` of `a.b`.
    Sources: mmengine/hooks/ema_hook.py (0.10.7), mmcv/runner/hooks/ema.py (1.x).
    """
    given = content.get("state_dict", content)
    bare = given is content
    if not isinstance(given, dict) or (bare and not all(map(_is_weight, given.items()))):
        raise InputError(
            f"{path}: no weights: neither a checkpoint of this tool, nor one of MMSegmentation "
            "(with a state_dict), nor a state_dict itself"
        )
    weights = dict(filter(_is_weight, given.items()))
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    copies = {f"ema_{name.replace('.', '_')}" for name in weights}
    return {name: value for name, value in weights.items() if name not in copies}


def _is_weight(entry: tuple[Any, Any]) -> bool:
    """Whether it is a name and a plain tensor with values, neither sparse, quantized nor complex.

    One with fewer values than places, which a file may claim, takes memory that nobody has.
    """
    name, tensor = entry
    return (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_complex())
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def network_of(content: dict[str, Any]) -> str:
    """Which network a checkpoint of ours says that it is; empty where it does not say."""
    model = content["params"].get("model", {})
    parts = [model.get(part) for part in ("head", "backbone")]
    names = [shown(part.get("name"), GIVEN) for part in parts if isinstance(part, dict)]
    return f"a {names[0]} on {names[1]}" if len(names) == 2 else ""


def classes_of(content: dict[str, Any]) -> list[str]:
    """The names of the classes that a file's content tells, of MMSegmentation in its `meta`."""
    if is_own(content):
        return list(content.get("classes", []))
    meta = content.get("meta")
    dataset = meta.get("dataset_meta") if isinstance(meta, dict) else None
    for holder in (dataset, meta):
        if isinstance(holder, dict):
            names = holder.get("classes", holder.get("CLASSES"))
            if isinstance(names, list | tuple):
                return [str(name).strip() for name in names]  # ADE20K's 'bed ' has a blank
    return []
