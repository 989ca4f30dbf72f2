"""A trained network as people use it: a file of weights in, class ids of photographs out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from pipeline.data.files import read_image, upright
from pipeline.data.table import Array
from pipeline.data.transforms import resized
from pipeline.disk import check_format
from pipeline.errors import InputError, one_line
from pipeline.evaluation.inference import Predictor
from pipeline.evaluation.report import blend, write_mask
from pipeline.models import ModelParams, build_model
from pipeline.models.network import Labels
from pipeline.models.weights import averaged, is_own, read_description, read_file
from pipeline.params import Above0, Colour, Grey, Part, Size
from pipeline.precision import PRECISIONS, Normalization
from pipeline.prediction.calibration import calibrated
from pipeline.training.checkpoint import fill

# A whole image of more pixels than this, as the network is to see it, is predicted by windows: what
# a network computes in between is hundreds of times larger. Height and width of the windows, and
# what lies from one's start to the next's.
WHOLE = 4096 * 2048
WINDOW: tuple[Size, Size] = ((1024, 1024), (768, 768))


class _Augmentation(Part):
    scale: Size | None


class _Training(Part):
    precision: Literal["fp32", "fp64", "bf16", "fp16"]


class _Evaluation(Part):
    mode: Literal["whole", "slide"]
    crop: Size
    stride: Size


class _Trained(Part):
    augmentation: _Augmentation
    model: ModelParams
    train: _Training
    evaluation: _Evaluation


class _Described(Part):
    """What a file of ours says of its weights: a `Description`, and the temperature."""

    classes: tuple[str, ...] = Field(min_length=2, max_length=255)
    palette: tuple[Colour, ...]
    ignore_index: Grey
    exif: Literal["apply", "ignore"]
    frequency: tuple[float, ...]
    params: _Trained
    temperature: Above0 | None = None


@dataclass(frozen=True)
class Prediction:
    """What a model sees in a photograph, pixel by pixel as the photograph is stored.

    `ids` (H,W) uint8 are the places of the classes' names in `classes`, and of their colours (red,
    green, blue) in `palette`. `probabilities` (C,H,W) and `confidence` (H,W), the probability of
    the predicted class, are float32 from 0 to 1, and None unless they were asked for.
    """

    ids: Array
    classes: Sequence[str]
    palette: Sequence[Colour]
    confidence: NDArray[np.float32] | None = None
    probabilities: NDArray[np.float32] | None = None

    @property
    def areas(self) -> dict[str, int]:
        """The pixels of each class."""
        return areas(self.ids, self.classes)

    def picture(self) -> Array:
        """The classes' colours, (H,W,3) uint8 RGB."""
        return np.array(self.palette, np.uint8)[self.ids]

    def overlay(self, image: Array) -> Array:
        """The classes' colours over the stored photograph (H,W,3) uint8, half of each."""
        return blend(image, self.ids, self.palette)

    def save(self, path: "str | PathLike[str]") -> None:
        """Write the ids as a PNG with a palette, which viewers show in the classes' colours."""
        write_mask(Path(path), self.ids, self.palette)


def areas(ids: Array, classes: Sequence[str]) -> dict[str, int]:
    """The pixels of each class."""
    counts = np.zeros(len(classes), np.int64)
    for row in ids:  # whole, bincount would make eight bytes of each pixel
        counts += np.bincount(row, minlength=len(classes))
    return dict(zip(classes, counts.tolist(), strict=True))


