"""Stage 4: what the evaluation found, as one HTML file for people."""

import csv
import json
from pathlib import Path
from typing import Any, Literal

from pipeline.data.store import PREPARED, SUMMARY, Store
from pipeline.disk import check_format, write_text
from pipeline.evaluation.per_image import PER_IMAGE, PerImage
from pipeline.evaluation.reliability import CALIBRATION
from pipeline.evaluation.report import Masks
from pipeline.pages.report import Evaluation, report_page
from pipeline.params import Part, WorkDir, flatten, read_section
from pipeline.provenance import Identity, git_tags, read_identity, rebuild_commands
from stages import run_main


class _Evaluation(Part):
    split: Literal["val", "test"]


class _Given(Part):
    """What this stage needs of params.yaml, for which it does not import torch."""

    data: dict[str, Any]
    train: WorkDir
    evaluation: _Evaluation


def main() -> None:
    """Gather what the stages have left, and write work_dir/report.html."""
    given = read_section(_Given)
    work_dir, name = Path(given.train.work_dir), given.evaluation.split
    store = Store(PREPARED)
    calibration = read_json(work_dir / CALIBRATION)
    check_format(calibration, work_dir / CALIBRATION, "run `dvc repro -f evaluate`")
    per_image = PerImage.load((work_dir / PER_IMAGE).read_bytes(), work_dir / PER_IMAGE)
    tags = git_tags()
    evaluation = Evaluation(
        store,
        name,
        per_image,
        scores=read_json(work_dir / "evaluation" / "scores.json"),
        calibration=calibration,
        summary=read_json(PREPARED / SUMMARY),
        train=read_curve(work_dir / "train.tsv"),
        val=read_curve(work_dir / "val.tsv"),
        mask=Masks(work_dir, store.split(name), store.palette).read,
        params=flatten({"data": given.data, **per_image.origin["params"]}),
        lineage=lineage(read_identity(work_dir / "run.json"), store, tags),
        commands=rebuild_commands(tags),
    )
    path = work_dir / "report.html"
    write_text(path, report_page(evaluation))
    print(path)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file of JSON."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read_curve(path: Path) -> list[dict[str, str]]:
    """The lines of a file of tab-separated values, by the names in its first line."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def lineage(identity: Identity, store: Store, tags: dict[str, str]) -> dict[str, str]:
    """What the result comes from, by what it is called on the page."""
    found = {
        "fingerprint of the training": identity["fingerprint"],
        "MLflow run": identity["run_id"],
        f"md5 of {PREPARED}, as in dvc.lock": store.md5,
        "identity of the data set": store.content,
        "git commit": tags.get("git.rev"),
    }
    if tags.get("git.dirty") == "true":
        found["changed since that commit"] = "tracked files; the md5 of the code are in dvc.lock"
    return {name: value for name, value in found.items() if value}


if __name__ == "__main__":
    run_main(main)
