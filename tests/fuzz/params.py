"""`python -m tests.fuzz.params --cases 2000`: broken and hostile files of params.yaml."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.experiment import load_params
from pipeline.params import flatten, plain
from tests.fuzz.tally import OTHER, RIGHT, equal, nested, places_in, run
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
    None, True, False, 0, 1, -1, 2, 3, 16, 255, 256, 2**31, 2**63, 2**64, 10**400, -(10**30),
    0.0, -0.0, 0.5, 1.0, 1e-9, 1e-300, 5e-324, 1e20, 1e308, float("inf"), float("nan"),
    "", " ", "\n", "\0", "\x1b[31m", "\ud800", "\u2028", "\u202e", "a" * 5000, "é", "名前",
    "<script>", "../..", "/etc/passwd", "~/x", "\\", "(", "(a+)+$", "unet", "smp.Unet", "smp.Unett",
    "imagenet", "null", "1e-3", "two", "balanced", "files", "drawn", "resnet18", "tu-resnet1",
    [], [[]], [1], [1, 2], [-1, 64], [64, 64], [10**9, 10**9], [1e-9, 1e-9], [1] * 300, ["a"] * 3,
    [[0, 0, 0]] * 3, {}, {"name": "unet"}, {"name": None}, {"name": []}, {"": 1}, {"a": {"b": {}}},
]  # fmt: skip
PIECES = [
    b"\xff", b"\xef\xbb\xbf", b"\xfe\xff", b"\x00", b"\x1b", b"\t", b"\r", b"\n", b"'", b'"', b"[",
    b"]", b"{", b"}", b": ", b"- ", b"&a ", b"*a", b"*b", b"<<: *a\n", b"? ", b"! ", b"!!int ",
    b"!!float ", b"!!bool ", b"!!python/object:os.system ", b"!!timestamp ", b"!!set ",
    b"!!binary ", b"%YAML 1.1\n", b"---\n", b"...\n", b"| ", b"> ", b"@", b"`", b"#", b",",
    b"0x_", b"9" * 5000,
    b"\xc3", b"\xed\xa0\x80", b"\xe2\x80\xa8", b'"\\ud800"', b'"\\U00110000"', b'"\\0"', b"~",
]  # fmt: skip


def door(case: int, folder: Path) -> str:
    """A mutated file is refused, or read as DVC reads it."""
    rng = random.Random(case)
    path = folder / "params.yaml"
    path.write_bytes(mutated(rng))
    params = load_params(path)
    params.data.reader()
    known = flatten(plain(params))
    try:
        theirs = YAML(typ="safe", pure=True).load(path)
    except YAMLError:  # then DVC has refused it before us
        return RIGHT
    for name, value in flatten(theirs).items():
        if not (equal(known.get(name), value) or value == {}):
            print(f"case {case}: {name} is {known.get(name)!r}, and to DVC {value!r}")
            return OTHER
    return RIGHT


def mutated(rng: random.Random) -> bytes:
    """A file that was valid before one to four changes."""
    text = (REPOSITORY / "params.yaml").read_bytes()
    if rng.random() < 0.05:
        return whole(rng)
    if rng.random() < 0.5:
        tree = document(rng.choice(HEADS))
        for _ in range(rng.randint(1, 3)):
            restructure(rng, tree)
        if rng.random() < 0.5:
            return json.dumps(tree).replace("Infinity", ".inf").replace("NaN", ".nan").encode()
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    for _ in range(rng.randint(1, 4)):
        text = disturbed(rng, text)
    return text


def disturbed(rng: random.Random, text: bytes) -> bytes:
    """Bytes flipped, put in, taken out or doubled."""
    start = rng.randrange(len(text) + 1)
    stop = min(len(text), start + rng.choice([1, 1, 2, 5, 20, 200]))
    match rng.randrange(5):
        case 0 if start < len(text):
            return text[:start] + bytes([text[start] ^ (1 << rng.randrange(8))]) + text[start + 1 :]
        case 1:
            return text[:start] + text[stop:]
        case 2:
            return text[:stop] + text[start:]
        case 3:
            return text[:start] if rng.random() < 0.2 else text
        case _:
            return text[:start] + rng.choice(PIECES) + text[start:]


def restructure(rng: random.Random, tree: dict[str, Any]) -> None:
    """A value replaced, a key renamed, taken away or added, two values exchanged."""
    places = [*places_in(tree)]
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[f"{key}x" if rng.random() < 0.7 else rng.choice(["", "\x1b", "y" * 3000])] = (
                holder.pop(key)
            )
        case 2:
            other, place = rng.choice(places)
            holder[key] = json.loads(json.dumps(other.get(place) if isinstance(other, dict) else 1))
        case 3:
            holder[key] = nested(rng, HOSTILE, [1, 5, 31, 100], "a")
        case _:
            holder[key] = rng.choice(HOSTILE)


def whole(rng: random.Random) -> bytes:
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
            bytes(rng.randrange(256) for _ in range(500)),
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
    run(door, "params.yaml")
