"""Checkpoints: equal bytes for equal content, whole or not at all, and nothing run from a file."""

import copy
import fcntl
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import disk
from pipeline.disk import FORMAT
from pipeline.evaluation.metrics import HistoryEntry
from pipeline.models.weights import read_file
from pipeline.training import state as state_module
from pipeline.training.checkpoint import Checkpoint, build_checkpoint, fill, load_checkpoint, save
from pipeline.training.state import KEPT_DAYS, Means, Saved, State, Writer


def trained(optimizer: type = torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.to(memory_format=torch.channels_last)
    steps = optimizer(model.parameters(), 0.1)
    for _ in range(2):
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        steps.step()
        steps.zero_grad()
    return model, steps


def checkpoint_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, about: dict
) -> Checkpoint:
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return build_checkpoint(states, iteration, about.get("best"), about)


def written(path: Path, checkpoint: dict) -> bytes:
    save(checkpoint, path)
    return path.read_bytes()


def test_equal_content_has_equal_bytes_whatever_objects_hold_it(tmp_path: Path):
    model, optimizer = trained()
    word, pair = "".join(["mean", "_iou"]), (1, int("2"))
    one = {"words": [word, word], "pairs": (pair, pair), "nested": {word: [pair]}}
    other = {
        "words": ["".join(["mean", "_iou"]), "_".join(["mean", "iou"])],
        "pairs": [[1, 2], (1, 2)],
        "nested": {"".join(["me", "an_iou"]): [(1, int("2"))]},
    }
    # Without the canonical form these differ: pickle keeps track of objects.
    assert pickle.dumps(one) != pickle.dumps(other)
    first = written(tmp_path / "a.pt", checkpoint_of(model, optimizer, 7, one))
    model.to(memory_format=torch.contiguous_format)
    assert written(tmp_path / "b.pt", checkpoint_of(model, optimizer, 7, other)) == first
    assert written(tmp_path / "b.pt", checkpoint_of(model, optimizer, 8, other)) != first


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_round_trip_through_a_file_keeps_every_byte(kind: type, tmp_path: Path):
    model, optimizer = trained(kind)
    meta = {
        "best": {"iteration": 3, "mean_iou": 0.5},
        "params": {},
        "classes": ("a", "b"),
        "ratio": 1e-3,
    }
    first = written(tmp_path / "a.pt", checkpoint_of(model, optimizer, 7, meta))
    loaded = load_checkpoint(tmp_path / "a.pt")
    again, steps = trained(kind)
    with torch.no_grad():
        for value in again.parameters():
            value.zero_()
    fill(again, loaded["model"], "a.pt")
    steps.load_state_dict(loaded["optimizer"])
    rest = {name: loaded[name] for name in meta}
    second = checkpoint_of(again, steps, loaded["iteration"], rest)
    assert written(tmp_path / "b.pt", second) == first


def test_a_checkpoint_is_a_copy_that_training_on_does_not_change():
    model, optimizer = trained()
    checkpoint = checkpoint_of(model, optimizer, 7, {})
    before = copy.deepcopy(checkpoint)
    model(torch.randn(2, 3, 8, 8)).mean().backward()
    optimizer.step()
    assert torch.equal(checkpoint["model"]["0.weight"], before["model"]["0.weight"])
    assert not torch.equal(checkpoint["model"]["0.weight"], model.state_dict()["0.weight"])
    moments = [c["optimizer"]["state"][0]["exp_avg"] for c in (checkpoint, before)]
    assert torch.equal(*moments)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_is_refused_and_its_payload_does_not_run(zipped: bool, tmp_path: Path):
    path, trap = tmp_path / "evil.pt", tmp_path / "trap"
    content = {"model": {}, "iteration": Payload(trap)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pt: .* it names posix\.mkdir,"):
        load_checkpoint(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the file was dangerous indeed


@pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_by_name(kept: float, tmp_path: Path):
    whole = written(tmp_path / "a.pt", checkpoint_of(*trained(), 7, {}))
    (tmp_path / "a.pt").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=r"a\.pt: not a checkpoint"):
        load_checkpoint(tmp_path / "a.pt")


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.pt: no such file"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt: not a checkpoint: it holds a list"):
        read_file(tmp_path / "list.pt")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt: not a checkpoint of this tool.*load_from"):
        load_checkpoint(tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"other\.pt: not a checkpoint"):
        load_checkpoint(tmp_path / "other.pt")


