"""What a browser makes of the pages: the report, DVC's plots, the comparison."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser
from tests.project import commit, dvc, make_project, metrics, reproduced, run, stage

LIVE = "<script>document.title = 'run'</script>"
CLOSING = "</script><img onerror=run() src=x>"
SCREENS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
PAGES = {
    "report": "outputs/report.html",
    "plots": "dvc_plots/index.html",
    "comparison": "compare.html",
}
TITLES = {
    "report": "Evaluation on feet, test",
    "plots": "Plots",
    "comparison": "A and B on 7 images",
}


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    """Two experiments, with classes whose names are HTML, and all pages of them."""
    classes = ["background", LIVE, CLOSING]
    make_project(folder, {"train": 8, "val": 2, "test": 7}, **{"data.classes": classes})
    reproduced(folder)
    commit(folder, "Trained")
    dvc(folder, "exp", "run", "--name", "mirrored", "-S", "evaluation.flip=true")
    installed = ["make", "--silent", "--old-file=.venv/.installed"]  # by whoever runs the tests
    said = run([*installed, "plots", "REVS=workspace HEAD"], folder).stdout
    assert said.strip() == (folder / PAGES["plots"]).as_uri()
    stage(folder, "compare", "HEAD", "workspace")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def opened(browser: Browser, project: Path, page: str, width: int, scheme: str) -> None:
    browser.open(project / PAGES[page], width, scheme)
    if page == "plots":  # which are drawn when the page has come
        browser.wait("return document.querySelectorAll('.plots svg').length === 4")


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole_on_every_screen(
    browser: Browser, project: Path, page: str, width: int, scheme: str
) -> None:
    opened(browser, project, page, width, scheme)
    assert browser.run("return document.title") == TITLES[page]  # no name of a class was run
    text = browser.run("return document.querySelector('main').innerText")
    assert LIVE in text
    assert CLOSING in text
    assert browser.overflow() == 0
    assert browser.violations() == []
    assert browser.console() == []
    assert [url for url in browser.requested() if not url.startswith("file:")] == []
    dark = (
        browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 31)"
    )
    assert dark == (scheme == "dark")
    browser.wait("return [...document.images].every((one) => one.complete && one.naturalWidth)")


def test_the_report_asks_for_nothing_but_itself(browser: Browser, project: Path) -> None:
    opened(browser, project, "report", 1280, "light")
    assert browser.requested() == [(project / PAGES["report"]).as_uri()]


SHOWN = """
const viewer = document.querySelector(".viewer");
return [viewer.querySelector("input").getAttribute("aria-valuetext"),
  [...viewer.querySelectorAll("[data-layer]")].map((one) => Number(getComputedStyle(one).opacity))]
"""


def test_the_slider_moves_by_keys(browser: Browser, project: Path) -> None:
    opened(browser, project, "report", 390, "light")
    slider = ".viewer input"
    assert browser.run(SHOWN) == ["prediction", [1, 1, 1, 0]]
    browser.press(slider, "Right")
    assert browser.run(SHOWN) == ["between prediction and errors", [1, 1, 1, 0.25]]
    browser.press(slider, "Right", "Right", "Right")
    assert browser.run(SHOWN) == ["errors", [1, 1, 1, 1]]
    browser.press(slider, "Home")
    assert browser.run(SHOWN) == ["image", [1, 0, 0, 0]]
    browser.press(slider, "Tab")
    assert browser.run("return document.activeElement.type") == "range"  # of the next image


def test_the_report_is_whole_without_scripts(browser: Browser, project: Path) -> None:
    browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        opened(browser, project, "report", 390, "light")
    finally:
        browser.devtools("Emulation.setScriptExecutionDisabled", value=False)
    visible = "return [...document.querySelectorAll('.viewer img')].every((one) => one.width > 100)"
    assert browser.run(visible)
    assert browser.run("return document.querySelectorAll('.slider:not([hidden])').length") == 0


def test_the_report_shows_what_the_files_say(browser: Browser, project: Path) -> None:
    opened(browser, project, "report", 1280, "light")
    heads = browser.run("return [...document.querySelectorAll('h2')].map((one) => one.innerText)")
    assert heads == [
        "Training",
        "Class by class",
        "What is taken for what",
        "Images",
        "Where the errors are",
        "How sure it is, and how right",
        "The data",
        "What it comes from",
    ]
    text = browser.run("return document.body.innerText")
    found = metrics(project)
    low, high = found["mean_iou_low"], found["mean_iou_high"]
    answer = f"Mean IoU {found['mean_iou']:.4f}, 95% interval {low:.4f} to {high:.4f}, on 7 images."
    assert answer in text
    identity = json.loads((project / "outputs/run.json").read_text())
    for told in (identity["fingerprint"], identity["run_id"], "git checkout", "train.lr\t0.01"):
        assert told in text
    pictures = browser.run("return document.querySelectorAll('.viewer').length")
    assert pictures == 6  # a third of seven images each: two of the worst, median and best


def test_equal_results_give_equal_pages(project: Path) -> None:
    path = project / PAGES["report"]
    first = path.read_bytes()
    stage(project, "report")
    assert path.read_bytes() == first


def test_the_plots_page_shows_experiments_side_by_side(browser: Browser, project: Path) -> None:
    opened(browser, project, "plots", 1280, "light")
    heads = browser.run("return [...document.querySelectorAll('h2')].map((one) => one.innerText)")
    assert heads == [
        "Training loss",
        "Mean IoU on val",
        "IoU of each class",
        "Where the pixels of each class went",
        "Pictures: image, target, prediction",
    ]
    legends = browser.run(
        "return [...document.querySelectorAll('.role-legend')].map((one) => one.textContent)"
    )
    assert sum("workspace" in one and "HEAD" in one for one in legends) == 3
    captions = "return [...document.querySelectorAll('figcaption')].map((one) => one.innerText)"
    assert set(browser.run(captions)) == {"workspace", "HEAD"}
