"""A recipe on one's own folder: what a clinician with photographs of feet would do first."""

import json
import shutil
from pathlib import Path

import cv2
import torch

from tests.project import (
    REPOSITORY,
    draw_feet,
    make_project,
    metrics,
    reproduced,
    set_params,
    stage,
)


def test_the_feets_recipe_trains_on_a_folder_of_photographs(tmp_path: Path) -> None:
    project = make_project(tmp_path, {})
    shutil.copy(REPOSITORY / "params.yaml", project)
    draw_feet(project / "data/photographs", {"": 10})
    for image in (project / "data/photographs/images").iterdir():
        assert cv2.imwrite(str(image.with_suffix(".jpg")), cv2.imread(str(image)))
        image.unlink()
    name = "pointrend_r101_512x512_160k_feetarch5k"
    said = stage(project, "recipe", "use", name)
    assert f"params.yaml is now {name}" in said
    sizes = {"augmentation.crop_size": [64, 64], "train.iterations": 3, "train.batch_size": 2}
    sizes |= {"model.backbone.name": "resnet18c"}
    set_params(project, {"data.root": "data/photographs"} | sizes)
    reproduced(project, "evaluate")
    checkpoint = torch.load(project / "outputs/checkpoints/best.pt", weights_only=True)
    assert checkpoint["classes"] == ["background", "foot", "arch"]
    assert checkpoint["params"]["model"]["head"]["name"] == "pointrend"
    assert checkpoint["params"]["model"]["loss"]["avg_non_ignore"] is False
    assert any(name.startswith("decode_head.1.fcs.2.") for name in checkpoint["model"])
    assert metrics(project)["mean_iou"] >= 0
    summary = json.loads((project / "data/prepared/summary.json").read_text())["splits"]
    assert {split: summary[split]["images"] for split in summary} == {
        "train": 6,
        "val": 2,
        "test": 2,
    }
