"""Row 21: a loss or a gradient that is not finite ends the training within a step."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch

from pipeline.disk import file_md5
from pipeline.training.loop import is_finite, out_of_memory, stopped_early, train_step
from pipeline.training.params import TrainParams
from pipeline.training.state import write_curves
from tests.distributed.ranks import ranks_of
from tests.faults.stage import end_of, said, started, state_of
from tests.faults.worker import poison
from tests.project import make_project, query, set_params, stage
from tests.unit.sections import params
from tests.unit.test_train_step import learner_of, setting

CHANGES = {"train.iterations": 12, "train.checkpoint.interval": 2, "evaluation.interval": 4}
COUNTS = {"train": 10, "val": 3, "test": 3}
POISON = "tests.faults.worker", "poison"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    made = make_project(tmp_path, COUNTS, **CHANGES)
    stage(made, "prepare")
    return made


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high_leaves_only_finite_weights(project: Path) -> None:
    set_params(project, {"train.lr": 1000.0, "train.clip_grad_norm": None})
    with started(project) as process:
        assert end_of(process) == 1
    (line,) = [line for line in said(project).splitlines() if line.startswith("error:")]
    iteration = int(re.match(r"error: iteration (\d+): the (?:loss|weights)", line)[1])
    assert line.count("foot ") == 4  # the images of the step
    assert "lower train.lr" in line
    assert "Traceback" not in said(project)
    checkpoint = state_of(project)["checkpoint"]
    assert iteration - 2 <= checkpoint["iteration"] < iteration
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())
    assert not (project / "outputs/checkpoints").exists()
    assert query(project, "SELECT status FROM runs") == [("FAILED",)]


@pytest.mark.slow
def test_a_step_may_be_left_out_as_if_it_had_not_been(project: Path) -> None:
    set_params(project, {"train.gpus": 2})
    faulty = {"FAULT_AT": "7", "FAULT_RANK": "1"}  # one rank's alone
    assert ranks_of(project, 2, *POISON, **faulty) == [1, 1]
    assert "error: iteration 7: the loss" in (project / "rank0.txt").read_text()
    assert state_of(project)["checkpoint"]["iteration"] == 6

    set_params(project, {"train.leave_out_nonfinite": 1})  # another training, from the start
    assert ranks_of(project, 2, *POISON, **faulty) == [0, 0]
    told = (project / "rank0.txt").read_text()
    assert "iteration 7: the loss or its gradient is not finite" in told
    assert "; the step is left out" in told
    state = state_of(project)
    assert (state["left_out"], state["checkpoint"]["iteration"]) == (1, 12)
    assert all(weight.isfinite().all() for weight in state["checkpoint"]["model"].values())
    losses = [entry["train/loss"] for entry in state["history"] if "train/loss" in entry]
    assert len(losses) == 11  # of iteration 7 there is none
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_step_that_is_left_out_changes_nothing(precision: str) -> None:
    learner = learner_of(setting(precision=precision, ema_decay=0.9))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 32, 32, 3), generator=generator, dtype=torch.uint8)
    batch = images, torch.zeros(4, 32, 32, dtype=torch.uint8), torch.arange(4)
    train_step(learner, batch, 2, leave_out=True)  # the optimizer has a momentum now
    before = copy.deepcopy({key: learner.states()[key] for key in ("model", "optimizer", "ema")})
    mend = poison(learner)
    assert not train_step(learner, batch, 2, leave_out=True).finite
    mend()
    after = learner.states()
    for key in ("model", "ema"):
        assert all(torch.equal(one, after[key][name]) for name, one in before[key].items())
    moments = before["optimizer"]["state"].items()
    for number, state in moments:
        held = after["optimizer"]["state"][number]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], held)
    assert train_step(learner, batch, 2, leave_out=True).finite
    assert is_finite(learner)
    with torch.no_grad():
        next(learner.network.parameters())[0, 0, 0, 0] = float("nan")
    assert not is_finite(learner)


def test_a_point_of_steps_that_were_all_left_out_has_no_loss(tmp_path: Path) -> None:
    history = [
        {"iteration": 1, "train/lr": 0.1},
        {"iteration": 2, "train/loss": 1.5, "train/lr": 0.1},
    ]
    write_curves(tmp_path / "train.tsv", "train/", history)
    assert (tmp_path / "train.tsv").read_text() == "iteration\tlr\tloss\n1\t0.1\t\n2\t0.1\t1.5\n"


@pytest.mark.slow
def test_a_device_without_memory_for_a_step_is_told_what_may_fit(project: Path) -> None:
    with started(project, "tests.faults.worker", "oom") as process:
        assert end_of(process) == 1
    (line,) = [line for line in said(project).splitlines() if line.startswith("error:")]
    assert "set train.accumulation: 2" in line
    assert "Traceback" not in said(project)


def options(**changes: object) -> TrainParams:
    return params({f"train.{name}": value for name, value in changes.items()}).train


def test_the_next_larger_accumulation_is_one_that_divides_the_batch() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    text = out_of_memory(error, options(batch_size=24, base_batch_size=24, accumulation=8))
    assert "set train.accumulation: 24" in text
    assert text.endswith("several GPUs by train.parallel: fsdp")
    assert "accumulation" not in out_of_memory(error, options(batch_size=4, accumulation=4))
    assert "several" not in out_of_memory(error, options(parallel="fsdp"))


@pytest.mark.parametrize(
    ("means", "ended"),
    [
        ([0.5, 0.6, 0.7], False),
        ([0.5, 0.4, 0.5], True),
        ([0.5, 0.505, 0.509], True),  # less than min_gain above the first
        ([0.5, 0.505, 0.52], False),
        ([0.5, 0.4], False),
        ([0.5, 0.4, 0.6, 0.6], False),
        ([0.5, 0.4, 0.6, 0.6, 0.6], True),
    ],
)
def test_a_training_ends_early_after_so_many_validations_without_a_gain(
    means: list[float], ended: bool
) -> None:
    history = [{"iteration": 1, "train/loss": 0.5}]
    history += [{"iteration": 10 * i, "val/mean_iou": mean} for i, mean in enumerate(means, 1)]
    patient = options(early_stop={"patience": 2, "min_gain": 0.01})
    assert stopped_early(history, patient) is ended
    assert not stopped_early(history, options(early_stop=None))


@pytest.mark.slow
def test_a_training_that_ended_early_leaves_all_outputs_and_stays_ended(project: Path) -> None:
    early = {"patience": 1, "min_gain": 1.0}
    set_params(project, {"train.early_stop": early, "train.gpus": 2})
    assert ranks_of(project, 2, "stages.train") == [0, 0]
    assert "train.early_stop" in (project / "rank0.txt").read_text()
    assert state_of(project)["checkpoint"]["iteration"] == 8
    last = file_md5(project / "outputs/checkpoints/last.pt")
    assert ranks_of(project, 2, "stages.train") == [0, 0]  # as after a kill before DVC has them
    assert "iteration 9 " not in (project / "rank0.txt").read_text()
    assert file_md5(project / "outputs/checkpoints/last.pt") == last
