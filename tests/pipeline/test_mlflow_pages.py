"""What MLflow's own pages show of our runs, looked at in Chromium on a real server."""

import json
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.tracking.store import TrackingParams
from pipeline.tracking.tracker import open_evaluation_run, open_training_run
from tests.browser import Browser
from tests.project import REPOSITORY, query
from tests.server import LocalServer

PARAMS = TrackingParams(uri=None, experiment="instep", log_interval=5)
DATA = ("feet", "0123456789abcdef0123456789abcdef.dir", "data/prepared")
COLOURS = {"background": (0, 0, 0), "foot": (214, 162, 90), "arch": (96, 211, 238)}
ITERATIONS, VALIDATIONS = 60, (20, 40, 60)
SCORES = {0.003: 0.6111, 0.01: 0.7222, 0.03: 0.5333}  # mean IoU by learning rate
NAMES = [
    "0.7222 unet, lr 0.01 (exp-1)",
    "0.6111 unet, lr 0.003 (exp-0)",
    "0.5333 unet, lr 0.03 (exp-2)",
]


def fill(folder: Path) -> None:
    """Three runs, as the stages `train` and `evaluate` tell of them."""
    rng = np.random.default_rng(0)
    for number, (lr, score) in enumerate(SCORES.items()):
        kept: list[str] = []
        tags = {"fingerprint": f"{number}" * 32, "dvc.exp_name": f"exp-{number}", "git.rev": "abc"}
        parameters = {"model.head.name": "unet", "train.lr": lr, "train.iterations": ITERATIONS}
        parameters |= {f"augmentation.number_{i}": i for i in range(80)}
        training = open_training_run(
            PARAMS, None, kept.append, f"unet, lr {lr:g} (exp-{number})", parameters, tags, DATA
        )
        for step in range(5, ITERATIONS + 1, 5):
            loss = float(np.exp(-step * lr) + 0.1 * rng.random())
            entry = {"train/loss": loss, "train/loss/cross_entropy": loss, "train/lr": lr}
            training.log({"iteration": step, **entry, "time/images_per_second": 20.0})
            if step in VALIDATIONS:
                share = score * step / ITERATIONS
                found = {"val/mean_iou": share, "val/best_mean_iou": share, "val/dice.foot": share}
                found |= {f"val/iou.{name}": share for name in COLOURS}
                training.log({"iteration": step, **found})
                for name in ("foot 00", "foot 01"):
                    image = rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)
                    ids = rng.integers(0, 3, (2, 40, 60)).astype(np.uint8)
                    training.log_picture(step, f"val_{name}", [image, *ids], COLOURS)
        training.finish("FINISHED")
        evaluation = open_evaluation_run(
            PARAMS, None, kept[0], f"{number}" * 32, f"evaluation-{number}", {}, tags, DATA
        )
        measured = {"mean_iou": score, "mean_dice": score, "pixel_accuracy": 0.9}
        evaluation.log({"iteration": 0} | {f"test/{name}": one for name, one in measured.items()})
        table = folder / "classes.tsv"
        rows = "".join(f"{name}\t{score}\n" for name in COLOURS)
        table.write_text(f"class\tiou\n{rows}", encoding="utf-8")
        evaluation.log_table(table, "evaluation")
        evaluation.log_result(
            score,
            {"mean_iou.interval": f"{score - 0.05:.4f} to {score + 0.05:.4f}"},
            f"**test: mean IoU {score:.4f}**, on 81 test images of feet\n\n"
            "The same result again, in a clone:\n\n    git checkout abc\n    dvc repro",
        )
        evaluation.finish("FINISHED")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of `mlflow ui`, as `make ui` starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        fill(folder)
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--workers", "1"]
    with LocalServer(["mlflow", "ui", *store], "/health", folder) as made:
        yield made.address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


