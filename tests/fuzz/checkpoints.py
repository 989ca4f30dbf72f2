"""Broken and hostile files of weights."""

import json
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
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
from tests.fuzz.door import RIGHT, VALUES, anywhere, forge, main, mutated
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
    *VALUES, b"x", (), set(), {1: 2}, {"name": "unet"}, {"state_dict": None}, torch.float32,
    torch.zeros(()), torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2).bool(),
    torch.zeros(1).expand(10**9), torch.zeros(2, device="meta"), torch.zeros(3).to_sparse(),
    torch.zeros(3, dtype=torch.complex64), torch.zeros(3).half(), torch.full((3,), torch.nan),
    OrderedDict(a=1), torch.nn.Parameter(torch.zeros(2)), ["ocean"] * 3, [[0, 0, 0]] * 3,
]  # fmt: skip
NAMES = ["", 7, "model", "state_dict"]


class Payload:
    """Pickled as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call[0], self.call[1:]

    def __deepcopy__(self, _: Any) -> "Payload":
        return self


def network() -> Network:
    torch.manual_seed(0)
    return build(GIVEN.model, 3)


torch.set_num_threads(1)  # a fork that waits for other threads hangs
NETWORK = network()
WEIGHTS = NETWORK.state_dict()
KEPT = TemporaryDirectory(prefix="instep-fuzz-clean-")
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


def attempt(rng: Random, folder: Path) -> str:
    """A mutated file is refused, or gives what it says."""
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
        assert not trap.exists(), "the payload ran"
    if not all(accepted):
        assert clean.name == "old.pt", "what was loaded is wrong"
        return CHANGED
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


def mutate(rng: Random, clean: Path, path: Path, trap: Path) -> str:
    """Write a mutated file. CHANGED: of bytes alone, so that whatever else is loaded is wrong."""
    content = clean.read_bytes()
    if rng.random() < 0.45:
        if clean.suffix == ".safetensors":
            path.write_bytes(_header_changed(rng, content))
        else:
            tree = torch.load(clean, weights_only=True)
            code = f"__import__('os').mkdir({str(trap)!r})"
            payloads = [Payload(eval, code), Payload(os.mkdir, str(trap))]
            for _ in range(rng.randint(1, 2)):
                forge(tree, rng, payloads if rng.random() < 0.2 else HOSTILE, names=NAMES)
            torch.save(tree, path, _use_new_zipfile_serialization=rng.random() < 0.7)
        return RIGHT
    path.write_bytes(mutated(content, rng, place=_structural))
    return CHANGED


def _structural(content: bytearray, rng: Random) -> int:
    """A place, mostly near an end: there the structure stands."""
    size = len(content)
    near = [rng.randint(0, min(12_000, size)), size - rng.randint(0, min(8000, size))]
    return rng.choice([*near, anywhere(content, rng)])


def _header_changed(rng: Random, content: bytes) -> bytes:
    """The JSON in front of a file of safetensors, with other values."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.5:
        described = json.loads(header["__metadata__"]["instep"])
        forge(described, rng, HOSTILE, names=NAMES)
        header["__metadata__"]["instep"] = json.dumps(described, default=str)
    else:
        forge(header, rng, HOSTILE, names=NAMES)
    text = json.dumps(header, default=str).encode()
    claimed = rng.choice([len(text)] * 8 + [0, 2**63, len(text) + 5])
    return struct.pack("<Q", claimed) + text + content[8 + length :]


if __name__ == "__main__":
    make()
    main(attempt)
