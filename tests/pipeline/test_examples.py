"""The worked examples of docs/architecture.md, applied as they stand there and run."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.project import REPOSITORY, draw_feet, make_project, run, set_params, stage

PAGE = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
FENCE = re.compile(r'```(\w+) title="(\S+)"\n(.*?)```', re.DOTALL)
EXAMPLES = {
    title: FENCE.findall(text)
    for title, text in re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}


def apply(project: Path, blocks: list[tuple[str, str, str]]) -> None:
    """Write new files, and change those that are there, where the lines around are found once."""
    for kind, name, text in blocks:
        path = project / name
        if kind != "diff":
            assert not path.exists()
            path.write_text(text, encoding="utf-8")
            continue
        content = path.read_text(encoding="utf-8")
        for hunk in text.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if not line.startswith("+"))
            after = "".join(line[1:] for line in lines)
            assert content.count(before) == 1, before
            content = content.replace(before, after)
        path.write_text(content, encoding="utf-8")


def test_there_is_an_example_for_each_of_the_four():
    assert [title.split(":")[0] for title in EXAMPLES] == [
        "A head",
        "A format",
        "An augmentation",
        "A loss",
    ]


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_touches_at_most_two_files(title: str):
    assert 1 <= len({name for _, name, _ in EXAMPLES[title]}) <= 2


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all of the examples at once, they train as little as two iterations."""
    folder = make_project(tmp_path_factory.mktemp("examples"), {"train": 4, "val": 2, "test": 2})
    for blocks in EXAMPLES.values():
        apply(folder, blocks)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def test_the_examples_are_written_as_the_rest_is(project: Path):
    run([sys.executable, "-m", "ruff", "check", "pipeline"], project)
    run([sys.executable, "-m", "ruff", "format", "--check", "pipeline"], project)


def test_the_examples_run(project: Path):
    images, targets = (project / "data/feet" / kind for kind in ("images", "targets"))
    draw_feet(project / "data/feet", {"train": 4, "val": 2, "test": 2})
    for path in [*images.rglob("*.png")]:
        place = project / "data/beside" / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{path.stem}.jpg")  # OpenCV looks at the content
        shutil.copy(targets / path.relative_to(images), place / f"{path.stem}_mask.png")
    changes = {
        "data.format.name": "side_by_side",
        "data.root": "data/beside",
        "model.head.name": "plain",
        "model.head.channels": 8,
        "model.loss.confidence": 0.1,
        "augmentation.grayscale": 0.5,
        "train.iterations": 2,
    }
    set_params(project, changes)
    stage(project, "prepare")
    summary = json.loads((project / "data/prepared/summary.json").read_text())["splits"]
    assert [summary[split]["images"] for split in ("train", "val", "test")] == [4, 2, 2]
    stage(project, "train")
    header, *rows = (project / "outputs/train.tsv").read_text().splitlines()
    assert len(rows) == 2
    values = dict(zip(header.split("\t"), rows[-1].split("\t"), strict=True))
    assert float(values["loss/confidence"]) < 0 < float(values["loss/cross_entropy"])
