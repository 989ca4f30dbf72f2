"""The GPU count changes the speed, not the experiment: real gloo processes, real stages."""

import shutil
from pathlib import Path

import pytest

from pipeline.disk import file_md5
from tests.distributed.ranks import CHANGES, difference, ranks_of, set_up, train
from tests.project import NETWORKS, make_project, metrics, set_params, stage


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    make_project(folder, {"train": 10, "val": 4, "test": 7}, **CHANGES)
    stage(folder, "prepare")
    return folder


def one_process(project: Path, name: str = "pspnet") -> Path:
    """What one process makes of a network: trained once for all tests."""
    kept = project / "alone" / name
    if not kept.exists():
        train(project, 1, **NETWORKS[name])
        shutil.copytree(project / "outputs", kept)
    return kept / "checkpoints/last.pt"


CASES = [("pspnet", 2), ("pspnet", 4), ("pointrend", 4), ("segformer", 2)]


@pytest.mark.parametrize(("network", "gpus"), [*CASES, ("lite0", 2), ("library", 2), ("eomt", 2)])
def test_processes_give_the_weights_of_one(project: Path, network: str, gpus: int) -> None:
    one = one_process(project, network)
    assert difference(one, train(project, gpus, **NETWORKS[network])) < 1e-9


def test_two_processes_share_every_term_the_clipping_and_the_average(project: Path) -> None:
    changes = NETWORKS["pspnet"] | {
        "train.iterations": 5,
        "model.loss": {
            "cross_entropy": 1.0,
            "ohem": 0.5,
            "dice": 0.5,
            "focal": 0.5,
            "lovasz": 0.0,  # the library computes it in fp32
            "tversky": 0.5,
            "avg_non_ignore": True,
            "class_weights": "balanced",
            "ohem_threshold": 0.4,
            "ohem_min_kept": 100,
        },
        "train.clip_grad_norm": 0.5,
        "train.ema_decay": 0.9,
        "train.head_lr_mult": 10.0,
        "train.decay_norm": False,
    }
    one = shutil.copy(train(project, 1, **changes), project / "terms.pt")
    assert difference(one, train(project, 2, **changes)) < 1e-9


def test_the_stage_itself_starts_them_with_torchrun(project: Path) -> None:
    one = one_process(project)
    set_up(project, **NETWORKS["pspnet"], **{"train.gpus": 2})
    stage(project, "train")
    assert difference(one, project / "outputs/checkpoints/last.pt") < 1e-9


def test_a_batch_that_the_processes_cannot_share_is_refused(project: Path) -> None:
    set_up(project)
    assert ranks_of(project, 3, "stages.train") == [1, 1, 1]
    said = "train.batch_size 8 / train.accumulation 2 is not divisible by the 3"
    assert said in (project / "rank0.txt").read_text()


@pytest.mark.parametrize("missing", ["local_batch_norm", "unkeyed_dropout"])
def test_without_its_guarantees_two_processes_differ(project: Path, missing: str) -> None:
    worker = "tests.distributed.worker", missing
    two = train(project, 2, *worker, **NETWORKS["pspnet"])
    assert difference(one_process(project), two) > 1e-4


def test_loader_workers_change_no_bit(project: Path) -> None:
    one = one_process(project)
    with_workers = train(project, 1, **NETWORKS["pspnet"], **{"train.workers": 2})
    assert file_md5(with_workers) == file_md5(one)


def test_a_changed_seed_changes_the_weights(project: Path) -> None:
    other = train(project, 1, **NETWORKS["pspnet"], **{"train.seed": 1})
    assert difference(one_process(project), other) > 1e-4


@pytest.mark.parametrize("model", ["pspnet", "pointrend", "segformer"])
def test_ranks_share_an_evaluation_exactly(project: Path, model: str) -> None:
    one_process(project, model)
    set_up(project, **NETWORKS[model])
    shutil.rmtree(project / "outputs")
    shutil.copytree(project / "alone" / model, project / "outputs")
    shares = {"train.batch_size": 6, "train.accumulation": 1, "evaluation.batch_size": 1}
    set_params(project, shares | {"evaluation.scales": [1.0, 0.75], "evaluation.flip": True})
    seen = []
    for processes in (1, 3):
        assert not any(ranks_of(project, processes, "stages.evaluate"))
        folder = project / "outputs/evaluation"
        files = [folder / name for name in ("confusion.tsv", "per_image.npz", "calibration.json")]
        files += sorted((folder / "predictions").rglob("*.png"))
        assert len(files) == 3 + 7
        seen.append((list(map(file_md5, files)), metrics(project)))
    assert seen[0] == seen[1]
    assert "mean_boundary_iou" in seen[0][1]
