"""`python -m tests.fuzz.checkpoints --cases 2000`: broken and hostile files of weights."""

import json
import logging
import os
import pickle
import random
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.models.network import Network
from pipeline.prediction.model import load_model
from pipeline.training.checkpoint import (
    build_checkpoint,
    load_checkpoint,
    load_weights,
    save,
    save_model,
)
from pipeline.training.state import result_params
from tests.fuzz.tally import OTHER, RIGHT, nested, places_in, run
from tests.unit.sections import build, params

CHANGED = "changed bytes of a file of torch before 1.6, which has no checksum"
GIVEN = params(
    {
        "model.head.name": "linear",
        "model.backbone.name": "vit_tiny_patch16_dinov3",
        "model.backbone.pretrained": None,
    }
)
HOSTILE: list[Any] = [
    None, True, 0, -1, 3, 10**30, 1e308, float("nan"), "", "\0", "\ud800", "x" * 5000, b"x", [], {},
    (), set(), [[]], [1, 2], {1: 2}, {"a": None}, {"name": "unet"}, {"state_dict": None},
    torch.zeros(()), torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2).bool(),
    torch.zeros(1).expand(10**9), torch.zeros(2, device="meta"), torch.zeros(3).to_sparse(),
    torch.zeros(3, dtype=torch.complex64), torch.zeros(3).half(), torch.full((3,), torch.nan),
    torch.float32,
    OrderedDict(a=1), torch.nn.Parameter(torch.zeros(2)), ["ocean"] * 3, [[0, 0, 0]] * 3,
]  # fmt: skip


