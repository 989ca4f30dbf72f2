"""Which launchers there are, and what is refused before any process starts."""

import socket
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.launchers import ALONE, Meeting
from pipeline.launchers.torchrun import hand_over
from tests.unit.sections import params, refusal

TORCHRUN = {"name": "torchrun", "nodes": 2, "endpoint": "host:29500"}


def test_machines_meet_at_the_endpoint():
    assert params({}).launcher.meeting() == ALONE
    assert params({"launcher": TORCHRUN}).launcher.meeting() == Meeting(2, "host", 29500)


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ({"name": "lokal"}, "launcher: name 'lokal' is unknown; did you mean local?"),
        (
            {"name": "local", "nodes": 2},
            "local has no parameter nodes; it belongs to torchrun, slurm",
        ),
        ({"name": "slurm", "time": "8:00", "gpus": 8}, "slurm has no parameter gpus"),
        ({"name": "slurm", "nodes": 3}, "launcher.nodes x train.gpus x train.accumulation = 3 x 1"),
        ({"name": "torchrun", "nodes": 2}, "launcher.endpoint: missing"),
        (TORCHRUN | {"endpoint": "host"}, 'launcher.endpoint: "host" String should match'),
        (TORCHRUN | {"nodes": 0}, "launcher.nodes: 0 should be greater than or equal to 1"),
        (TORCHRUN | {"nodes": 3}, "launcher.nodes x train.gpus x train.accumulation = 3 x 1 x 1"),
    ],
)
def test_a_launcher_that_can_t_be_used_is_refused(
    launcher: dict[str, object], said: str, tmp_path: Path
):
    assert said in refusal(tmp_path, {"launcher": launcher})


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (None, r"launcher\.endpoint: there is no way to first"),
        ("127.0.1.1", r"launcher\.endpoint: first is 127\.0\.1\.1 here, where no other machine"),
    ],
)
def test_a_place_that_others_can_t_reach_is_refused(
    address: str | None, said: str, monkeypatch: pytest.MonkeyPatch
):
    def found(host: str) -> str:
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return address

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", found)
    with pytest.raises(InputError, match=said):
        hand_over("none", 1, meeting=Meeting(2, "first", 29500))


def test_what_is_a_job_of_slurm_is_none_within_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("INSTEP_JOB", raising=False)
    launcher = params(
        {"launcher": {"name": "slurm", "time": 90, "evaluate": {"gres": "gpu:1"}}}
    ).launcher
    assert launcher.job("train").time == 90
    assert launcher.job("evaluate").gres == "gpu:1"
    assert launcher.job("prepare") is None
    monkeypatch.setenv("INSTEP_JOB", "1")
    assert launcher.job("train") is None
    assert launcher.meeting() == ALONE