@dataclass(frozen=True)
class Model:
    """A trained network with the classes it knows and the preprocessing it was trained with.

    `temperature` is what calibrates its probabilities (https://arxiv.org/abs/1706.04599), None
    where the file has none: then they are the network's own, which are often too sure.
    """

    classes: Sequence[str]
    palette: Sequence[Colour]
    exif: str
    temperature: float | None
    predictor: Predictor = field(repr=False)  # thousands of lines

    def predict(
        self,
        image: "str | PathLike[str] | Array",
        *,
        confidence: bool = False,
        probabilities: bool = False,
    ) -> Prediction:
        """Predict a photograph: a file, or its pixels (H,W,3) uint8, red, green, blue.

        Of any size; a file is turned by its EXIF orientation where the model was trained so, and
        the prediction is turned back. Each probability of C classes takes four bytes a pixel.

        Raises:
            InputError: the file can't be read, or the array has another form.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise InputError(
                    f"an image must be (H,W,3) uint8, not {image.shape} {image.dtype}: a grey one "
                    "is np.stack([grey] * 3, axis=2), and OpenCV's BGR is image[..., ::-1]"
                )
            stored, orientation = image, 1
        else:
            stored, orientation = read_image(Path(image))
        height, width = stored.shape[:2]
        sink = Sink(
            np.empty((height, width), np.uint8),
            np.empty((height, width), np.float32) if confidence else None,
            np.empty((len(self.classes), height, width), np.float32) if probabilities else None,
        )
        self.fill([(stored, orientation)], [sink])
        return Prediction(
            sink.ids,
            self.classes,
            self.palette,
            confidence=sink.confidence,
            probabilities=sink.probabilities,
        )

    def shown(self, stored: Array, orientation: int) -> Array:
        """A stored photograph as the network is to see it."""
        if self.exif == "ignore":
            return stored
        return np.ascontiguousarray(upright(stored, orientation))

    @torch.no_grad()
    def fill(self, photographs: Sequence[tuple[Array, int]], sinks: Sequence["Sink"]) -> None:
        """Predict stored photographs with their orientations, each into arrays of its own.

        As the network sees them, all have one size.
        """
        images = [self.shown(*photograph) for photograph in photographs]
        turned = [
            sink.turned(orientation if self.exif == "apply" else 1)
            for sink, (_, orientation) in zip(sinks, photographs, strict=True)
        ]
        predictor = self._predictor_of(images[0].shape[:2])
        sure = any(sink.confidence is not None or sink.probabilities is not None for sink in sinks)
        predictor.network.eval()
        top = 0
        for band in predictor.probabilities(images) if sure else predictor.scores(images):
            probabilities = calibrated(band, self.temperature) if sure else band
            rows = slice(top, top + band.shape[2])
            for sink, found in zip(turned, probabilities, strict=True):
                sink.take(rows, found)
            top = rows.stop

    def _predictor_of(self, shape: tuple[int, ...]) -> Predictor:
        """The predictor, by windows where an image is too large for it."""
        predictor = self.predictor
        sizes = [resized(shape, predictor.scale, ratio) for ratio in predictor.scales]
        if predictor.window is None and max(height * width for height, width in sizes) > WHOLE:
            return replace(predictor, window=WINDOW)
        return predictor


@dataclass(frozen=True)
class Sink:
    """Arrays that take a prediction: ids (H,W), confidence (H,W), probabilities (C,H,W).

    In arrays of integers 1 is the largest of them.
    """

    ids: Array
    confidence: NDArray[Any] | None
    probabilities: NDArray[Any] | None

    def turned(self, orientation: int) -> "Sink":
        """The same memory as a viewer shows the photograph."""
        confidence, probabilities = self.confidence, self.probabilities
        if confidence is not None:
            confidence = upright(confidence, orientation)
        if probabilities is not None:
            last = np.moveaxis(probabilities, 0, -1)
            probabilities = np.moveaxis(upright(last, orientation), -1, 0)
        return Sink(upright(self.ids, orientation), confidence, probabilities)

    def take(self, rows: slice, scores: Tensor) -> None:
        """Take the scores (C,rows,W) of some rows."""
        best = scores.max(dim=0)
        self.ids[rows] = best.indices.to(torch.uint8).cpu().numpy()
        if self.confidence is not None:
            self.confidence[rows] = _scaled(best.values, self.confidence.dtype)
        if self.probabilities is not None:
            self.probabilities[:, rows] = _scaled(scores, self.probabilities.dtype)


def _scaled(probabilities: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    given: NDArray[Any] = probabilities.cpu().numpy()
    return np.rint(given * np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else given


def load_model(
    path: "str | PathLike[str]",
    device: str | None = None,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Model:
    """A model from a file that a training wrote: `model.safetensors`, `best.pt` or `last.pt`.

    `device` is what torch calls it; None takes a GPU where there is one. Predictions are averaged
    over `scales`, ratios to the size that the model was trained at, and with `flip` over those of
    the mirrored image. Nothing in the file is run.

    Raises:
        InputError: the file is missing, broken, or not of this tool; the text names it. Or torch
            has no such device here.
    """
    path = Path(path)
    content = read_file(path)
    if not is_own(content):
        raise InputError(
            f"{path}: not a model of this tool; weights of others are evaluated and kept as one by "
            "train.load_from with train.iterations: 0"
        )
    check_format(content, path, "export it anew by `dvc repro`")
    chosen = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not scales or not all(0.01 <= scale <= 100 for scale in scales):
        raise InputError(f"scales must be ratios from 0.01 to 100, not {list(scales)}")
    described = describe(content, path)
    predictor = build_predictor(described, content, chosen)
    return Model(
        described.classes,
        described.palette,
        exif=described.exif,
        temperature=described.temperature,
        predictor=replace(predictor, scales=tuple(scales), flip=flip),
    )


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"there is no device {name!r} for torch here: {one_line(error)}") from None
    return torch.device(name)


def describe_file(path: Path) -> _Described:
    """What a file of safetensors says of its weights, which are not read.

    Raises:
        InputError: it is not what this tool writes.
    """
    return describe(read_description(path), path)


def describe(content: Mapping[str, Any], path: Path) -> _Described:
    """What a checkpoint or a model of ours says of itself.

    Raises:
        InputError: it is not what this tool writes.
    """
    told = {name: content.get(name) for name in _Described.model_fields}
    try:
        described = _Described.model_validate_json(json.dumps(told))
    except (RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its description can't be used: {error}") from None
    if not len(described.classes) == len(described.palette) == len(described.frequency):
        raise InputError(f"{path}: its description has not one colour and frequency a class")
    return described


def build_predictor(
    described: _Described, content: Mapping[str, Any], device: torch.device
) -> Predictor:
    """The network of a file's content with its own preprocessing, on a device.

    Raises:
        InputError: the weights do not fit the network that the description names.
    """
    trained = described.params
    backbone = trained.model.backbone.model_copy(update={"pretrained": None, "with_cp": False})
    section = trained.model.model_copy(update={"backbone": backbone})
    labels = Labels(len(described.classes), described.ignore_index, described.frequency)
    precision = PRECISIONS[trained.train.precision]
    with torch.random.fork_rng(devices=[]):  # what the weights start from is replaced at once
        network = build_model(section, labels)
    network.to(device, precision.weights).to(memory_format=torch.channels_last)
    fill(network, averaged(dict(content)), "the checkpoint")
    window = trained.evaluation
    return Predictor(
        network.eval(),
        Normalization(section.mean, section.std, precision=precision, device=device),
        precision=precision,
        scale=trained.augmentation.scale,
        window=(window.crop, window.stride) if window.mode == "slide" else None,
    )
