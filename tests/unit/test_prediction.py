"""A file of weights in, class ids of photographs out; and how sure a network may be."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline import load_model
from pipeline.data.store import Split, spread
from pipeline.data.table import Entry
from pipeline.evaluation.report import read_mask
from pipeline.models.network import Network
from pipeline.models.weights import classes_of, read_file, weights_of
from pipeline.precision import PRECISIONS, Normalization
from pipeline.prediction import model as prediction
from pipeline.prediction.batch import find_photographs
from pipeline.prediction.calibration import calibrated, fit_temperature
from pipeline.prediction.model import Model
from pipeline.training.checkpoint import build_checkpoint, load_checkpoint, save, save_model
from pipeline.training.state import result_params
from tests.unit.pairs import photo
from tests.unit.sections import REPOSITORY, build, params

CLASSES = ["sky", "tree", "house"]
PALETTE = [[0, 0, 0], [0, 255, 0], [200, 30, 30]]
CHANGES = {
    "model.head.name": "pspnet",
    "model.head.channels": 8,
    "model.backbone.name": "resnet18",
    "model.backbone.pretrained": None,
}


def checkpoint(exif: str = "apply", **changes: object) -> dict:
    """Of a network of random weights that has learned nothing."""
    given = params(CHANGES | changes)
    torch.manual_seed(0)
    network = build(given.model, 3)
    for name, weight in network.state_dict().items():
        if name == "decode_head.conv_seg.weight":
            weight.mul_(30)  # else all pixels are of one class
    result = result_params(
        augmentation=given.augmentation,
        model=given.model,
        train=given.train,
        evaluation=given.evaluation,
    )
    about = {
        "classes": CLASSES,
        "palette": PALETTE,
        "ignore_index": 255,
        "exif": exif,
        "frequency": [0.2, 0.3, 0.5],
        "params": result,
    }
    states = {"model": network.state_dict(), "optimizer": {}}
    return build_checkpoint(states, 7, None, about)


def write(path: Path, temperature: float | None = None, **changes: object) -> Path:
    save_model(checkpoint(**changes), temperature, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "model.safetensors")


def test_a_model_and_a_checkpoint_predict_what_their_network_does(file: Path, tmp_path: Path):
    save(checkpoint(), tmp_path / "best.pt")
    picture = photo(1, (40, 56))
    found = [load_model(path).predict(picture) for path in (file, tmp_path / "best.pt")]
    network = build(params(CHANGES).model, 3).eval()
    network.load_state_dict(checkpoint()["model"])
    normal = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() - 127) / 128
    with torch.no_grad():
        scores = network.scores(network(normal), (40, 56), slice(0, 40))
    for one in found:
        assert np.array_equal(one.ids, scores[0].argmax(dim=0).numpy())
        assert one.probabilities is None
    assert len(np.unique(found[0].ids)) > 1


def test_a_prediction_has_classes_colours_and_areas(file: Path, tmp_path: Path):
    found = load_model(file).predict(photo(1, (40, 56)))
    assert list(found.classes) == CLASSES
    assert found.areas == {name: int((found.ids == i).sum()) for i, name in enumerate(CLASSES)}
    assert found.picture()[0, 0].tolist() == PALETTE[found.ids[0, 0]]
    found.save(tmp_path / "mask.png")
    assert np.array_equal(read_mask((tmp_path / "mask.png").read_bytes()), found.ids)
    grey = np.full((40, 56, 3), 100, np.uint8)
    expected = [round((100 + level) / 2) for level in PALETTE[found.ids[3, 4]]]
    assert found.overlay(grey)[3, 4].tolist() == expected


def test_a_model_is_shown_in_a_line(file: Path):
    shown = repr(load_model(file))
    assert shown.startswith("Model(classes=")
    assert len(shown) < 300


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_seen_upright_and_its_mask_lies_as_it_is_stored(
    orientation: int, file: Path, tmp_path: Path
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(photo(2, (36, 50)))
    stored.save(tmp_path / "a.png", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    model = load_model(file)
    upright = model.predict(np.array(shown), probabilities=True)
    found = model.predict(tmp_path / "a.png", confidence=True, probabilities=True)
    mask = Image.fromarray(found.ids)
    mask.save(tmp_path / "mask.png", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "mask.png"))
    assert found.ids.shape == found.confidence.shape == (36, 50)
    assert np.array_equal(np.asarray(turned), upright.ids)
    most = found.probabilities.max(axis=0)
    assert np.array_equal(most, found.confidence)
    assert (
        np.sort(most.ravel()).tolist()
        == np.sort(upright.probabilities.max(axis=0).ravel()).tolist()
    )
    as_stored = load_model(write(tmp_path / "ignoring.safetensors", exif="ignore"))
    ignoring = as_stored.predict(tmp_path / "a.png")
    assert np.array_equal(ignoring.ids, model.predict(np.array(stored)).ids)


def test_probabilities_sum_to_one_and_the_temperature_changes_no_class(tmp_path: Path):
    picture = photo(3, (33, 47))
    asked = {"confidence": True, "probabilities": True}
    bare = load_model(write(tmp_path / "a.safetensors")).predict(picture, **asked)
    cooled = load_model(write(tmp_path / "b.safetensors", 4.0)).predict(picture, **asked)
    assert np.array_equal(bare.ids, cooled.ids)
    for one in (bare, cooled):
        assert np.allclose(one.probabilities.sum(axis=0), 1, atol=1e-5)
        assert np.array_equal(one.probabilities.argmax(axis=0), one.ids)
    assert cooled.confidence.mean() < bare.confidence.mean() - 0.01


def test_a_temperature_of_two_takes_square_roots():
    given = torch.tensor([0.64, 0.16, 0.04, 0.16]).view(1, 4, 1, 1)
    roots = [0.8, 0.4, 0.2, 0.4]
    found = calibrated(given, 2.0).flatten().tolist()
    assert found == pytest.approx([root / sum(roots) for root in roots], abs=1e-6)
    assert calibrated(given, None) is given


class Sure(Network):
    """Logits that are the red, green and blue of a pixel, `factor` times too large."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.key_draws()

    def outputs(self, images: Tensor) -> Tensor:
        return images * self.factor

    def count(self, target: Tensor) -> Tensor:
        raise AssertionError("a calibration learns nothing")

    def losses(self, *arguments: object) -> dict[str, Tensor]:
        raise AssertionError("a calibration learns nothing")

    def scores(self, outputs: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
        return outputs[:, :, rows]


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_is_by_how_much_a_network_is_too_sure(factor: float, tmp_path: Path):
    rng = np.random.default_rng(0)
    entries, offset = [], 0
    with (tmp_path / "a.bin").open("wb") as shard:
        for number in range(8):
            image = rng.integers(0, 256, (90, 100, 3)).astype(np.uint8)
            true = np.exp((image - 127.0) / 40)
            draws = rng.random((90, 100, 1)) * true.sum(axis=2, keepdims=True)
            target = (draws > true.cumsum(axis=2)).sum(axis=2).astype(np.uint8)
            target[:5] = 255
            entries.append(Entry(f"{number}", "", "a.bin", offset, 90, 100))
            offset += shard.write(image.tobytes() + target.tobytes())
    precision, cpu = PRECISIONS["fp32"], torch.device("cpu")
    normalize = Normalization((127,) * 3, (40,) * 3, precision=precision, device=cpu)
    predictor = prediction.Predictor(
        Sure(factor), normalize, precision=precision, scale=None, window=None
    )
    temperature, before, after = fit_temperature(predictor, Split(tmp_path, entries), 255)
    assert temperature == pytest.approx(factor, rel=0.05)
    assert after <= before
    assert fit_temperature(predictor, Split(tmp_path, []), 255) is None


def test_what_is_spread_lies_at_equal_distances():
    assert spread(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(2, 3).tolist() == [0, 1]
    assert spread(0, 3).tolist() == []


def test_an_image_too_large_for_the_network_is_seen_by_windows(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    model, picture = load_model(file), photo(4, (70, 90))
    whole = model.predict(picture).ids
    monkeypatch.setattr(prediction, "WHOLE", 70 * 90 - 1)
    monkeypatch.setattr(prediction, "WINDOW", ((32, 40), (24, 30)))
    windows = replace(model.predictor, window=((32, 40), (24, 30)))
    (expected,) = windows.predict([picture])
    found = model.predict(picture).ids
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, whole)
    assert np.array_equal(
        model.predict(picture[:60]).ids, replace(model.predictor).predict([picture[:60]])[0]
    )


def test_scales_and_a_flip_are_averaged(file: Path):
    picture = photo(5, (64, 64))
    model = load_model(file, scales=(0.5, 1.0), flip=True)
    averaging = replace(load_model(file).predictor, scales=(0.5, 1.0), flip=True)
    assert np.array_equal(model.predict(picture).ids, averaging.predict([picture])[0])


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_an_array_of_another_form_is_refused(wrong: np.ndarray, file: Path):
    with pytest.raises(ValueError, match=r"an image must be \(H,W,3\) uint8"):
        load_model(file).predict(wrong)


def test_equal_models_have_equal_bytes_and_are_started_from_but_not_gone_on_with(tmp_path: Path):
    one, other = (write(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert one.read_bytes() == other.read_bytes()
    content = read_file(one)
    assert classes_of(content) == CLASSES
    expected = checkpoint()["model"]
    assert weights_of(content, one).keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in content["model"].items())
    with pytest.raises(ValueError, match=r"a.safetensors: not a checkpoint .* not gone on with"):
        load_checkpoint(one)


def broken(path: Path, **changes: object) -> Path:
    given = checkpoint()
    given.update(changes)
    save(given, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "has format 1"),
        ({"classes": ["one"]}, "its description can't be used"),
        ({"exif": "maybe"}, "its description can't be used"),
        ({"palette": PALETTE[:2]}, "has not one colour"),
        ({"params": {"model": {"head": {"name": "x"}}}}, "its description can't be used"),
    ],
)
def test_a_file_whose_description_is_wrong_is_named(
    changes: dict[str, object], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=rf"wrong\.pt.*{message}"):
        load_model(broken(tmp_path / "wrong.pt", **changes))


def test_a_file_of_another_tool_is_named_with_the_way_to_use_it(tmp_path: Path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"other\.pth: not a model of this tool; .* train\.iterations: 0"
    ):
        load_model(tmp_path / "other.pth")


@pytest.mark.slow
def test_a_model_needs_neither_dvc_nor_mlflow_nor_a_project(file: Path, tmp_path: Path):
    Image.fromarray(photo(0)).save(tmp_path / "a.png")
    code = (
        "import json, sys; from pipeline import load_model\n"
        f"found = load_model({str(file)!r}).predict('a.png')\n"
        "print(json.dumps([found.areas, [n for n in ('dvc', 'mlflow') if n in sys.modules]]))"
    )
    paths = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, check=True)
    areas, imported = json.loads(done.stdout)
    assert sum(areas.values()) == 12 * 16
    assert imported == []
    assert {path.name for path in tmp_path.iterdir()} == {"a.png"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["nowhere"], "nowhere: no photograph"),
        (["*/nothing.jpg"], "nothing.jpg: no photograph"),
        (["a/x.png", "b"], "a/x.png and b/x.png would both become x; name a folder that holds"),
        (["a", "c"], "c/x.png: same stem as x.jpg; keep one of them"),
    ],
)
def test_inputs_without_a_photograph_of_their_own_are_refused(
    inputs: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a/x.png", "b/x.png", "c/x.png", "c/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_photographs(inputs)


def test_the_names_of_results_are_stems_or_paths_below_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a/x.png", "a/b/y.jpg", "z.tif", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    found = {str(path): name for path, name in find_photographs(["a", "z.*"])}
    assert found == {"a/b/y.jpg": "b/y", "a/x.png": "x", "z.tif": "z"}
    assert {name for _, name in find_photographs(["*", str(tmp_path / "z.tif")])} == {
        "b/y",
        "x",
        "z",
    }


def test_the_library_has_one_door(file: Path):
    import pipeline

    assert isinstance(pipeline.load_model(file), Model)
    with pytest.raises(AttributeError, match="no attribute 'load_nothing'"):
        pipeline.load_nothing  # noqa: B018
