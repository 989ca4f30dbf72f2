"""`python -m tests.fuzz.serving --cases 2000`: requests to the model that MLflow serves.

MLflow's own code reads them, as its server does, and calls the model.
"""

import base64
import functools
import io
import json
import random
import struct
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.errors import InputError
from pipeline.prediction.export import export_onnx
from tests.fuzz.tally import OTHER, RIGHT, nested, places_in, run
from tests.unit.test_export import predictor_of

KEPT = tempfile.TemporaryDirectory(prefix="instep-fuzz-clean-")
CLEAN = Path(KEPT.name)
UNREAD = "MLflow can't read it (status 500), and does not call the model"
CLASSES = ["sky", "tree", "sea", "road", "car"]
HOSTILE: list[Any] = [
    None, True, 0, -1, 10**30, 1e308, "", " ", "\0", "\ud800", "x" * 5000, [], {}, [[]], [1, 2],
    {"image": "x"}, {"": None}, "image", "é" * 9, "====", "AAAA", "data:image/png;base64,AAAA",
]  # fmt: skip


def make() -> None:
    """Export the network that is served."""
    torch.set_num_threads(1)
    about = {
        "classes": CLASSES,
        "palette": [[50 * level] * 3 for level in range(5)],
        "exif": "apply",
        "scale": None,
    }
    export_onnx(predictor_of("fcn", "resnet18"), about, "fcn", CLEAN / "model.onnx")


def photographs() -> list[bytes]:
    """Files of every kind that is answered."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    rgb = Image.fromarray(coarse).resize((40, 33))
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(np.arange(1320, dtype=np.uint16).reshape(33, 40) * 49)
    found = []
    for image, kind, options in (
        (rgb, "JPEG", {"exif": exif}),
        (rgb.convert("L"), "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {"exif": exif}),
        (rgb.convert("RGBA"), "PNG", {}),
        (rgb.quantize(), "PNG", {}),
        (deep, "PNG", {}),
        (rgb, "BMP", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "WEBP", {"lossless": True}),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        found.append(file.getvalue())
    return found


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


PHOTOGRAPHS = photographs()


@functools.cache  # by the process that was forked: threads of onnxruntime don't survive that
def served() -> tuple[Any, Any]:
    """MLflow's door, and the model as it loads it, with its schema."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import PyFuncModel, scoring_server
    from mlflow.pyfunc.model import _PythonModelPyfuncWrapper
    from mlflow.types import ColSpec, Schema

    from pipeline.serving import SegmentationModel

    inner = SegmentationModel()
    context = SimpleNamespace(artifacts={"model": str(CLEAN / "model.onnx")})
    inner.load_context(context)
    schema = Schema([ColSpec("string", "image")])
    about = Model(signature=ModelSignature(schema))
    about.add_flavor("python_function", loader_module="mlflow.pyfunc.model")
    model = PyFuncModel(about, _PythonModelPyfuncWrapper(inner, context, None))
    return functools.partial(scoring_server.invocations, model=model, input_schema=schema), inner


def door(case: int, folder: Path) -> str:
    """A request is refused with status 400, or each of its images is answered."""
    from mlflow.exceptions import MlflowException

    rng = random.Random(case)
    ask, model = served()
    request, whole = requested(rng)
    try:
        answer = ask(request, "application/json")
    except MlflowException as error:
        if trace := error.json_kwargs.get("stack_trace"):
            raise RuntimeError(trace[-250:]) from None  # an error of ours
        if error.get_http_status_code() != 400:
            raise
        reason = error.message.rpartition("Error: ")[2]
        raise InputError("".join(c if c.isprintable() else "?" for c in reason[:500])) from None
    except (RecursionError, TypeError, ValueError):
        return UNREAD
    found = json.loads(answer.response)["predictions"]
    if answer.status != 200 or not found:
        return OTHER
    if whole is not None:
        expected = [model.answer(image, 0) for image in whole]
        return RIGHT if found == expected else OTHER
    return RIGHT if all(map(_consistent, found)) else OTHER


