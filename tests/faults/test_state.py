"""Saved states: killed while they are written, altered on the disk, left behind, used twice."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.disk import FORMAT, file_md5
from pipeline.errors import InputError
from pipeline.models.weights import read_file, require_whole
from pipeline.prediction.model import load_model
from pipeline.provenance import read_identity
from pipeline.training import state as state_module
from pipeline.training.checkpoint import load_checkpoint, save, save_model
from pipeline.training.state import State
from tests.project import dvc, ended, environment, make_project, run, stage

KILLS = 25
SIDE = 600  # of the tensors: writing them takes milliseconds


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """A state in a repository of its own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(state_module, "LOCK_PATIENCE", 5)
    return State("f")


def saved(iteration: int, best: int | None = None, side: int = 64) -> Any:
    """What a training saves; each tensor is full of the iteration."""
    checkpoint = {
        "format": FORMAT,
        "model": {"a": torch.full((side, side), float(iteration)), "b": torch.tensor(iteration)},
        "optimizer": {},
        "iteration": iteration,
        "best": {"iteration": best, "mean_iou": 0.5} if best else None,
        "params": {},
    }
    return {
        "format": FORMAT,
        "checkpoint": checkpoint,
        "history": [{"iteration": iteration, "train/loss": 0.5, "val/mean_iou": None}],
        "means": {"since": iteration, "sums": {"loss": 0.25}},
        "hashes": {"1": "0"},
    }


def keep(state: State, iteration: int, best: int, side: int = 64) -> None:
    """Save as a training does, where the best iteration may be this one."""
    content = saved(iteration, best, side)
    if best == iteration:
        state.save_best(content["checkpoint"])
    state.save(content)


def files(state: State) -> list[str]:
    return sorted(path.name for path in state.folder.iterdir() if path.name != "lock")


def same(one: Any, other: Any) -> bool:
    """Whether two contents are equal, down to the tensors' bits."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return [*one] == [*other] and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def write_for_ever(state: State, first: int, done: Any) -> None:
    """Save one state after another, each the best so far; `done` has the last one's iteration."""
    torch.set_num_threads(1)
    with state.locked():
        for iteration in range(first, first + 10**6):
            keep(state, iteration, iteration, SIDE)
            done.value = iteration


def test_a_kill_while_a_state_is_written_leaves_the_last_one_or_this_one(state: State):
    """Row 2: and nothing of the unfinished file; Row 27: nor does its lock stand in the way."""
    rng, context, stray = random.Random(0), multiprocessing.get_context("fork"), 0
    reached = 0
    for _ in range(KILLS):
        done = context.Value("l", reached, lock=False)  # a lock would be killed with its holder
        writer = context.Process(target=write_for_ever, args=(state, reached + 1, done))
        writer.start()
        while done.value == reached:
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        stray += any(name.endswith(".tmp") for name in files(state))
        with state.locked():
            assert not [name for name in files(state) if name.endswith(".tmp")]
        for path in state.folder.glob("*.pt"):
            require_whole(path)
        found = State("f").load()
        reached = found["checkpoint"]["iteration"]
        assert reached in (done.value, done.value + 1)
        assert same(found, saved(reached, reached, SIDE))
        best = load_checkpoint(state.folder / f"best-{reached}.pt")
        assert same(best, found["checkpoint"])
    assert stray  # some of the kills did come in the middle of a file


def test_the_last_two_states_are_kept_with_the_best_checkpoint_of_each(state: State):
    with state.locked():
        keep(state, 4, 4)
        keep(state, 6, 4)
        assert files(state) == ["best-4.pt", "state-before.pt", "state.pt"]
        keep(state, 8, 8)
        assert files(state) == ["best-4.pt", "best-8.pt", "state-before.pt", "state.pt"]
        keep(state, 10, 8)
        assert files(state) == ["best-8.pt", "state-before.pt", "state.pt"]


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def cut(path: Path, kept: float) -> None:
    os.truncate(path, int(path.stat().st_size * kept))