def test_weights_that_do_not_fit_are_listed_with_their_shapes_and_none_is_loaded():
    model, optimizer = trained()
    checkpoint = checkpoint_of(model, optimizer, 7, {})
    checkpoint["model"]["0.weight"] = torch.zeros(5, 3, 3, 3)
    checkpoint["model"]["2.weight"] = checkpoint["model"].pop("1.weight") + 1
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"x\.pt does not fit the model") as caught:
        fill(model, checkpoint["model"], "x.pt")
    assert str(caught.value).splitlines()[1:-1] == [
        "  0.weight: (5, 3, 3, 3) in the file, (4, 3, 3, 3) in the model",
        "  1.weight: missing",
        "  2.weight: unknown",
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_of_very_many_weights_that_do_not_fit_a_few_are_named_and_all_are_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(10)))
    weights = {f"{number}.weight": torch.zeros(3, 2) for number in range(5)}
    weights |= {f"other.{number}": torch.zeros(1) for number in range(6)}
    with pytest.raises(ValueError, match="does not fit") as caught:
        fill(model, weights, "x.pt")
    file = tmp_path / ".dvc/tmp/instep-weights.txt"
    assert str(caught.value).splitlines()[1:-1] == [
        *(f"  {number}.bias: missing" for number in range(4)),
        "  ... 15 missing in all",
        *(f"  other.{number}: unknown" for number in range(4)),
        "  ... 6 unknown in all",
        *(f"  {number}.weight: (3, 2) in the file, (2, 2) in the model" for number in range(4)),
        "  ... 5 of another shape in all",
        f"  all are listed in {file}",
    ]
    assert len(file.read_text().splitlines()) == 15 + 6 + 5


def test_a_program_goes_on_while_its_writer_writes():
    allowed, written = threading.Event(), []
    with Writer() as writer:
        writer.start(lambda: allowed.wait(30) and written.append(1))
        assert not written
        allowed.set()
        writer.wait()
        writer.start(lambda: written.append(2))
    assert written == [1, 2]


def test_what_goes_wrong_while_writing_is_raised_once(tmp_path: Path):
    missing = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError), Writer() as writer:
        writer.start(lambda: missing.write_text(""))
    with Writer() as writer:
        writer.start(lambda: missing.write_text(""))
        with pytest.raises(FileNotFoundError):
            writer.wait()
        writer.wait()


def test_an_error_elsewhere_lets_the_writer_end_and_is_not_hidden_by_its_own():
    written = []

    def write() -> None:
        time.sleep(0.2)
        written.append(1)
        raise OSError

    def work() -> None:
        with Writer() as writer:
            writer.start(write)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert written == [1]


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the states of a repository of its own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(state_module, "LOCK_PATIENCE", 0.3)
    return tmp_path / ".dvc" / "tmp" / "instep"


def made(iteration: int, best: int | None) -> dict:
    score = {"iteration": best, "mean_iou": 0.25} if best else None
    return checkpoint_of(*trained(), iteration, {"best": score, "params": {}})


def saved(checkpoint: Checkpoint, history: list[HistoryEntry] | None = None) -> Saved:
    means = Means(steps=1, sums={"a": 0.5})
    return Saved(format=FORMAT, checkpoint=checkpoint, history=history or [], means=means)


def test_a_state_comes_back_as_it_was_saved(states: Path):
    history = [{"iteration": 1, "train/loss": 0.5, "val/iou.a": None}]
    state = State("f")
    assert not state.exists
    with state.locked():
        state.save(saved(made(4, None), history))
    assert state.exists
    content = State("f").load()
    checkpoint, curves = content["checkpoint"], content["history"]
    assert (checkpoint["iteration"], checkpoint["best"], curves) == (4, None, history)
    assert content["means"] == {"steps": 1, "sums": {"a": 0.5}}
    assert torch.equal(checkpoint["model"]["0.weight"], made(4, None)["model"]["0.weight"])
    assert state.folder == states / "f"


