"""Labels that look wrong, by hand-computed probabilities."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.evaluation.inference import Predictor
from pipeline.precision import PRECISIONS, Normalization
from pipeline.prediction.labels import Doubt, judge, ranked
from pipeline.prediction.model import Model
from tests.unit.test_prediction import Sure


class Probable(Sure):
    """Probabilities that are the red, green and blue of a pixel, in hundredths."""

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores / 100


def model() -> Model:
    precision, cpu = PRECISIONS["fp32"], torch.device("cpu")
    normalize = Normalization((0, 0, 0), (1, 1, 1), precision=precision, device=cpu)
    predictor = Predictor(Probable(1.0), normalize, precision=precision, scale=None, window=None)
    palette = ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    return Model(("sky", "tree", "house"), palette, "apply", None, predictor)


def test_an_image_is_as_good_as_its_least_likely_labels():
    image = np.zeros((2, 3, 3), np.uint8)
    image[:] = (80, 15, 5)
    image[0, 1:] = (4, 95, 1)
    target = np.array([[0, 0, 0], [0, 0, 255]], np.uint8)
    doubt, prediction, unlikely = judge(model(), image, target)
    likely = np.array([0.8, 0.04, 0.04, 0.8, 0.8])
    weights = np.exp((1 - likely) / 0.1)
    assert doubt.quality == pytest.approx((likely * weights).sum() / weights.sum(), abs=1e-6)
    assert prediction.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert unlikely.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert doubt.share == pytest.approx(2 / 5)
    assert doubt[2:] == (2, (1, 0, 2, 1), "sky", "tree")


def test_an_image_without_an_unlikely_label_has_no_place():
    image = np.full((2, 2, 3), (60, 30, 10), np.uint8)
    doubt, _, unlikely = judge(model(), image, np.zeros((2, 2), np.uint8))
    assert doubt == Doubt(pytest.approx(0.6), 0.0, 0, (0, 0, 0, 0), "", "")
    assert not unlikely.any()
    blank, _, _ = judge(model(), image, np.full((2, 2), 255, np.uint8))
    assert blank == Doubt(1.0, 0.0, 0, (0, 0, 0, 0), "", "")


def test_the_worst_come_first_and_names_decide_between_equals():
    doubts = {name: Doubt(q, 0, 0, (0, 0, 0, 0), "", "") for name, q in zip("cab", (0.5, 0.5, 0.1))}
    assert [name for name, _ in ranked(list(doubts.items()))] == ["b", "a", "c"]
