"""Sharded training, `train.parallel: fsdp`: each process holds a part, and the result is DDP's."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from pipeline.disk import file_md5
from tests.distributed.ranks import CHANGES, begun, difference, ranks_of, set_up, train
from tests.project import NETWORKS, make_project, metrics, stage

FSDP = {"train.parallel": "fsdp"}
# Synchronous BN, dropout and drop path by keys, accumulation, a rate for each layer, and all that
# looks at the whole gradient or at another copy of the network.
SETTING = {
    "model.head.name": "fcn",
    "model.head.channels": 16,
    "model.head.dropout": 0.5,
    "model.head.aux_weight": 0.0,
    "model.backbone.name": "vit_tiny_patch14_reg4_dinov2",
    "model.backbone.output_stride": 32,
    "model.backbone.drop_path": 0.1,
    "augmentation.crop_size": [64, 64],
    "train.optimizer": "adamw",
    "train.iterations": 6,
    "train.layer_decay": 0.8,
    "train.clip_grad_norm": 0.5,
    "train.ema_decay": 0.9,
    "train.leave_out_nonfinite": 1,
    "train.checkpoint.interval": 2,
    "train.validate": True,
    "evaluation.interval": 4,
}


@pytest.fixture(scope="module")
def project(folder: Path) -> Path:
    make_project(folder, {"train": 10, "val": 4, "test": 7}, **CHANGES)
    stage(folder, "prepare")
    return folder


@pytest.fixture(scope="module")
def replicated(project: Path) -> Path:
    """The outputs of four processes that each hold the whole network."""
    return weighed(project, "replicated", **SETTING)


@pytest.fixture(scope="module")
def sharded(project: Path) -> Path:
    """Those of four that each hold a part of it."""
    return weighed(project, "sharded", **SETTING | FSDP)


def weighed(project: Path, name: str, **setting: object) -> Path:
    """The outputs of four processes, and how many bytes each held."""
    train(project, 4, "tests.distributed.weighed", **setting)
    kept = Path(shutil.copytree(project / "outputs", project / name))
    for path in project.glob("bytes.*.json"):
        path.rename(kept / path.name)
    return kept


@pytest.fixture(scope="module")
def killed(project: Path) -> Path:
    """The state of such a training that was killed on the way."""
    set_up(project, **SETTING | FSDP)
    states = project / ".dvc/tmp/instep"
    ranks = begun(project, 4, "stages.train")
    while not [*states.glob("*/state.pt")]:
        assert all(rank.poll() is None for rank in ranks), (project / "rank0.txt").read_text()
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    assert [rank.wait() for rank in ranks] == [-9] * 4
    return Path(shutil.copytree(states, project / "killed"))


def go_on(project: Path, killed: Path, processes: int, **changes: object) -> Path:
    """The last checkpoint of a training that goes on from what was left of another."""
    set_up(project, **SETTING | FSDP | changes)
    shutil.copytree(killed, project / ".dvc/tmp/instep")
    codes = ranks_of(project, processes, "stages.train")
    assert not any(codes), (project / "rank0.txt").read_text()
    assert "continuing at iteration" in (project / "rank0.txt").read_text()
    return project / "outputs/checkpoints/last.pt"


def test_processes_that_hold_a_part_each_give_what_ddp_gives(
    replicated: Path, sharded: Path
) -> None:
    for name in ("last.pt", "best.pt"):
        one, other = (folder / "checkpoints" / name for folder in (replicated, sharded))
        assert difference(one, other) < 1e-9
        a, b = (torch.load(path, weights_only=True) for path in (one, other))
        assert a["params"] == b["params"]
        for index, held in a["optimizer"]["state"].items():
            for key, value in held.items():
                other_value = b["optimizer"]["state"][index][key]
                torch.testing.assert_close(other_value, value, rtol=1e-9, atol=1e-15)
    one, other = (json.loads((folder / "run.json").read_text()) for folder in (replicated, sharded))
    assert one["fingerprint"] == other["fingerprint"]


def test_each_holds_about_its_part(replicated: Path, sharded: Path) -> None:
    """Statistics of BN are not sharded, nor is AdamW's count of steps, a number a parameter.

    To compute, each makes whole what belongs to no block, here the learned positions, and a block.
    """
    for rank in range(4):
        one, other = (
            json.loads((folder / f"bytes.{rank}.json").read_text())
            for folder in (replicated, sharded)
        )
        for name in ("parameters", "optimizer", "average"):
            assert other[name] <= 0.3 * one[name]
        assert other["statistics"] == one["statistics"] < 0.01 * one["parameters"]
        assert one["whole at once"] == one["parameters"]
        assert 0 < other["whole at once"] < 0.8 * one["parameters"]


def test_a_transformer_with_queries_learns_alike_by_sgd(project: Path) -> None:
    setting = NETWORKS["eomt"] | {"train.optimizer": "sgd", "train.iterations": 3}
    one = shutil.copy(train(project, 1, **setting), project / "one.pt")
    assert difference(one, train(project, 2, **setting | FSDP)) < 1e-9


def test_a_killed_one_goes_on_bit_for_bit(project: Path, killed: Path, sharded: Path) -> None:
    last = go_on(project, killed, 4)
    assert file_md5(last) == file_md5(sharded / "checkpoints/last.pt")


@pytest.mark.parametrize(("processes", "parallel"), [(2, "fsdp"), (1, "ddp")])
def test_it_goes_on_with_fewer_processes_or_whole(
    project: Path, killed: Path, replicated: Path, processes: int, parallel: str
) -> None:
    last = go_on(project, killed, processes, **{"train.parallel": parallel})
    assert difference(replicated / "checkpoints/last.pt", last) < 1e-9


def test_what_it_writes_is_evaluated_as_ddps(
    project: Path, replicated: Path, sharded: Path
) -> None:
    found = []
    for outputs in (replicated, sharded):
        set_up(project, **SETTING)
        shutil.rmtree(project / "outputs", ignore_errors=True)
        shutil.copytree(outputs, project / "outputs")
        stage(project, "evaluate")
        found.append(metrics(project))
    assert found[0] == found[1]
