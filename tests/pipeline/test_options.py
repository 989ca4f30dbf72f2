"""The options of MMSegmentation's page "Train a model", each by what it leaves behind.

The others have tests of their own: resume_from and load_from in test_repro.py, with_cp in
tests/unit/test_with_cp.py, auto_scale_lr in tests/unit/test_optimization.py.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import distributed, load_model
from pipeline.disk import file_md5
from pipeline.distributed import SyncBatchNorm, check_devices, parallelize, processes_here
from pipeline.params import flatten
from pipeline.yaml12 import read_yaml
from tests.faults.stage import started
from tests.project import SMALL, dvc, make_project, run, set_params, stage

CHANGES: dict[str, object] = SMALL | {
    "train.gpus": 1,
    "train.batch_size": 8,
    "train.iterations": 4,
    "train.validate": True,
    "train.work_dir": "outputs",
    "train.extend": 0,
    "train.precision": "fp32",
    "train.resume_from": None,
    "model.loss": {"cross_entropy": 1.0},
}


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    make_project(folder, {"train": 8, "val": 3, "test": 3}, **CHANGES)
    stage(folder, "prepare")
    return folder


def train(project: Path, **changes: object) -> str:
    set_params(project, CHANGES | changes)
    return stage(project, "train")


def curve(path: Path, column: str) -> dict[int, float]:
    with path.open() as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {int(row["iteration"]): float(row[column]) for row in rows}


@pytest.fixture(scope="module")
def plain(project: Path) -> Path:
    """What a training of all defaults but two leaves, in a `work_dir` of its own."""
    train(project, **{"train.work_dir": "work_dirs/psp", "evaluation.interval": 3})
    return project / "work_dirs/psp"


def test_work_dir_holds_all_that_a_run_leaves(project: Path, plain: Path) -> None:
    stage(project, "evaluate")
    names = {path.name for path in plain.iterdir()}
    assert names == {"checkpoints", "evaluation", "run.json", "train.log", "train.tsv", "val.tsv"}
    tracked = run(["git", "ls-files"], project).stdout.splitlines()
    new = {path.name for path in project.iterdir()} - {name.split("/")[0] for name in tracked}
    assert {name for name in new if not name.startswith("mlflow.db")} <= {
        ".git",
        "work_dirs",
        "metrics.json",
        "mlartifacts",
    }


def test_evaluation_happens_every_interval_and_at_the_end(plain: Path) -> None:
    scores = curve(plain / "val.tsv", "mean_iou")
    assert list(scores) == [3, 4]
    best = curve(plain / "val.tsv", "best_mean_iou")
    assert best == {3: scores[3], 4: max(scores.values())}
    assert (plain / "checkpoints/best.pt").is_file()


def test_without_validation_nothing_is_evaluated(project: Path) -> None:
    train(project, **{"train.validate": False, "tracking.log_model": False})
    assert curve(project / "outputs/val.tsv", "mean_iou") == {}
    found = {path.name for path in (project / "outputs/checkpoints").iterdir()}
    assert found == {"last.pt", "model.safetensors"}
    run_id = json.loads((project / "outputs/run.json").read_text())["run_id"]
    assert not (project / "mlartifacts" / run_id / "artifacts/checkpoints").exists()
    assert load_model(project / "outputs/checkpoints/model.safetensors").temperature is None


def test_gpus_change_neither_the_batch_nor_the_learning_rate(project: Path, plain: Path) -> None:
    shutil.rmtree(project / ".dvc/tmp/instep", ignore_errors=True)  # else what one has is kept
    train(project, **{"train.gpus": 2})
    folders = (plain, project / "outputs")
    lr, lr_of_two = (curve(folder / "train.tsv", "lr") for folder in folders)
    loss, loss_of_two = (curve(folder / "train.tsv", "loss") for folder in folders)
    assert lr_of_two == lr
    assert lr[2] == SMALL["train.lr"]
    assert loss_of_two == pytest.approx(loss, rel=1e-3)


def test_a_point_of_the_loss_is_the_mean_since_the_last_one(project: Path, plain: Path) -> None:
    each = curve(plain / "train.tsv", "loss")
    shutil.rmtree(project / ".dvc/tmp/instep", ignore_errors=True)
    train(project, **{"tracking.log_interval": 3})
    means = curve(project / "outputs/train.tsv", "loss")
    assert means == pytest.approx({3: (each[1] + each[2] + each[3]) / 3, 4: each[4]}, rel=1e-12)


def test_every_term_of_the_loss_is_a_curve(project: Path) -> None:
    train(project, **{"model.loss.dice": 0.5})
    terms = ["cross_entropy", "dice", "auxiliary_cross_entropy", "auxiliary_dice"]
    losses = [curve(project / "outputs/train.tsv", f"loss/{term}") for term in terms]
    total = curve(project / "outputs/train.tsv", "loss")
    assert total == pytest.approx({i: sum(loss[i] for loss in losses) for i in total}, rel=1e-12)


def test_a_finished_training_is_extended_by_one_parameter(project: Path) -> None:
    shutil.rmtree(project / ".dvc/tmp/instep", ignore_errors=True)
    precision = {"train.precision": "fp64"}  # every digit of which is to be gone on with
    train(project, **precision)
    stage(project, "evaluate")
    files = ("checkpoints/last.pt", "checkpoints/best.pt", "train.tsv", "val.tsv")
    results = []
    for kept, said in (
        (True, "continuing at iteration 4"),
        (False, "all 7 iterations are trained"),
    ):
        if not kept:
            shutil.rmtree(project / ".dvc/tmp/instep")
        assert said in train(project, **{"train.extend": 3}, **precision)
        results.append([file_md5(project / "outputs" / name) for name in files])
    assert results[0] == results[1]  # whether it goes on or begins anew
    assert list(curve(project / "outputs/train.tsv", "loss")) == [1, 2, 3, 4, 5, 6, 7]


def test_resuming_keeps_the_best_checkpoint_that_lies_beside_the_last(project: Path) -> None:
    train(project, **{"evaluation.interval": 1, "train.lr": 0.02})
    shutil.copytree(project / "outputs/checkpoints", project / "kept")
    scores = curve(project / "outputs/val.tsv", "mean_iou")
    destroyed = {"train.lr": 10.0, "train.schedule.warmup_iters": 0, "train.iterations": 5}
    train(project, **destroyed, **{"train.resume_from": "kept/last.pt"})
    resumed = torch.load(project / "outputs/checkpoints/last.pt", weights_only=True)
    assert curve(project / "outputs/val.tsv", "mean_iou")[5] <= max(scores.values())
    assert resumed["best"]["mean_iou"] == max(scores.values())
    best, kept = project / "outputs/checkpoints/best.pt", project / "kept/best.pt"
    assert file_md5(best) == file_md5(kept)
    # Gone on with itself, by one step at a rate of next to nothing, it is not beaten either.
    done = torch.load(kept, weights_only=True)["iteration"]
    one_more = {"train.iterations": done + 1, "train.schedule.warmup_iters": 0}
    train(project, **one_more, **{"train.resume_from": "kept/best.pt"})
    assert file_md5(best) == file_md5(kept)


def test_evaluate_takes_as_many_processes_as_were_asked_for_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [processes_here(device, 4) for device in ("cpu", "auto", "cuda")] == [4, 1, 1]


def test_one_process_has_plain_batch_normalisation() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    assert distributed.world_size() == 1
    assert parallelize(model, torch.device("cpu")) is model
    assert not isinstance(model[0], SyncBatchNorm)


def test_deterministic_refuses_kernels_that_vary() -> None:
    code = (
        "import torch; from pipeline.distributed import seed_everything as seed\n"
        "seed(0, {0}); print(torch.are_deterministic_algorithms_enabled(), torch.rand(1).item())"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code.format(value)], capture_output=True, text=True, check=True
        ).stdout.split()
        for value in (True, True, False)
    ]
    assert [words[0] for words in said] == ["True", "True", "False"]
    assert len({words[1] for words in said}) == 1


def test_more_gpus_than_the_machine_shows_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What CUDA_VISIBLE_DEVICES leaves, torch counts; this machine may have no GPU to count.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices("auto", 2)
    with pytest.raises(ValueError, match=r"train.gpus: 4, but this machine shows 2; use at most 2"):
        check_devices("auto", 4)


def test_two_trainings_at_once_find_ports_of_their_own(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / ".dvc/tmp/instep", ignore_errors=True)
    other = shutil.copytree(project, tmp_path / "other")
    for folder in (project, other):
        set_params(folder, CHANGES | {"train.gpus": 2, "train.seed": 1})
    with started(project) as one, started(other) as two:
        assert [one.wait(300), two.wait(300)] == [0, 0]
    weights = [folder / "outputs/checkpoints/last.pt" for folder in (project, other)]
    assert file_md5(weights[0]) == file_md5(weights[1])


def test_any_key_can_be_overridden_from_the_command_line(tmp_path: Path) -> None:
    project = make_project(tmp_path, {"train": 4, "val": 2, "test": 2})
    wanted = {
        "data.format.splits.source": ("given", "given"),
        "data.reduce_zero_label": ("false", False),
        "augmentation.crop_size": ("[48,32]", [48, 32]),
        "model.backbone.with_cp": ("true", True),
        "model.head.channels": ("8", 8),
        "train.lr": ("0.005", 0.005),
        "train.load_from": ("null", None),
        "train.schedule.policy": ("cosine", "cosine"),
        "evaluation.scales": ("[0.5,1.0]", [0.5, 1.0]),
        "tracking.experiment": ("other", "other"),
    }
    overrides = [word for name, (given, _) in wanted.items() for word in ("-S", f"{name}={given}")]
    dvc(project, "exp", "run", "prepare", *overrides)
    written = flatten(read_yaml(project / "params.yaml"))
    assert {name: written[name] for name in wanted} == {n: v for n, (_, v) in wanted.items()}
    assert len(written) > 60