def _consistent(answer: dict[str, Any]) -> bool:
    with Image.open(io.BytesIO(base64.b64decode(answer["mask"]))) as mask:
        ids = np.asarray(mask)
    counts = np.bincount(ids.ravel(), minlength=len(CLASSES)).tolist()
    size = (answer["height"], answer["width"])
    return ids.shape == size and answer["areas"] == dict(zip(CLASSES, counts, strict=True))


def requested(rng: random.Random) -> tuple[bytes, list[str] | None]:
    """A request; of one whose images are all whole, the images."""
    files = [rng.choice(PHOTOGRAPHS) for _ in range(rng.randint(1, 3))]
    kind = rng.randrange(9)
    if kind < 4:
        files[0] = _disturbed(rng, files[0])
    elif kind == 4:
        files[0] = claiming(rng.choice([1, 9, 20_000, 2**31 - 1]), rng.choice([1, 20_000, 60_000]))
    images: list[Any] = [base64.b64encode(file).decode() for file in files]
    if kind == 5:
        images[0] = rng.choice([*HOSTILE, _text(rng, images[0])])
    form = rng.randrange(4)
    tree: Any = {
        0: {"dataframe_split": {"columns": ["image"], "data": [[one] for one in images]}},
        1: {"dataframe_records": [{"image": one} for one in images]},
        2: {"inputs": {"image": images}},
        3: {"instances": [{"image": one} for one in images]},
    }[form]
    if kind == 6:
        for _ in range(rng.randint(1, 2)):
            _restructure(rng, tree)
    body = json.dumps(tree).encode()
    if kind == 7:
        body = rng.choice([_disturbed(rng, body), _disturbed(rng, body), _whole(rng)])
    return body, images if kind > 7 else None


def _disturbed(rng: random.Random, content: bytes) -> bytes:
    """Bytes flipped, put in, taken out or cut off."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        stop = start + rng.choice([1, 2, 8, 300])
        match rng.randrange(5):
            case 0:
                content = content[:start] + content[stop:]
            case 1:
                content = content[:start] + rng.randbytes(rng.choice([1, 4, 64])) + content[start:]
            case 2 if rng.random() < 0.3:
                content = content[:start]
            case _:
                changed = bytes(one ^ (1 << rng.randrange(8)) for one in content[start : start + 1])
                content = content[:start] + changed + content[start + 1 :]
    return content


def _text(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text))
    return text[:start] + rng.choice(["", "=", "é", " ", "\n", "\0", "-_"]) + text[start + 1 :]


def _restructure(rng: random.Random, tree: Any) -> None:
    """A value replaced, a key renamed or taken away."""
    places = [*places_in(tree)]
    if not places:
        return
    holder, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice([f"{key}x", "", "params", "inputs", "messages"])] = holder.pop(key)
        case 2:
            holder[key] = nested(rng, HOSTILE, [1, 30, 900], "image")
        case _:
            holder[key] = rng.choice(HOSTILE)


def _whole(rng: random.Random) -> bytes:
    """A body that is hostile as a whole."""
    return rng.choice(
        [
            b"",
            b"null",
            b"[]",
            b"{}",
            b"[" * 100_000,
            b'{"inputs":' * 100_000,
            b'{"dataframe_split": {"columns": ["image"], "data": [[1e999]]}}',
            b'{"dataframe_split": {"columns": ["image", "image"], "data": [["", ""]]}}',
            b'{"dataframe_split": {"index": [5], "columns": ["image"], "data": []}}',
            b'{"inputs": NaN}',
            b'{"inputs": ' + b"9" * 5000 + b"}",
            b"\xff\xfe" + "{}".encode("utf-16-le"),
            rng.randbytes(500),
        ]
    )


if __name__ == "__main__":
    make()
    run(door, "requests to the served model")
