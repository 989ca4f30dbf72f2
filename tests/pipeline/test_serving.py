"""`dvc repro export/dvc.yaml`, and what MLflow serves of it over HTTP."""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import load_model
from pipeline.prediction.export import METADATA, open_session
from tests.browser import Browser
from tests.project import NETWORKS, dvc, make_project, query, reproduced, set_params
from tests.server import LocalServer

WEIGHTS = "outputs/checkpoints/model.safetensors"


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    """A finished training, and the stage's first run."""
    changes = {"model.head.name": "fcn", "tracking.registered_model": "feet"}
    counts = {"train": 8, "val": 3, "test": 4}
    make_project(folder, counts, **NETWORKS["pspnet"] | changes)
    reproduced(folder, "evaluate")
    assert not (folder / "outputs/export/metrics.json").exists()
    said = dvc(folder, "repro", "export/dvc.yaml")
    assert "Stage 'train' didn't change" in said
    assert "MLflow's feet has version 1, its best: mean IoU" in said
    return folder


def exported(project: Path) -> dict[str, Any]:
    return json.loads((project / "outputs/export/metrics.json").read_text())


def versions(project: Path) -> dict[int, dict[str, str]]:
    """The tags of each version."""
    found: dict[int, dict[str, str]] = {}
    rows = query(project, "SELECT version, key, value FROM model_version_tags WHERE name = 'feet'")
    for version, key, value in rows:
        found.setdefault(version, {})[key] = value
    return found


def best(project: Path) -> int:
    sql = "SELECT version FROM registered_model_aliases WHERE name = 'feet' AND alias = 'best'"
    return int(query(project, sql)[0][0])


def test_the_files_say_what_torch_says_and_what_they_need(project: Path):
    scores = exported(project)
    measured = json.loads((project / "metrics.json").read_text())
    assert scores["differing_share"] <= 1e-4
    assert scores["torch_mean_iou"] == pytest.approx(measured["mean_iou"], abs=1e-9)
    assert scores["mean_iou"] == pytest.approx(scores["torch_mean_iou"], abs=1e-4)
    assert scores["mean_iou_low"] == pytest.approx(measured["mean_iou_low"], abs=1e-3)
    int8 = scores["int8"]
    assert int8["bytes"] == (project / "outputs/export/model.int8.onnx").stat().st_size
    assert int8["bytes"] < 0.3 * scores["bytes"]
    assert int8["mean_iou_cost"] == pytest.approx(scores["mean_iou"] - int8["mean_iou"])
    session = open_session(project / "outputs/export/model.onnx")
    about = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert about["classes"] == ["background", "foot", "arch"]
    assert about["exif"] == "apply"
    assert about["scale"] is None
    assert [one.type for one in session.get_inputs()] == ["tensor(uint8)"]
    assert session.get_inputs()[0].shape == ["batch", "height", "width", 3]
    assert "outputs/export/metrics.json" in dvc(project, "metrics", "show")


def test_what_is_exported_is_not_exported_again_and_nothing_else_waits_for_it(project: Path):
    said = dvc(project, "repro", "export/dvc.yaml")
    assert "Stage 'export/dvc.yaml:export' didn't change, skipping" in said
    assert "export" not in dvc(project, "repro")


def test_a_version_tells_its_scores_and_where_it_comes_from(project: Path):
    scores, tags = exported(project), versions(project)[1]
    assert tags["mean_iou"] == f"{scores['mean_iou']:.4f}"
    assert tags["mean_iou_low"] == f"{scores['mean_iou_low']:.4f}"
    identity = json.loads((project / "outputs/run.json").read_text())
    assert tags["fingerprint"] == identity["fingerprint"]
    assert {"data.md5", "split", "git.rev"} <= tags.keys()
    ((run_id, described),) = query(project, "SELECT run_id, description FROM model_versions")
    assert run_id == identity["run_id"]
    assert described.startswith(f"mean IoU {tags['mean_iou']} on test, with other images ")
    assert query(project, "SELECT status FROM runs") == [("FINISHED",)]
    (requirements,) = (project / "mlartifacts/models").glob("*/artifacts/requirements.txt")
    named = {line.split("==")[0] for line in requirements.read_text().splitlines()}
    assert named == {"mlflow", "numpy", "onnxruntime", "opencv-python", "pillow"}


