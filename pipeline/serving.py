"""The model that MLflow serves: photographs in base64 -> masks in base64, by onnxruntime.

MLflow copies this file into the logged model and runs it there, without this repository and without
torch: it imports nothing of either. An input is a row with the column `image`, the base64 of a
file of one of FORMATS. Of each row comes

    {"mask": the base64 of a PNG of class ids with the classes' colours for its palette,
     "height": its rows, "width": its columns, "areas": {class: pixels}}

The mask lies as the file is stored, turned or not: `exif`, the model's own, says whether the
network sees a photograph as its EXIF orientation has it. All this is as `load_model` of this
project's `pipeline` does it, but that damage inside of a JPEG isn't looked for.
"""

import base64
import binascii
import io
import json
from contextlib import suppress
from typing import Any

import cv2
import numpy as np
import onnxruntime
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from numpy.typing import NDArray
from PIL import Image

COLUMN = "image"
MODEL = "model"  # the name of the ONNX file among the artifacts
METADATA = "instep"
# Orientations of EXIF: the tag, those that exchange height and width, and the axes that are then
# reversed.
ORIENTATION = 274
TRANSPOSED = 5
FLIPPED = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
LARGEST = 4096 * 2048  # pixels that the network may see at once: `load_model` cuts larger images
MOST = 200_000_000  # pixels of a photograph that is made smaller first: a few bytes claim billions
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which is lower

Array = NDArray[np.uint8]


class SegmentationModel(PythonModel):
    """An exported network, with what its metadata says of it."""

    def load_context(self, context: Any) -> None:
        """Open the ONNX file."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        path = context.artifacts[MODEL]
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        properties = self.session.get_modelmeta().custom_metadata_map
        self.about: dict[str, Any] = json.loads(properties[METADATA])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201 - MLflow makes a signature of hints
        """A table with the column `image` -> a dict for each row, see above.

        Raises:
            MlflowException: an image is missing or can't be read, which is answered by status 400.
        """
        if COLUMN not in model_input:
            raise refused(f"there is no column {COLUMN}; it holds images in base64")
        images = list(model_input[COLUMN])
        if not images:
            raise refused("there is no image; give at least one row")
        return [self.answer(image, row) for row, image in enumerate(images)]

    def answer(self, given: object, row: int) -> dict[str, Any]:
        """What a row is answered by."""
        scale = self.about["scale"]
        stored, orientation = decoded(given, row, LARGEST if scale is None else MOST)
        orientation = orientation if self.about["exif"] == "apply" else 1
        shown = upright(stored, orientation)
        seen = fitted(shown.shape[:2], scale)
        if seen[0] * seen[1] > LARGEST:
            raise refused(too_large(row, seen, LARGEST))
        ids: Array = np.empty(stored.shape[:2], np.uint8)
        turned = upright(ids, orientation)
        turned[:] = self.classes(np.ascontiguousarray(shown), seen)  # a view: this turns it back
        names = self.about["classes"]
        counts = np.bincount(ids.ravel(), minlength=len(names)).tolist()
        return {
            "mask": base64.b64encode(png(ids, self.about["palette"])).decode("ascii"),
            "height": ids.shape[0],
            "width": ids.shape[1],
            "areas": dict(zip(names, counts, strict=True)),
        }

    def classes(self, image: Array, seen: tuple[int, int]) -> Array:
        """The classes (H,W) of an image (H,W,3), which the network sees at another size."""
        feeds: dict[str, Any] = {"image": image[None]}
        if seen != image.shape[:2]:
            feeds["image"] = np.asarray(cv2.resize(image, seen[::-1]), np.uint8)[None]
        if self.about["scale"] is not None:
            feeds["size"] = np.array(image.shape[:2], np.int64)
        (found,) = self.session.run(["classes"], feeds)
        classes: Array = found[0]
        return classes


def refused(reason: str) -> MlflowException:
    """What the server answers a bad request by."""
    return MlflowException(reason, error_code=INVALID_PARAMETER_VALUE)


def too_large(row: int, size: tuple[int, int], most: int) -> str:
    """Why an image of this height and width, as it would be computed with, isn't answered."""
    return (
        f"image {row} has {size[0]} x {size[1]} pixels, and the network sees it whole: at most "
        f"{most} are answered; cut it, or use `python -m stages.predict`"
    )


def decoded(given: object, row: int, most: int) -> tuple[Array, int]:
    """The pixels of an image in base64 as they are stored, (H,W,3) RGB, and its EXIF orientation.

    Raises:
        MlflowException: it can't be read, or has more than `most` pixels; names the row.
    """
    if not isinstance(given, str) or not given:
        raise refused(f"image {row} is missing: the column {COLUMN} holds files in base64")
    try:
        content = base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(f"image {row} is not base64: {error}") from None
    unreadable = f"image {row} can't be read: it must be one of {', '.join(FORMATS)}, in base64"
    try:
        header = Image.open(io.BytesIO(content), formats=FORMATS)
        several = header.format not in ("MPO", "TIFF") and getattr(header, "n_frames", 1) > 1
    except Exception:  # what Pillow raises depends on where a file is broken
        raise refused(unreadable) from None
    if header.width * header.height > most:  # before memory is taken for them
        raise refused(too_large(row, (header.height, header.width), most))
    if several:
        raise refused(f"image {row} is an animation; give the picture that is meant alone")
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image, kinds, found = cv2.imdecodeWithMetadata(
            np.frombuffer(content, np.uint8), flags=flags
        )
    except cv2.error:
        image = None
    if image is None:  # how OpenCV says that a file is truncated or no image
        raise refused(unreadable)
    exif = Image.Exif()
    for kind, part in zip(kinds, found, strict=True):
        if kind == cv2.IMAGE_METADATA_EXIF:
            with suppress(Exception):  # a broken one, which viewers do not obey either
                exif.load(part.tobytes())
    # OpenCV turns it, whatever it is told.
    if header.format == "TIFF" and header.tag_v2.get(ORIENTATION, 1) in range(2, 9):  # type: ignore[attr-defined]
        raise refused(f"image {row}: the orientation tag of a TIFF turns it; save it upright")
    orientation = exif.get(ORIENTATION)
    turned = int(orientation) if orientation in range(1, 9) else 1  # type: ignore[arg-type]
    return np.asarray(image, np.uint8), turned


def upright(stored: Array, orientation: int) -> Array:
    """A stored image, or a map of it, as a viewer shows it: a view of the same memory."""
    turned = stored.swapaxes(0, 1) if orientation >= TRANSPOSED else stored
    return np.flip(turned, FLIPPED.get(orientation, ()))


def fitted(shape: tuple[int, ...], scale: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width that fit into `scale`, its long and its short side; the aspect is kept."""
    if scale is None:
        return shape[0], shape[1]
    factor = min(max(scale) / max(shape), min(scale) / min(shape))
    height, width = (max(int(side * factor + 0.5), 1) for side in shape)
    return height, width


def png(ids: Array, palette: list[list[int]]) -> bytes:
    """Class ids (H,W) as a PNG of the palette's colours."""
    picture = Image.fromarray(ids, "L")
    picture.putpalette([level for colour in palette for level in colour])
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


set_model(SegmentationModel())
