"""The types that a network computes in, and images as its input."""

import pytest
import torch

from pipeline.precision import PRECISIONS, Normalization
from tests.unit.sections import CPU


def normalization(mean: tuple, std: tuple, precision: str) -> Normalization:
    return Normalization(mean, std, precision=PRECISIONS[precision], device=CPU)


def test_normalisation_by_hand():
    images = torch.tensor([0, 127, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    done = normalization((127, 127, 5), (128, 64, 250), "fp64")(images)
    assert done.flatten().tolist() == [-127 / 128, 0, 1]
    assert done.dtype == torch.float64


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_images_are_normalised_in_fp32_but_for_fp64(precision: str):
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    done = normalization((0, 0, 0), (1, 1, 1), precision)(images)
    assert done.dtype == torch.float32
    assert torch.equal(done.permute(0, 2, 3, 1), images.float())
    assert done.is_contiguous(memory_format=torch.channels_last)
    exact = normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "fp64")(images)
    found = normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), precision)(images)
    assert (found - exact).abs().max() < 1e-6


def test_a_normalisation_is_nothing_that_a_checkpoint_holds():
    one = normalization((0, 0, 0), (1, 1, 1), "fp32")
    assert list(one.state_dict()) == list(one.parameters()) == []
    assert {name: part.shape for name, part in one.named_buffers()} == {
        "mean": (3,),
        "std": (3,),
    }


@pytest.mark.parametrize(
    ("precision", "weights", "computed"),
    [
        ("fp32", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
    ],
)
def test_a_forward_computes_in_the_type_of_its_precision(
    precision: str, weights: torch.dtype, computed: torch.dtype
):
    own = PRECISIONS[precision]
    assert own.weights == weights
    layer = torch.nn.Linear(3, 2).to(own.weights)
    with own.autocast(CPU):
        assert layer(torch.ones(1, 3, dtype=own.weights)).dtype == computed
    assert layer(torch.ones(1, 3, dtype=own.weights)).dtype == weights
