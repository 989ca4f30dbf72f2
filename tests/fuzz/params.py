"""Broken and hostile files of params.yaml."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.experiment import load_params
from pipeline.params import flatten, plain
from tests.fuzz.door import RIGHT, VALUES, forge, main, mutated, places_in
from tests.unit.sections import REPOSITORY, document

HEADS: list[dict[str, Any]] = [
    {},
    {"model.head.name": "pspnet", "model.backbone.name": "resnet18"},
    {"model.head.name": "pointrend", "model.backbone.name": "resnet18c"},
    {"model.head.name": "segformer", "model.backbone.name": "mit_b0"},
    {
        "model.head.name": "eomt",
        "model.backbone.name": "vit_tiny_patch16_dinov3",
        "model.loss": None,
    },
    {"model.head.name": "smp.FPN", "model.backbone.name": "resnet18"},
    {"data.format.name": "pairs", "data.format.splits.source": "drawn"},
    {"data.format.name": "coco", "data.format.background": None},
]
HOSTILE: list[Any] = [
    *VALUES, 2, 16, 256, 2**63, 2**64, 10**400, -(10**30), 0.0, -0.0, 1.0, 1e-9, 1e-300, 5e-324,
    1e20, float("inf"), "\n", "\x1b[31m", "\u2028", "\u202e", "名前", "<script>", "../..",
    "/etc/passwd", "~/x", "\\", "(", "(a+)+$", "unet", "smp.Unet", "smp.Unett", "imagenet", "null",
    "1e-3", "two", "balanced", "files", "drawn", "resnet18", "tu-resnet1", [1], [-1, 64], [64, 64],
    [10**9, 10**9], [1e-9, 1e-9], [1] * 300, ["a"] * 3, [[0, 0, 0]] * 3, {"name": "unet"},
    {"name": None}, {"name": []}, {"": 1}, {"a": {"b": {}}},
]  # fmt: skip
PIECES = [
    b"\xff", b"\xef\xbb\xbf", b"\xfe\xff", b"\x00", b"\x1b", b"\t", b"\r", b"\n", b"'", b'"', b"[",
    b"]", b"{", b"}", b": ", b"- ", b"&a ", b"*a", b"*b", b"<<: *a\n", b"? ", b"! ", b"!!int ",
    b"!!float ", b"!!bool ", b"!!python/object:os.system ", b"!!timestamp ", b"!!set ",
    b"!!binary ", b"%YAML 1.1\n", b"---\n", b"...\n", b"| ", b"> ", b"@", b"`", b"#", b",",
    b"0x_", b"9" * 5000,
    b"\xc3", b"\xed\xa0\x80", b"\xe2\x80\xa8", b'"\\ud800"', b'"\\U00110000"', b'"\\0"', b"~",
]  # fmt: skip


def attempt(rng: Random, folder: Path) -> str:
    """A broken file is refused, or read as DVC reads it."""
    path = folder / "params.yaml"
    path.write_bytes(broken(rng))
    params = load_params(path)
    params.data.reader()
    known = flatten(plain(params))
    try:
        theirs = YAML(typ="safe", pure=True).load(path)
    except YAMLError:  # then DVC has refused it before us
        return RIGHT
    for name, value in flatten(theirs).items():
        ours = known.get(name)
        assert equal(ours, value) or value == {}, f"{name} is {ours!r}, and to DVC {value!r}"
    return RIGHT


def equal(one: Any, other: Any) -> bool:
    """Whether two trees of dicts, lists and scalars are equal, of whatever types of number."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def broken(rng: Random) -> bytes:
    """A file that was valid before its changes, or one that is hostile as a whole."""
    if rng.random() < 0.05:
        return whole(rng)
    if rng.random() < 0.5:
        return mutated((REPOSITORY / "params.yaml").read_bytes(), rng, pieces=PIECES)
    tree = document(rng.choice(HEADS))
    own = [holder[key] for holder, key in places_in(copy.deepcopy(tree))]
    for _ in range(rng.randint(1, 3)):
        values = own if rng.random() < 0.2 else HOSTILE
        forge(tree, rng, values, names=["", "\x1b", "y" * 3000])
    if rng.random() < 0.5:
        return json.dumps(tree).replace("Infinity", ".inf").replace("NaN", ".nan").encode()
    return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")


def whole(rng: Random) -> bytes:
    """A file that is hostile as a whole."""
    letters = "abcdefghijklmnop"
    bomb = "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
        for before, name in pairwise(letters)
    )
    merges = bomb.replace("[*", "{<<: [*").replace("]\n", "]}\n")
    return rng.choice(
        [
            b"",
            b"\xff\xfe" + "data: 1".encode("utf-16-le"),
            rng.randbytes(500),
            b"a: " + b"[" * 5000 + b"]" * 5000,
            b"{a: " * 5000,
            b"\n".join(b" " * depth + b"a:" for depth in range(5000)),
            f"a: &a [x]\n{bomb}".encode(),
            f"a: &a {{x: 1}}\n{merges}".encode(),
            b"data: &a [*a]",
            b"? [1, 2]\n: 3",
            b"? {a: 1}\n: 3",
            b"data: 1\ndata: 2",
            b"train: {lr: 1, lr: 2}",
            b"\n".join(b"k%d: 1" % number for number in range(9000)),
            b"- 1\n- 2",
            b"data",
        ]
    )


if __name__ == "__main__":
    main(attempt)