def test_outputs_are_the_last_and_the_best_checkpoint_and_the_curves(states: Path, tmp_path: Path):
    state = State("f")
    history = [
        {"iteration": 1, "train/loss": 2.0, "train/lr": 0.1, "time/x": 9},
        {"iteration": 2, "train/loss": 1.0, "train/lr": 0.1, "val/mean_iou": 0.25},
    ]
    with state.locked():
        state.save_best(made(2, 2))
        state.save(saved(made(3, 2), history))
        state.write_outputs(tmp_path / "out")
    checkpoints = tmp_path / "out" / "checkpoints"
    assert load_checkpoint(checkpoints / "last.pt")["iteration"] == 3
    assert load_checkpoint(checkpoints / "best.pt")["iteration"] == 2
    assert (
        tmp_path / "out/train.tsv"
    ).read_text() == "iteration\tloss\tlr\n1\t2.0\t0.1\n2\t1.0\t0.1\n"
    assert (tmp_path / "out/val.tsv").read_text() == "iteration\tmean_iou\n2\t0.25\n"


def test_the_key_of_a_run_is_kept(states: Path):
    state = State("f")
    assert state.run_key is None
    with state.locked():
        state.remember_run("abc")
    assert State("f").run_key == "abc"


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_state_in_another_process_hands_is_refused_kept_and_later_free(states: Path):
    state = State("f")
    with state.locked():
        state.save(saved(made(4, None)))
    lock = state.folder / "lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"doing this very training .*lock"), state.locked():
            raise AssertionError("two processes hold one state")
        old = time.time() - 2 * KEPT_DAYS * 86400
        os.utime(state.folder, (old, old))
        with State("other").locked():
            pass
        state.finish()
        assert state.exists
        assert not state.finished
        other.communicate("")
    with state.locked():
        pass


def test_the_lock_is_let_go_after_an_error(states: Path):
    state = State("f")
    with pytest.raises(KeyError), state.locked():
        raise KeyError
    with (state.folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_state_is_kept_however_many_there_are_until_it_is_old(
    states: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="instep")
    for number in range(12):
        with State(f"s{number}").locked() as _:
            State(f"s{number}").save(saved(made(number, None)))
    assert len(list(states.iterdir())) == 12
    days = {"s0": KEPT_DAYS + 1, "s1": KEPT_DAYS - 1}
    for name, age in days.items():
        when = time.time() - age * 86400
        os.utime(states / name, (when, when))
    with State("s2").locked():
        pass
    assert sorted({f"s{number}" for number in range(12)} - {p.name for p in states.iterdir()}) == [
        "s0"
    ]
    assert f"forgot the training in {states / 's0'}, untouched for 31 days" in caplog.text


def test_only_the_last_finished_training_is_kept_and_done_anew_when_it_is_asked_for_again(
    states: Path,
):
    for name in ("a", "b"):
        state = State(name)
        with state.locked():
            state.save_best(made(1, 1))
            state.save(saved(made(1, 1)))
        state.finish()
    assert [path.name for path in states.iterdir()] == ["b"]
    assert State("b").finished
    with State("b").locked():
        assert not State("b").exists
        assert not State("b").finished
        assert [path.name for path in (states / "b").iterdir()] == ["lock"]
    State("none").finish()  # of a training restored from DVC's cache there is no state
    assert not (states / "none").exists()


def test_an_extension_begins_where_the_finished_training_ended(states: Path):
    first, second = State("first"), State("second")
    with first.locked():
        first.save_best(made(1, 1))
        first.save(saved(made(2, 1), [{"iteration": 2, "train/loss": 1.0}]))
    first.finish()
    with second.locked():
        assert not second.start_from(State("none"), {})
        assert second.start_from(first, {"params": {"train": {"extend": 3}}})
    assert second.load()["history"] == [{"iteration": 2, "train/loss": 1.0}]
    assert second.load()["checkpoint"]["iteration"] == 2
    assert load_checkpoint(second.folder / "best-1.pt")["params"] == {"train": {"extend": 3}}
    assert not second.finished


def test_a_file_of_another_version_of_the_tool_is_refused(
    states: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state = State("f")
    monkeypatch.setattr("pipeline.training.checkpoint.FORMAT", FORMAT + 1)
    save(made(1, None), tmp_path / "new.pt")
    with state.locked():
        state.save(saved(made(1, None)) | {"format": FORMAT + 1})
    versions = rf"has format {FORMAT + 1}, and this version of the tool reads format {disk.FORMAT}"
    with pytest.raises(ValueError, match=rf"new\.pt {versions}; take its weights alone"):
        load_checkpoint(tmp_path / "new.pt")
    with pytest.raises(ValueError, match=rf"state\.pt {versions}; delete .*f to train anew"):
        state.load()
