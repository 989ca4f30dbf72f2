"""What a team shares by DVC: a training of one clone is had by others without training."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.project import STAGES, dvc, make_project, metrics, reproduced, run, stage
from tests.server import Bucket


@dataclass
class Shared:
    """A repository, and the clone that has trained and pushed; others have its files by `keys`."""

    repository: Path
    trained: Path
    keys: dict[str, str]

    def clone(self, folder: Path, branch: str) -> Path:
        command = ["git", "clone", "-q", "--branch", branch, str(self.repository), str(folder)]
        run(command, folder.parent)
        return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Shared]:
    """The branch `main` of the repository ends with a training's result, `before` ends before it.

    The result is also the experiment `first`.
    """
    repository = folder / "repository.git"
    short = {"train.iterations": 2, "evaluation.interval": 2}
    trained = make_project(folder / "trained", {"train": 6, "val": 2, "test": 2}, **short)
    with Bucket(folder) as bucket:
        dvc(trained, "remote", "add", "--default", "team", "s3://team/dvc")
        dvc(trained, "remote", "modify", "team", "endpointurl", bucket.address)
        run(["git", "commit", "-qam", "Where files are shared"], trained)
        run(["git", "branch", "before"], trained)
        reproduced(trained)
        dvc(trained, "exp", "save", "--name", "first", *STAGES)
        run(["git", "init", "-q", "--bare", str(repository)], folder)
        run(["git", "remote", "add", "origin", str(repository)], trained)
        dvc(trained, "push", "--run-cache", **bucket.keys)
        dvc(trained, "exp", "push", "--no-cache", "origin", "first", **bucket.keys)
        run(["git", "add", "dvc.lock", "metrics.json"], trained)
        run(["git", "commit", "-qm", "The first result"], trained)
        run(["git", "push", "-q", "origin", "main", "before"], trained)
        yield Shared(repository, trained, bucket.keys)


def weights(project: Path) -> bytes:
    return (project / "outputs/checkpoints/last.pt").read_bytes()


def test_a_clone_of_the_result_has_its_files_and_runs_nothing(
    shared: Shared, tmp_path: Path
) -> None:
    clone = shared.clone(tmp_path / "clone", "main")
    dvc(clone, "pull", "--run-cache", **shared.keys)
    said = dvc(clone, "repro")
    assert said.count("didn't change, skipping") == len(STAGES)
    assert "Running stage" not in said
    (clone / "metrics.json").unlink()
    stage(clone, "evaluate")
    assert metrics(clone) == metrics(shared.trained)


def test_a_clone_without_the_result_finds_the_training_by_what_it_depends_on(
    shared: Shared, tmp_path: Path
) -> None:
    clone = shared.clone(tmp_path / "clone", "before")
    assert not (clone / "dvc.lock").exists()
    said = dvc(clone, "repro", "--pull", "train", **shared.keys)
    for name in ("prepare", "train"):
        assert f"Stage '{name}' is cached - skipping run, checking out outputs" in said
    assert "Running stage" not in said
    assert weights(clone) == weights(shared.trained)


def test_an_experiment_of_another_clone_is_applied(shared: Shared, tmp_path: Path) -> None:
    clone = shared.clone(tmp_path / "clone", "before")
    dvc(clone, "exp", "pull", "origin", "first", **shared.keys)
    dvc(clone, "exp", "apply", "first")
    assert metrics(clone) == metrics(shared.trained)
    assert weights(clone) == weights(shared.trained)
