"""A trained network as an ONNX file, which runs without torch and without this repository.

The file has the input `image`, uint8 (N,H,W,3) RGB of any number and size, and the output
`classes`, uint8 (N,H,W): normalisation, resizing and argmax are inside. It computes in fp32, in one
view of the whole image. What a caller needs beside it is JSON in its metadata, see `described`.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from pipeline.data.store import Split, spread
from pipeline.data.table import Array
from pipeline.data.transforms import resized
from pipeline.disk import FORMAT
from pipeline.errors import InputError, one_line
from pipeline.evaluation.inference import Predictor
from pipeline.models.layers import resize
from pipeline.precision import PRECISIONS, Normalization
from pipeline.prediction.model import Model

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

METADATA = "instep"  # the key of the JSON among the file's metadata_props
CALIBRATION = 64  # images of train whose activations give the ranges of int8
# torch.export traces at such a size and takes no side for shorter; it holds for smaller ones, too,
# since ONNX looks at sizes only when it runs.
TRACED = (2, 96, 128)
SIDES = (64, 2**14)


class OneView(nn.Module):
    """What the file computes: an image, as the network is to see it -> its classes.

    Where the network was trained at a scale of its own, the caller resizes the image to it, and
    says by `size` (2,) int64, height and width, how large the classes are to be.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.network = predictor.network
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(predictor.normalize, name))

    def forward(self, image: Tensor, size: Tensor | None = None) -> Tensor:
        """(N,H,W,3) uint8 -> (N,H,W) uint8, or of `size`."""
        inputs = ((image.to(self.mean.dtype) - self.mean) / self.std).permute(0, 3, 1, 2)
        seen = (image.shape[1], image.shape[2])
        scores = self.network.scores(self.network(inputs), seen, slice(0, seen[0]))
        if size is not None:
            height, width = size.tolist()
            torch._check(height >= 1)
            torch._check(width >= 1)
            scores = resize(scores, (height, width))
        return scores.argmax(dim=1).to(torch.uint8)


def in_one_view(model: Model) -> Predictor:
    """The model's predictor as the file has it: fp32 on the CPU, whole images, one view."""
    given, cpu, precision = model.predictor, torch.device("cpu"), PRECISIONS["fp32"]
    network = given.network.to(cpu, precision.weights).eval()
    levels = (given.normalize.mean.tolist(), given.normalize.std.tolist())
    normalize = Normalization(*levels, precision=precision, device=cpu)
    return replace(
        given,
        network=network,
        normalize=normalize,
        precision=precision,
        window=None,
        scales=(1.0,),
        flip=False,
        batch_size=1,
    )


def described(model: Model) -> dict[str, Any]:
    """What a caller needs to know beside inputs and output.

    `exif`: apply, a photograph is turned by its EXIF orientation before, and its classes back
    after; ignore, it is seen as it is stored. `scale`: null, or the long and the short side that
    the caller resizes an image into, see `resized`, by OpenCV's INTER_LINEAR.
    """
    scale = model.predictor.scale
    return {
        "format": FORMAT,
        "classes": list(model.classes),
        "palette": [list(colour) for colour in model.palette],
        "exif": model.exif,
        "scale": None if scale is None else list(scale),
        "preprocessing": {
            "colours": "RGB",
            "mean": model.predictor.normalize.mean.tolist(),
            "std": model.predictor.normalize.std.tolist(),
            "normalised": "inside",
            "resized": "not" if scale is None else "by the caller, who gives the file its size",
        },
    }