def test_the_pages_of_the_registered_model_name_the_best_version(project: Path):
    tags = versions(project)[1]
    described = f"mean IoU {tags['mean_iou']} on test, with other images "
    store = f"sqlite:///{project / 'mlflow.db'}"
    command = ["mlflow", "ui", "--backend-store-uri", store]
    with LocalServer(command, "/health", project) as ui, Browser() as browser:
        for page, shown in (
            ("models/feet", ["Version 1", "@ best", f"mean IoU {tags['mean_iou']} on test"]),
            ("models/feet/versions/1", ["feet", "@ best", described, *tags.values()]),
        ):
            browser.visit("about:blank", 1500, 1200)  # else only the part after # is read anew
            browser.visit(f"{ui.address}/#/{page}", 1500, 1200)
            there = f"{json.dumps(shown)}.every((one) => text.includes(one))"
            text = r"document.body.innerText.replaceAll(/\s/g, ' ')"  # some can't be broken
            browser.wait(f"const text = {text}; return {there}")


@pytest.fixture(scope="module")
def server(project: Path) -> Iterator[int]:
    """The port of a server of the best version, from a folder where nothing of ours lies."""
    empty = project / "empty"
    empty.mkdir()
    command = ["mlflow", "models", "serve", "-m", "models:/feet@best", "--env-manager", "local"]
    store = f"sqlite:///{project / 'mlflow.db'}"
    with LocalServer(command, "/ping", empty, MLFLOW_TRACKING_URI=store) as made:
        yield made.port


def post(port: int, columns: list[str], rows: list[list[str | None]]) -> tuple[int, Any]:
    """Status and content of the answer to a table."""
    body = json.dumps({"dataframe_split": {"columns": columns, "data": rows}}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_the_server_answers_photographs_as_load_model_does(project: Path, server: int):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8))
    for orientation in (1, 3, 6, 7):
        exif = Image.Exif()
        exif[0x0112] = orientation
        coarse.resize((203, 151)).save(project / f"turned-{orientation}.jpg", exif=exif)
    coarse.resize((57, 41)).convert("L").save(project / "grey.png")
    paths = [*sorted(project.glob("turned-*.jpg")), project / "grey.png"]
    status, content = post(server, ["image"], [[encoded(path)] for path in paths])
    assert status == 200, content
    model = load_model(project / WEIGHTS, "cpu")
    for path, answer in zip(paths, content["predictions"], strict=True):
        expected = model.predict(path)
        with Image.open(io.BytesIO(base64.b64decode(answer["mask"]))) as mask:
            assert mask.mode == "P"
            assert np.array_equal(np.asarray(mask), expected.ids)
            shown = np.asarray(mask.convert("RGB"))
        assert np.array_equal(shown, expected.picture())
        assert answer["areas"] == expected.areas
        assert (answer["height"], answer["width"]) == expected.ids.shape


def test_a_bad_request_is_told_what_is_wrong_and_the_next_is_answered(project: Path, server: int):
    no_image = base64.b64encode(b"no image").decode()
    for columns, rows, reason in (
        (["image"], [["#!?"]], "image 0 is not base64"),
        (["image"], [[no_image]], "image 0 can't be read"),
        (["image"], [[encoded(project / "grey.png")], [None]], "image 1 is missing"),
        (["image"], [[""]], "image 0 is missing"),
        (["image"], [], "there is no image"),
        (["picture"], [[no_image]], "missing inputs ['image']"),
    ):
        status, content = post(server, columns, rows)
        assert status == 400
        assert reason in content["message"]
    assert post(server, ["image"], [[encoded(project / "grey.png")]])[0] == 200


def test_another_training_gets_the_alias_only_if_it_is_better(project: Path):
    set_params(project, {"train.lr": 0.02})
    reproduced(project, "evaluate")
    said = dvc(project, "repro", "export/dvc.yaml")
    first, second = (float(versions(project)[number]["mean_iou"]) for number in (1, 2))
    assert first != second
    assert best(project) == (2 if second > first else 1)
    assert f"version 2, {'its' if second > first else 'not its'} best" in said
