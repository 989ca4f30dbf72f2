"""`python -m stages.predict` on a folder of one's own: every kind of file, kills, two processes."""

import csv
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import load_model
from pipeline.disk import file_md5
from pipeline.evaluation.report import read_mask
from tests.faults.stage import started
from tests.project import make_project, query, reproduced, run, stage

WEIGHTS = "outputs/checkpoints/model.safetensors"


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    """A finished training."""
    make_project(folder, {"train": 8, "val": 3, "test": 4}, **{"model.head.name": "fcn"})
    reproduced(folder, "evaluate")
    return folder


@pytest.fixture(scope="module")
def photographs(project: Path) -> Path:
    """Of every kind that people have, and one that is none."""
    folder = project / "mixed"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def picture(height: int, width: int) -> Image.Image:
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
        return Image.fromarray(coarse).resize((width, height))

    for number, size in enumerate([(31, 77), (64, 64), (64, 64), (200, 150), (1, 1), (3, 90)]):
        picture(*size).save(folder / f"size {number}.png")
    for orientation in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture(40, 60).save(folder / f"below/turned-{orientation}.jpg", exif=exif)
    for mode in ("L", "LA", "RGBA", "P", "1"):
        picture(50, 40).convert(mode).save(folder / f"mode-{mode}.png")
    picture(50, 40).convert("CMYK").save(folder / "cmyk.jpg")
    sixteen = rng.integers(0, 65536, (45, 52)).astype(np.uint16)
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    for suffix in (".bmp", ".tif", ".webp"):
        picture(50, 40).save(folder / f"suffix{suffix[1:]}{suffix}")
    whole = (folder / "size 0.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no photograph")
    return folder


def predict(project: Path, *arguments: str, check: bool = True) -> str:
    return stage(project, "predict", *arguments, check=check)


def results(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): file_md5(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "predict.json" and path.suffix != ".jsonl"
    }


@pytest.fixture(scope="module")
def predicted(project: Path, photographs: Path) -> tuple[Path, str]:
    """The results of all of them, and what was said."""
    asked = ["mixed", "--out", "found", "--confidence", "--probabilities"]
    return project / "found", predict(project, *asked, check=False)


def test_every_photograph_has_its_results_and_a_broken_file_is_named(
    project: Path, photographs: Path, predicted: tuple[Path, str]
):
    out, said = predicted
    assert "19 of 20 photographs are predicted in found" in said
    assert "error: 1 could not be read:\n  mixed/broken.png: can't be read as an image" in said
    model = load_model(project / WEIGHTS)
    names = [p.relative_to(photographs) for p in photographs.rglob("*.*") if p.suffix != ".txt"]
    names.remove(Path("broken.png"))
    assert len(names) == 19
    with (out / "areas.csv").open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    for name in names:
        found = model.predict(photographs / name, confidence=True, probabilities=True)
        stem = name.with_suffix("")
        with Image.open(photographs / name) as image:
            assert found.ids.shape == image.size[::-1]
        assert np.array_equal(read_mask((out / f"masks/{stem}.png").read_bytes()), found.ids)
        with Image.open(out / f"masks/{stem}.png") as mask:
            assert mask.mode == "P"
        row = rows.pop(stem.as_posix())
        assert {key: int(row[key]) for key in found.areas} == found.areas
        assert (int(row["height"]), int(row["width"])) == found.ids.shape
        probabilities = np.load(out / f"probabilities/{stem}.npy")
        assert np.abs(probabilities / 65535 - found.probabilities).max() < 1e-5
        with Image.open(out / f"confidence/{stem}.png") as image:
            assert np.abs(np.asarray(image) / 255 - found.confidence).max() < 0.003
        assert float(row["confidence"]) == pytest.approx(found.confidence.mean(), abs=0.003)
    assert rows == {}
    with Image.open(out / "overlays/below/turned-6.jpg") as overlay:
        assert overlay.size == (40, 60)  # as a viewer shows the photograph


def test_the_images_of_an_evaluation_are_predicted_as_it_did(project: Path):
    predict(project, "data/feet/images/test", "--out", "again")
    masks = sorted((project / "outputs/evaluation/predictions/test").iterdir())
    assert len(masks) == 4
    for mask in masks:
        assert mask.read_bytes() == (project / f"again/masks/{mask.name}").read_bytes()


def test_what_is_done_is_not_done_again_and_what_has_changed_is(project: Path):
    inputs = ["data/feet/images/val/*.png", "--out", "twice", "--weights", WEIGHTS]
    inputs += ["--batch-size", "2"]
    predict(project, *inputs)
    before = {path: path.stat().st_mtime_ns for path in (project / "twice/masks").iterdir()}
    assert len(before) == 3
    changed, *others = sorted(before)
    (project / "data/feet/images/val" / changed.name).touch()
    assert "3 of 3" in predict(project, *inputs)
    assert changed.stat().st_mtime_ns > before[changed]
    assert [path.stat().st_mtime_ns for path in others] == [before[path] for path in others]
    said = predict(project, *inputs, "--flip", check=False)
    assert "twice: holds predictions with another flip; choose another --out" in said


def test_a_killed_run_goes_on_and_two_processes_find_the_same(project: Path, predicted: tuple):
    asked = ["mixed", "--confidence", "--probabilities"]
    with started(project, "stages.predict", *asked, "--out", "killed") as process:
        notes = project / "killed/.done-0.jsonl"
        deadline = time.monotonic() + 60
        while not notes.is_file() or not notes.read_text().count("\n"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.wait()
    with notes.open("a") as file:
        file.write('{"name": "cut o')
    done = notes.read_text().count("\n")
    assert 0 < done < 19
    said = predict(project, *asked, "--out", "killed", "--gpus", "2", check=False)
    assert "19 of 20" in said
    assert results(project / "killed") == results(predicted[0])
    new = [json.loads(line) for line in (project / "killed/.done-1.jsonl").read_text().splitlines()]
    assert 0 < len(new) < 19 - done


def test_a_model_is_named_by_its_revision_or_its_run(project: Path):
    (run_id,) = query(project, "SELECT run_uuid FROM runs")[0]
    run(["git", "add", "-A"], project)
    run(["git", "commit", "-q", "-m", "Trained"], project)
    inputs = ["data/feet/images/val"]
    for number, name in enumerate(["HEAD", run_id]):
        predict(project, *inputs, "--weights", name, "--out", f"named-{number}")
    first, other = (results(project / f"named-{number}") for number in range(2))
    assert len(first) == 3 * 2 + 1
    assert other == first
    said = predict(project, *inputs, "--weights", "nobody", "--out", "x", check=False)
    assert "error: nobody is no file, no experiment, no revision and no MLflow run" in said


def test_the_notebook_runs(project: Path):
    notebook = json.loads((project / "examples/predict.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 5
    said = run([sys.executable, "-c", "\n".join(cells)], project / "examples").stdout
    assert "mean confidence 0." in said
    with Image.open(project / "examples/mask.png") as mask:
        assert mask.size == (370, 200)


def test_mlflow_keeps_the_model_alone(project: Path):
    (run_id,) = query(project, "SELECT run_uuid FROM runs")[0]
    kept = project / "mlartifacts" / run_id / "artifacts/checkpoints"
    assert [path.name for path in kept.iterdir()] == ["model.safetensors"]
    assert file_md5(kept / "model.safetensors") == file_md5(project / WEIGHTS)
    assert "calibrated on val by the temperature" in (project / "outputs/train.log").read_text()
