"""Row 24: requests to the served model that claim more than they are."""

import base64
import io

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from pipeline.serving import LARGEST, decoded
from tests.fuzz.images import claiming


def test_an_image_that_claims_too_many_pixels_is_refused_by_its_header() -> None:
    given = base64.b64encode(claiming(20_000, 20_001)).decode()
    with pytest.raises(MlflowException, match=r"image 3 has 20001 x 20000 pixels.*at most 8388608"):
        decoded(given, 3, LARGEST)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused_and_not_answered_for_its_first_picture(kind: str) -> None:
    one = Image.fromarray(np.full((9, 8, 3), 90, np.uint8))
    other = Image.fromarray(np.full((9, 8, 3), 10, np.uint8))
    file = io.BytesIO()
    one.save(file, kind, save_all=True, append_images=[other])
    with pytest.raises(MlflowException, match="image 0 is an animation"):
        decoded(base64.b64encode(file.getvalue()).decode(), 0, LARGEST)
    file = io.BytesIO()
    one.save(file, kind, lossless=True)
    assert decoded(base64.b64encode(file.getvalue()).decode(), 0, LARGEST)[0].shape == (9, 8, 3)
