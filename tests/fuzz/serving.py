"""Requests to the model that MLflow serves.

MLflow's own code reads them, as its server does, and calls the model.
"""

import base64
import functools
import io
import json
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PyFuncModel, scoring_server
from mlflow.pyfunc.model import _PythonModelPyfuncWrapper
from mlflow.types import ColSpec, Schema
from PIL import Image

from pipeline.errors import InputError
from pipeline.prediction.export import export_onnx
from tests.fuzz.door import RIGHT, VALUES, forge, main, mutated
from tests.fuzz.images import claiming, photographs
from tests.unit.test_export import predictor_of

KEPT = TemporaryDirectory(prefix="instep-fuzz-clean-")
CLEAN = Path(KEPT.name)
UNREAD = "MLflow can't read it (status 500), and does not call the model"
PHOTOGRAPHS = [content for _, content in photographs()]
CLASSES = ["sky", "tree", "sea", "road", "car"]
HOSTILE: list[Any] = [
    *VALUES, {"image": "x"}, "image", "é" * 9, "====", "AAAA", "data:image/png;base64,AAAA",
]  # fmt: skip


def make() -> None:
    """Export the network that is served."""
    torch.set_num_threads(1)  # a fork that waits for other threads hangs
    about = {
        "classes": CLASSES,
        "palette": [[50 * level] * 3 for level in range(5)],
        "exif": "apply",
        "scale": None,
    }
    export_onnx(predictor_of("fcn", "resnet18"), about, "fcn", CLEAN / "model.onnx")


@functools.cache  # by the process that was forked: threads of onnxruntime don't survive that
def served() -> tuple[Any, Any]:
    """MLflow's door, and the model as it loads it, with its schema."""
    from pipeline.serving import SegmentationModel  # which prints

    inner = SegmentationModel()
    context = SimpleNamespace(artifacts={"model": str(CLEAN / "model.onnx")})
    inner.load_context(context)
    schema = Schema([ColSpec("string", "image")])
    about = Model(signature=ModelSignature(schema))
    about.add_flavor("python_function", loader_module="mlflow.pyfunc.model")
    model = PyFuncModel(about, _PythonModelPyfuncWrapper(inner, context, None))
    return functools.partial(scoring_server.invocations, model=model, input_schema=schema), inner


def attempt(rng: Random, _: Path) -> str:
    """A request is refused with status 400, or each of its images is answered."""
    ask, model = served()
    request, whole = requested(rng)
    try:
        answer = ask(request, "application/json")
    except MlflowException as error:
        if trace := error.json_kwargs.get("stack_trace"):
            raise RuntimeError(trace[-250:]) from None  # an error of ours
        if error.get_http_status_code() != 400 or whole is not None:
            raise
        raise InputError(error.message.rpartition("Error: ")[2]) from None
    except (RecursionError, TypeError, ValueError):
        return UNREAD
    found = json.loads(answer.response)["predictions"]
    assert answer.status == 200
    assert found
    if whole is None:
        assert all(map(_consistent, found))
    else:
        assert found == [model.answer(image, 0) for image in whole]
    return RIGHT


def _consistent(answer: dict[str, Any]) -> bool:
    with Image.open(io.BytesIO(base64.b64decode(answer["mask"]))) as mask:
        ids = np.asarray(mask)
    counts = np.bincount(ids.ravel(), minlength=len(CLASSES)).tolist()
    size = (answer["height"], answer["width"])
    return ids.shape == size and answer["areas"] == dict(zip(CLASSES, counts, strict=True))


def requested(rng: Random) -> tuple[bytes, list[str] | None]:
    """A request; of one whose images are all whole, the images."""
    files = [rng.choice(PHOTOGRAPHS) for _ in range(rng.randint(1, 3))]
    kind = rng.randrange(9)
    if kind < 4:
        files[0] = mutated(files[0], rng)
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
        for depth in rng.choice([[900], [100, 100]]):
            forge(tree, rng, HOSTILE, names=["", "params", "inputs", "messages"], depth=depth)
    body = json.dumps(tree).encode()
    if kind == 7:
        body = mutated(body, rng) if rng.random() < 0.7 else _whole(rng)
    return body, images if kind > 7 else None


def _text(rng: Random, text: str) -> str:
    start = rng.randrange(len(text))
    return text[:start] + rng.choice(["", "=", "é", " ", "\n", "\0", "-_"]) + text[start + 1 :]


def _whole(rng: Random) -> bytes:
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
    main(attempt)
