"""`python -m stages.runs`: the table, and the proof that a run can be had again."""

import json
import re
from pathlib import Path

import pytest

from pipeline.disk import file_md5
from tests.project import commit, dvc, make_project, metrics, query, reproduced, run, stage

LOSS = "pipeline/models/losses.py"


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    """Two experiments, of which the first is the workspace's own."""
    make_project(folder, {"train": 8, "val": 3, "test": 4}, **{"train.iterations": 12})
    reproduced(folder)
    commit(folder, "Trained")
    dvc(folder, "exp", "run", "--temp", "-n", "faster", "-S", "train.lr=0.03")
    return folder


def runs(project: Path, *arguments: str, check: bool = True) -> str:
    return stage(project, "runs", *arguments, check=check)


def fingerprint(project: Path) -> str:
    return json.loads((project / "outputs/run.json").read_text())["fingerprint"]


def ids(project: Path) -> dict[str, str]:
    """The id of the run of each learning rate."""
    asked = "SELECT value, run_uuid FROM params WHERE key = 'train.lr'"
    return dict(query(project, asked))


def test_runs_are_listed_by_their_score_with_what_they_differ_in(project: Path):
    head, *lines = runs(project).splitlines()
    assert re.split("  +", head) == ["mean IoU", "95%", "run", "experiment", "status", "differs in"]
    told = {line.split("train.lr: ")[1]: re.split("  +", line) for line in lines}
    assert told.keys() == {"0.01", "0.03"}
    own = told["0.01"]
    score = metrics(project)
    assert own[0] == f"{score['mean_iou']:.4f}"
    assert own[1] == f"{score['mean_iou_low']:.4f} to {score['mean_iou_high']:.4f}"
    assert own[2:] == [ids(project)["0.01"][:8], "-", "FINISHED", "train.lr: 0.01"]
    assert told["0.03"][3] == "faster"
    assert float(lines[0].split()[0]) >= float(lines[1].split()[0])
    names = {row[0] for row in query(project, "SELECT name FROM runs")}
    assert names == {
        f"{own[0]} pspnet ({fingerprint(project)[:8]})",
        f"{told['0.03'][0]} pspnet, lr 0.03 (faster)",
    }


def test_the_commands_give_the_same_result_in_an_empty_folder(project: Path, tmp_path: Path):
    said = runs(project, "--reproduce", ids(project)["0.03"][:8])
    script = tmp_path / "again.sh"
    script.write_text(f"set -e\n{said}")
    store = f"sqlite:///{tmp_path / 'other.db'}"
    run(["bash", str(script)], tmp_path, MLFLOW_TRACKING_URI=store)
    (clone,) = tmp_path.glob("instep-*/")
    rebuilt = file_md5(clone / "outputs/checkpoints/last.pt")
    dvc(project, "exp", "apply", "faster")
    assert file_md5(project / "outputs/checkpoints/last.pt") == rebuilt
    run(["git", "checkout", "-q", "."], project)
    dvc(project, "checkout")


def test_a_run_is_compared_by_the_id_that_the_table_shows(project: Path):
    slow, fast = (ids(project)[rate][:8] for rate in ("0.01", "0.03"))
    said = stage(project, "compare", slow, fast)
    assert f"1 training, train.lr: 0.01  ({slow})\n" in said
    assert f"1 training, train.lr: 0.03  ({fast})\n" in said


def test_the_first_iterations_of_an_experiment_prove_it(project: Path):
    said = runs(project, "--verify", "faster")
    same = "THE SAME: after 1 and 10 iterations the weights are those of run"
    assert said == f"{same} {ids(project)['0.03']}, bit for bit\n"


def test_a_changed_line_of_the_loss_is_found(project: Path):
    loss = project / LOSS
    before = loss.read_text()
    assert before.count("        return terms\n") == 1
    larger = "        return {name: 1.001 * term for name, term in terms.items()}\n"
    loss.write_text(before.replace("        return terms\n", larger))
    run_id = ids(project)["0.01"]
    said = runs(project, "--verify", run_id, "--until", "1", "--code", "workspace", check=False)
    loss.write_text(before)
    assert "error: DIFFERENT: after 1 iterations the weights' md5 is" in said
    assert "Traceback" not in said


def test_a_run_that_nobody_knows_is_named(project: Path):
    said = runs(project, "--reproduce", "nobody", check=False)
    assert said == "error: no run is called nobody; `python -m stages.runs` lists them\n"