BROKEN = {
    "empty": lambda path: cut(path, 0),
    "cut at its begin": lambda path: cut(path, 0.01),
    "cut in the middle": lambda path: cut(path, 0.5),
    "cut at its end": lambda path: cut(path, 0.999),
    "altered at its begin": lambda path: flip(path, 0.01),
    "altered in the middle": flip,
    "deleted": Path.unlink,
    "another file": lambda path: path.write_bytes(b"hello"),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_of_a_broken_state_the_one_before_is_taken(
    harm: Any, state: State, caplog: pytest.LogCaptureFixture
):
    """Row 27: in one line; and that one is kept until there are two whole ones again."""
    with state.locked():
        keep(state, 4, 4)
        keep(state, 8, 8)
        harm(state.folder / "state.pt")
        again = State("f")
        assert again.exists
        assert same(again.load(), saved(4, 4))
        (said,) = caplog.messages
        assert str(state.folder / "state.pt") in said
        assert said.endswith("taking the state before it, of iteration 4")
        assert "\n" not in said
        keep(again, 6, 4)
        assert same(read_file(state.folder / "state-before.pt"), saved(4, 4))
        keep(again, 8, 8)
    caplog.clear()
    assert same(State("f").load(), saved(8, 8))
    assert same(read_file(state.folder / "state-before.pt"), saved(6, 4))
    assert not caplog.messages


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_a_state_whose_best_checkpoint_is_broken_is_not_taken(harm: Any, state: State):
    with state.locked():
        keep(state, 4, 4)
        keep(state, 8, 8)
        harm(state.folder / "best-8.pt")
        assert same(State("f").load(), saved(4, 4))
        keep(state, 10, 8)
        with pytest.raises(InputError, match="neither of this training's two saved states"):
            State("f").load()


def test_where_both_states_are_broken_an_error_says_what_to_delete_and_what_is_lost(state: State):
    with state.locked():
        keep(state, 4, 4)
        flip(state.folder / "state.pt")
        with pytest.raises(InputError, match="neither") as one:  # there is only one as yet
            State("f").load()
        flip(state.folder / "state.pt")  # as it was
        keep(state, 8, 8)
    for name in ("state.pt", "state-before.pt"):
        flip(state.folder / name)
    with pytest.raises(InputError, match="neither") as both:
        State("f").load()
    first, *listed, remedy = str(both.value).splitlines()
    assert first == "neither of this training's two saved states can be used:"
    for line, name in zip(listed, ("state.pt", "state-before.pt"), strict=True):
        assert line.startswith(f"  {state.folder / name}: not a checkpoint")
        assert "altered" in line
    told = f"delete {state.folder} to train anew: what it has done so far is lost"
    assert remedy == str(one.value).splitlines()[-1] == told


def test_outputs_are_made_of_the_last_state_alone(state: State, tmp_path: Path):
    with state.locked():
        keep(state, 4, 4)
        keep(state, 8, 8)
        flip(state.folder / "state.pt")
        with pytest.raises(InputError, match=r"state\.pt: .*run the same command again"):
            state.write_outputs(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_a_finished_training_one_state_is_kept(state: State):
    with state.locked():
        keep(state, 4, 4)
        keep(state, 8, 4)
    state.finish()
    assert files(state) == ["best-4.pt", "finished", "state.pt"]


def test_a_checkpoint_with_any_byte_flipped_is_refused_or_read_as_it_was(tmp_path: Path):
    path = tmp_path / "a.pt"
    save(saved(4, 4, 8), path)
    whole, content = path.read_bytes(), read_file(path)
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert same(read_file(path), content), place
        except InputError:
            refused += 1
    # The others are of no use: padding, dates and the like.
    assert refused > len(whole) / 2
    begin = whole.index(content["checkpoint"]["model"]["a"].numpy().tobytes())
    flip(path)
    path.write_bytes(whole[:begin] + b"\1" + whole[begin + 1 :])
    with pytest.raises(InputError, match=r"a\.pt: .*altered, and has another checksum"):
        load_checkpoint(path)


def test_a_part_that_says_it_is_packed_is_refused(tmp_path: Path):
    path = tmp_path / "a.pt"
    save({"a": torch.arange(6.0)}, path)
    whole = path.read_bytes()
    method = whole.rindex(b"archive/data/0") - 36
    path.write_bytes(whole[:method] + b"\x0e" + whole[method + 1 :])  # by LZMA
    with pytest.raises(InputError, match=r"a\.pt: .*(cut off or broken|compressed)"):
        read_file(path)


def test_a_model_with_any_byte_flipped_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    described = {"classes": ["a", "b"], "palette": [[0, 0, 0], [9, 9, 9]], "ignore_index": 255}
    described |= {"exif": "apply", "frequency": [0.5, 0.5]}
    save_model(saved(4, None, 4)["checkpoint"] | described, 1.5, path)
    whole = path.read_bytes()
    read_file(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            load_model(path)
    path.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(InputError, match=r"safetensors: .*altered, and has another checksum"):
        load_model(path)


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_has_locked_and_begun_is_free_and_gone(
    state: State, monkeypatch: pytest.MonkeyPatch
):
    """Row 27."""
    state.folder.mkdir(parents=True)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HOLD, str(state.folder / "lock")]
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
        other.wait()
    for name in (".state.pt.tmp", ".best-4.pt.tmp", ".run_key.tmp"):
        (state.folder / name).write_bytes(b"half")
    monkeypatch.setattr(state_module, "LOCK_PATIENCE", 0.0)
    with state.locked():
        assert files(state) == []


IDENTITY = {
    "format": FORMAT,
    "run_id": None,
    "run_key": None,
    "fingerprint": "0" * 32,
    "code": "0" * 32,
    "weights": {},
    "machine": {},
}
BROKEN_IDENTITIES = {
    "": "is broken",
    "{": "is broken",
    "\xff": "is broken",
    "[" * 10**5: "is broken",
    "[]": "is broken: it holds no object",
    "{}": "has format None",
    json.dumps(IDENTITY | {"format": FORMAT + 1}): f"has format {FORMAT + 1}",
    json.dumps(
        {"format": FORMAT}
    ): "is broken: no proper run_id, run_key, fingerprint, code, weights, machine",
    json.dumps(IDENTITY | {"run_id": 1, "weights": []}): "is broken: no proper run_id, weights",
    json.dumps(
        IDENTITY | {"fingerprint": "../" * 8 + "etc/abcd"}
    ): "is broken: no proper fingerprint",
}


@pytest.mark.parametrize(("text", "reason"), BROKEN_IDENTITIES.items(), ids=range(10))
def test_a_broken_run_json_is_named_with_the_remedy(text: str, reason: str, tmp_path: Path):
    """Row 27."""
    path = tmp_path / "run.json"
    with pytest.raises(InputError, match=r"run\.json is missing.*run `dvc repro -f train`"):
        read_identity(path)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        read_identity(path)
    assert str(caught.value).startswith(f"{path} {reason}")
    assert "; run `dvc repro -f train`" in str(caught.value)
    path.write_text(json.dumps(IDENTITY))
    assert read_identity(path) == IDENTITY


SAID = "is busy, it is being blocked by"  # DVC
COUNTS = {"train": 6, "val": 2, "test": 2}


@pytest.mark.slow
def test_a_training_goes_on_from_the_state_before_bit_for_bit(folder: Path):
    """Row 27: and what evaluates it says what is wrong with its run.json."""
    project = make_project(folder, COUNTS, **{"train.checkpoint.interval": 2})
    for name in ("prepare", "train"):
        stage(project, name)
    outputs = [f"checkpoints/{name}" for name in ("last.pt", "best.pt", "model.safetensors")]
    outputs = [project / "outputs" / name for name in (*outputs, "train.tsv", "val.tsv")]
    before = [file_md5(path) for path in outputs]
    (state,) = (project / ".dvc/tmp/instep").iterdir()
    flip(state / "state.pt")
    said = stage(project, "train")
    assert "state.pt: not a checkpoint that can be loaded safely: since it was written" in said
    assert "taking the state before it, of iteration 6" in said
    assert "continuing at iteration 6" in said
    assert [file_md5(path) for path in outputs] == before

    (project / "outputs/run.json").write_text("{}")
    code, said = ended(project, "evaluate")
    assert code == 1
    assert "error: outputs/run.json has format None" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_second_repro_at_once_is_told_and_the_first_is_unharmed(folder: Path):
    """Row 9: DVC holds a lock of its own."""
    project = folder / "twice"
    make_project(project, COUNTS)
    with (project / "first.log").open("wb") as log:
        first = subprocess.Popen(
            ["dvc", "repro", "train"],
            cwd=project,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        while "iteration 1 " not in (project / "first.log").read_text():
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)  # DVC alone: the training goes on, and it can't end
        second = run(["dvc", "repro", "train"], project, check=False)
        first.send_signal(signal.SIGCONT)
        assert second.returncode != 0
        assert SAID in second.stdout
        assert "iteration" not in second.stdout
        assert first.wait(300) == 0
    finally:
        first.kill()
        first.wait()
    assert (project / "outputs/train.log").read_text().count("iteration 8 ") == 1
    assert "up to date" in dvc(project, "status", "train")