class Ui:
    """The pages of one server in one browser."""

    def __init__(self, address: str, browser: Browser, folder: Path) -> None:
        self.address, self.browser = address, browser
        rows = query(folder, "SELECT name, run_uuid FROM runs ORDER BY name DESC")
        self.ids = [run_id for _, run_id in rows]  # the best first

    def show(self, page: str, *texts: str, height: int = 1200) -> str:
        """A page's text, once it has all of these."""
        address = f"{self.address}/#/{page}"
        self.browser.visit("about:blank", 1500, height)  # else only the part after # is read anew
        self.browser.visit(address, 1500, height)
        return self.wait(*texts)

    def wait(self, *texts: str) -> str:
        there = f"{json.dumps(texts)}.every((one) => document.body.innerText.includes(one))"
        self.browser.wait(f"return {there}")
        return self.browser.run("return document.body.innerText")


@pytest.fixture(scope="module")
def ui(server: str, browser: Browser, folder: Path) -> Ui:
    return Ui(server, browser, folder)


def test_the_table_of_runs_shows_a_score_before_each_name(ui: Ui) -> None:
    ui.show("experiments/1/runs", *NAMES, "3 matching runs")


def test_the_view_called_scores_has_them_as_columns_and_the_best_run_first(ui: Ui) -> None:
    (link,) = re.findall(r"http://127.0.0.1:5000/#/(\S+)'", (REPOSITORY / "Makefile").read_text())
    columns = ("test/mean_iou", "mean_iou.interval", "val/best_mean_iou")
    text = ui.show(link, *NAMES, *columns, "0.6722 to 0.7722", "Sort: test/mean_iou")
    assert sorted(NAMES, key=text.index) == NAMES
    assert "Prompts" not in text  # of MLflow's pages for language models


def test_a_run_s_page_begins_with_the_result_and_its_commands(ui: Ui) -> None:
    text = ui.show(
        f"experiments/1/runs/{ui.ids[0]}", "dvc repro", "val/iou/arch", "Parameters (83)"
    )
    assert text.index("test: mean IoU 0.7222, on 81 test images") < text.index("git checkout abc")
    assert text.index("dvc repro") < text.index("train/loss")


def test_metrics_stand_in_groups_and_pictures_at_every_validation(ui: Ui) -> None:
    page = f"experiments/1/runs/{ui.ids[0]}/model-metrics"
    ui.show(page, "best_mean_iou", "val_foot 00", "val_foot 01", height=4500)
    heads = ui.browser.run(
        "return [...document.querySelectorAll("
        "'[data-testid=experiment-view-compare-runs-section-header]')].map((one) => one.innerText)"
    )
    named = [head.splitlines()[0] for head in heads]
    assert named == ["test", "train", "train/loss", "val", "val/iou", "Model metrics"]
    slider = "[role=slider]"
    for step in VALIDATIONS:
        ui.browser.press(slider, "Right")
        ui.browser.wait(
            f"return document.querySelector('{slider}').ariaValueNow === '{step}' && "
            f"[...document.images].some((one) => one.src.includes('step%2B{step}%2B') && "
            "one.naturalWidth)"
        )


def test_the_classes_are_a_table(ui: Ui) -> None:
    page = f"experiments/1/runs/{ui.ids[0]}/artifacts/evaluation/classes.json"
    text = ui.show(page, "class", "background")
    assert "class\niou\nbackground\n0.7222\nfoot\n0.7222\narch\n0.7222" in text


def test_runs_are_compared_by_the_parameters_that_differ(ui: Ui) -> None:
    runs = urllib.parse.quote(json.dumps(ui.ids))
    ui.show(f"compare-runs?runs={runs}&experiments=%5B%221%22%5D", "Run details", *NAMES)
    ui.browser.run("document.querySelector('[aria-label=\"Parameters - Show diff only\"]').click()")
    ui.browser.wait("return !document.body.innerText.includes('augmentation.number_0')")
    assert "train.lr\t0.01\t0.003\t0.03" in ui.browser.run("return document.body.innerText")