class Payload:
    """Pickled as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call[0], self.call[1:]


def network() -> Network:
    torch.manual_seed(0)
    return build(GIVEN.model, 3)


NETWORK = network()
WEIGHTS = NETWORK.state_dict()
KEPT = tempfile.TemporaryDirectory(prefix="instep-fuzz-clean-")
CLEAN = Path(KEPT.name)


def make() -> None:
    """The files that are mutated."""
    states = {
        "model": WEIGHTS,
        "optimizer": torch.optim.SGD(NETWORK.parameters(), 0.1).state_dict(),
    }
    about = {
        "classes": list(GIVEN.data.classes),
        "palette": [list(colour) for colour in GIVEN.data.palette],
        "ignore_index": 255,
        "exif": "apply",
        "frequency": [0.5, 0.25, 0.25],
        "params": result_params(
            augmentation=GIVEN.augmentation,
            model=GIVEN.model,
            train=GIVEN.train,
            evaluation=GIVEN.evaluation,
        ),
    }
    best = {"iteration": 3, "mean_iou": 0.5}
    checkpoint = build_checkpoint(states, 7, best, about)
    save(checkpoint, CLEAN / "last.pt")
    save_model(checkpoint, 1.5, CLEAN / "model.safetensors")
    torch.save({"state_dict": dict(WEIGHTS), "meta": {"CLASSES": ("a", "b", "c")}}, CLEAN / "mm.pt")
    old = {"state_dict": dict(WEIGHTS), "meta": {}}
    torch.save(old, CLEAN / "old.pt", _use_new_zipfile_serialization=False)


def door(case: int, folder: Path) -> str:
    """A mutated file is refused, or gives what it says."""
    rng = random.Random(case)
    torch.manual_seed(case)
    clean = CLEAN / rng.choice(["last.pt", "last.pt", "mm.pt", "old.pt", "model.safetensors"])
    path = folder / clean.name
    trap = folder / "trap"
    told = mutate(rng, clean, path, trap)
    refused, accepted = [], []
    for load, right in LOADS[clean.name].items():
        try:
            loaded = load(path)
            accepted.append(told == RIGHT or right(loaded))
        except InputError as error:
            refused.append(error)
        if trap.exists():
            print(f"case {case}: the payload ran")
            return OTHER
    if not all(accepted):
        return CHANGED if clean.name == "old.pt" else OTHER
    if refused:
        raise refused[0]
    return RIGHT


def _loaded(path: Path) -> dict[str, Tensor]:
    model = network()
    load_weights(model, path, classes=GIVEN.data.classes)
    return model.state_dict()


def _predicting(path: Path) -> Any:
    return load_model(path, "cpu")


def _same(given: dict[str, Tensor]) -> bool:
    return given.keys() == WEIGHTS.keys() and all(
        given[name].equal(weight) for name, weight in WEIGHTS.items()
    )


def _same_checkpoint(given: Any) -> bool:
    return pickle.dumps(_plain(given)) == pickle.dumps(_plain(load_checkpoint(CLEAN / "last.pt")))


def _plain(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes()
    if isinstance(tree, dict):
        return [(str(key), _plain(value)) for key, value in tree.items()]
    return [_plain(one) for one in tree] if isinstance(tree, list | tuple) else repr(tree)


def _same_model(given: Any) -> bool:
    held = load_model(CLEAN / "model.safetensors", "cpu")
    settings = [
        (list(one.classes), list(one.palette), one.exif, one.predictor.scale, one.predictor.window)
        for one in (given, held)
    ]
    normal = [one.predictor.normalize.state_dict() for one in (given, held)]
    return (
        settings[0] == settings[1]
        and given.temperature in (None, held.temperature)
        and str(normal[0]) == str(normal[1])
        and _same(given.predictor.network.state_dict())
    )


Loads = dict[Callable[[Path], Any], Callable[[Any], bool]]
OURS: Loads = {load_checkpoint: _same_checkpoint, _loaded: _same, _predicting: _same_model}
LOADS: dict[str, Loads] = {
    "last.pt": OURS,
    "mm.pt": {_loaded: _same},
    "old.pt": {_loaded: _same},
    "model.safetensors": {_loaded: _same, _predicting: _same_model},
}


def mutate(rng: random.Random, clean: Path, path: Path, trap: Path) -> str:
    """Write a mutated file. CHANGED: of bytes alone, so that whatever else is loaded is wrong."""
    content = clean.read_bytes()
    if rng.random() < 0.45:
        if clean.suffix == ".safetensors":
            path.write_bytes(_header_changed(rng, content))
        else:
            tree = torch.load(clean, weights_only=True)
            for _ in range(rng.randint(1, 2)):
                _restructure(rng, tree, trap)
            torch.save(tree, path, _use_new_zipfile_serialization=rng.random() < 0.7)
        return RIGHT
    for _ in range(rng.randint(1, 3)):
        content = _disturbed(rng, content)
    path.write_bytes(content)
    return CHANGED


def _disturbed(rng: random.Random, content: bytes) -> bytes:
    """Bytes flipped, put in, taken out or cut off: most where the structure stands."""
    if not content:
        return content
    ends = [min(12000, len(content)), len(content)]
    start = rng.randrange(ends[rng.random() < 0.4])
    if rng.random() < 0.3:
        start = max(0, len(content) - 1 - rng.randrange(8000))
    stop = min(len(content), start + rng.choice([1, 2, 8, 300]))
    match rng.randrange(6):
        case 0:
            return content[:start] + content[stop:]
        case 1:
            return content[:start] + rng.randbytes(rng.choice([1, 4, 64])) + content[start:]
        case 2:
            return content[:start]
        case _:
            flipped = content[start] ^ (1 << rng.randrange(8))
            return content[:start] + bytes([flipped]) + content[start + 1 :]


def _header_changed(rng: random.Random, content: bytes) -> bytes:
    """The JSON in front of a file of safetensors, with other values."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.5:
        described = json.loads(header["__metadata__"]["instep"])
        _restructure(rng, described, None)
        header["__metadata__"]["instep"] = json.dumps(described, default=str)
    else:
        _restructure(rng, header, None)
    text = json.dumps(header, default=str).encode()
    claimed = rng.choice([len(text)] * 8 + [0, 2**63, len(text) + 5])
    return struct.pack("<Q", claimed) + text + content[8 + length :]


def _restructure(rng: random.Random, tree: Any, trap: Path | None) -> None:
    """A value replaced, a key renamed or taken away; with `trap`, perhaps by what would run."""
    places = [*places_in(tree)]
    top = [place for place in places if place[0] is tree]
    holder, key = rng.choice(top if rng.random() < 0.4 else places)
    if isinstance(holder, tuple):
        return
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice([f"{key}x", "", 7, "model", "state_dict"])] = holder.pop(key)
        case 2 if trap is not None:
            code = f"__import__('os').mkdir({str(trap)!r})"
            holder[key] = rng.choice([Payload(eval, code), Payload(os.mkdir, str(trap))])
        case 3:
            holder[key] = nested(rng, HOSTILE, [1, 30, 100], "a")
        case _:
            holder[key] = rng.choice(HOSTILE)


if __name__ == "__main__":
    logging.getLogger("instep").setLevel(logging.ERROR)
    make()
    run(door, "checkpoints and safetensors")