def export_onnx(predictor: Predictor, about: dict[str, Any], head: str, path: Path) -> None:
    """Write the ONNX file of a predictor `in_one_view`, with its description.

    Raises:
        InputError: the network can't be exported; names the head, the rule and the remedy.
    """
    network = OneView(predictor).eval()
    dims = {1: torch.export.Dim("height", min=SIDES[0], max=SIDES[1])}
    dims |= {2: torch.export.Dim("width", min=SIDES[0], max=SIDES[1])}
    inputs: dict[str, Tensor] = {"image": torch.zeros(*TRACED, 3, dtype=torch.uint8)}
    shapes: dict[str, Any] = {"image": dims | {0: torch.export.Dim("batch")}}
    if predictor.scale is not None:
        inputs["size"] = torch.tensor([100, 150])
        shapes["size"] = None
    predictor.network.settle()
    with torch.no_grad(), _onnx_padding(predictor.network):
        try:
            traced = torch.export.export(
                network,
                args=(),
                kwargs=inputs,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            program = torch.onnx.export(
                traced,
                dynamo=True,
                input_names=list(inputs),
                output_names=["classes"],
                dynamic_shapes=shapes,  # their names alone: of a traced program they are known
                verbose=False,
            )
        except Exception as error:  # of torch.export there are dozens of kinds
            raise InputError(
                f"model.head.name {head} can't be exported to ONNX: its Python code must not "
                f"depend on an image's size, and torch.export says: {one_line(error)}; "
                "predict with the checkpoint instead (python -m stages.predict), or train a head "
                "that exports: docs/serving.md lists them"
            ) from error
    assert program is not None, "of an exported program torch makes one of ONNX"
    program.model.metadata_props[METADATA] = json.dumps(about, ensure_ascii=False)
    program.save(path, external_data=False)


@contextmanager
def _onnx_padding(network: nn.Module) -> Iterator[None]:
    """Within the block TensorFlow's padding is ONNX's own, which knows it by a name.

    As timm computes it from sizes, torch.export needs five minutes for five layers.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, Conv2dSame)]
    for layer in layers:
        layer.forward = partial(_same_convolution, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _same_convolution(layer: Conv2dSame, x: Tensor) -> Tensor:
    """ONNX's Conv with auto_pad SAME_UPPER, for torch.export: (N,K,H,W) -> (N,C,H/s,W/s)."""
    sides = [(side + step - 1) // step for side, step in zip(x.shape[2:], layer.stride)]
    bias = [] if layer.bias is None else [layer.bias]
    result: Tensor = torch.onnx.ops.symbolic(
        "Conv",
        [x, layer.weight, *bias],
        {
            "auto_pad": "SAME_UPPER",
            "kernel_shape": list(layer.kernel_size),
            "strides": list(layer.stride),
            "dilations": list(layer.dilation),
            "group": layer.groups,
        },
        dtype=x.dtype,
        shape=[x.shape[0], layer.out_channels, *sides],
    )
    return result


def quantize(path: Path, train: Split, scale: Sequence[int] | None, to: Path) -> None:
    """Write an int8 file of an ONNX file: weights and activations of its convolutions.

    The ranges of activations are those of some images of train, at equal distances.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc] # the library has no types
        """One image after another, as the file is fed with them."""

        def __init__(self) -> None:
            chosen = spread(len(train), CALIBRATION).tolist()
            self._feeds = (feeds([train[index][0]], scale) for index in chosen)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(to),
            Reader(),
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def feeds(images: Sequence[Array], scale: Sequence[int] | None) -> dict[str, Any]:
    """What a session is fed with for stored images (H,W,3) of one size."""
    if scale is None:
        return {"image": np.stack(images)}
    shape = (images[0].shape[0], images[0].shape[1])
    height, width = resized(shape, (scale[0], scale[1]))
    seen = images
    if (height, width) != shape:
        seen = [np.asarray(cv2.resize(image, (width, height)), np.uint8) for image in images]
    return {"image": np.stack(seen), "size": np.array(shape, np.int64)}


def open_session(path: Path) -> "InferenceSession":
    """Onnxruntime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # of ONNX's own padding it warns at every layer
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_session(
    session: "InferenceSession", images: Sequence[Array], scale: Sequence[int] | None
) -> Array:
    """The classes (N,H,W) uint8 of stored images (H,W,3) of one size."""
    (classes,) = session.run(["classes"], feeds(images, scale))
    return np.asarray(classes, np.uint8)
