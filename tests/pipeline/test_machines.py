"""A training on two machines, which are two network namespaces with a slow link between them."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from pipeline.disk import file_md5
from tests.faults.stage import said
from tests.machines import Link, Machine, two_machines
from tests.project import NETWORKS, environment, make_project, set_params, stage, untrained

DELAY = 0.025  # seconds in each direction
# Equal on both machines; the first of them also equal in every run.
EQUAL = ("checkpoints/best.pt", "checkpoints/last.pt", "checkpoints/model.safetensors", "val.tsv")
OUTPUTS = (*EQUAL, "run.json", "train.log", "train.tsv")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data is prepared, and which one process has trained."""
    changes = NETWORKS["eomt"] | {"train.precision": "fp64", "train.iterations": 12}
    changes |= {"train.optimizer": "sgd", "train.timeout": 60}
    counts = {"train": 8, "val": 2, "test": 2}
    project = make_project(tmp_path_factory.mktemp("one"), counts, **changes)
    stage(project, "prepare")
    stage(project, "train")
    return project


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    with two_machines(DELAY) as made:
        yield made


def clones(prepared: Path, link: Link, folder: Path) -> tuple[Path, Path]:
    """A clone of the project on each machine, which has nothing of its training."""
    made = folder / "a", folder / "b"
    for project in made:
        endpoint = f"{link.machines[0].address}:29500"
        where = {"launcher.name": "torchrun", "launcher.nodes": 2, "launcher.endpoint": endpoint}
        untrained(prepared, project, **where)
    return made


def begin(machines: Sequence[Machine], projects: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    """Start the training on machines; what each says goes to said.txt."""
    begun = []
    for machine, project in zip(machines, projects, strict=True):
        with (project / "said.txt").open("wb") as told:
            process = subprocess.Popen(
                machine.command([sys.executable, "-m", "stages.train"]),
                cwd=project,
                env=environment(DVC_ROOT=str(project), OMP_NUM_THREADS="1"),
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.STDOUT,
            )
        begun.append(process)
    return begun


def wait_for_iteration(projects: tuple[Path, Path], iteration: int) -> None:
    """Until one of the machines, whichever has the first rank, has said so."""
    deadline = time.monotonic() + 240
    while not any(f"iteration {iteration} " in said(project) for project in projects):
        assert time.monotonic() < deadline, [said(project) for project in projects]
        time.sleep(0.01)


def weights(project: Path) -> dict[str, torch.Tensor]:
    path = project / "outputs/checkpoints/last.pt"
    return torch.load(path, weights_only=True)["model"]


def md5s(project: Path, names: Sequence[str]) -> list[str]:
    return [file_md5(project / "outputs" / name) for name in names]


@pytest.fixture(scope="module")
def trained(
    prepared: Path,
    link: Link,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """The projects of two machines that have trained together; their link was cut for a while."""
    projects = clones(prepared, link, tmp_path_factory.mktemp("two"))
    begun = begin(link.machines, projects)
    wait_for_iteration(projects, 3)
    link.cut.set()
    time.sleep(3)
    link.cut.clear()
    assert [one.wait(240) for one in begun] == [0, 0], [said(project) for project in projects]
    return projects


def test_two_machines_train_as_one_process_does_and_both_have_the_result(
    prepared: Path, trained: tuple[Path, Path]
) -> None:
    assert md5s(trained[0], OUTPUTS) == md5s(trained[1], OUTPUTS)
    one = weights(prepared)
    for name, weight in weights(trained[1]).items():
        torch.testing.assert_close(weight, one[name], rtol=0, atol=1e-9)


def test_a_link_that_is_cut_for_good_ends_both_and_names_the_other_machine(
    prepared: Path,
    trained: tuple[Path, Path],
    link: Link,
    tmp_path: Path,
) -> None:
    """Within the time-out of 12 s and a grace; and the training goes on when the link is back."""
    projects = clones(prepared, link, tmp_path)
    for project in projects:
        set_params(project, {"train.timeout": 12})
    begun = begin(link.machines, projects)
    wait_for_iteration(projects, 5)
    link.cut.set()
    try:
        codes = [one.wait(240) for one in begun]
    finally:
        link.cut.clear()
    assert 0 not in codes
    for project, other in zip(projects, reversed(link.machines), strict=True):
        assert re.search(rf"on {other.name}\b.*; train\.timeout allows 12 s", said(project))
    begun = begin(link.machines, projects)
    assert [one.wait(240) for one in begun] == [0, 0], [said(project) for project in projects]
    assert re.search("continuing at iteration [48]", said(projects[0]) + said(projects[1]))
    assert md5s(projects[0], OUTPUTS) == md5s(projects[1], OUTPUTS)
    assert md5s(projects[0], EQUAL) == md5s(trained[0], EQUAL)


def test_machines_with_other_parameters_are_refused(
    prepared: Path, link: Link, tmp_path: Path
) -> None:
    projects = clones(prepared, link, tmp_path)
    set_params(projects[1], {"train.lr": 0.002})
    assert 0 not in [one.wait(120) for one in begin(link.machines, projects)]
    told = said(projects[0]) + said(projects[1])
    assert f"rank 1 on {link.machines[1].name} would do another training than rank 0" in told


@pytest.mark.parametrize("place", [0, 1])
def test_a_machine_that_stays_alone_ends_and_says_so(
    place: int, prepared: Path, link: Link, tmp_path: Path
) -> None:
    """That of the endpoint, and another one."""
    project = clones(prepared, link, tmp_path)[place]
    set_params(project, {"train.timeout": 2})
    (alone,) = begin([link.machines[place]], [project])
    assert alone.wait(120) == 1
    told = said(project).splitlines()[-1]
    where = f"{link.machines[0].address}:29500"
    assert told.startswith(f"error: launcher.nodes: 2, but they have not all met at {where} in 2 s")
    assert told.endswith("; start the same command on each")
