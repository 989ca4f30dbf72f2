"""A disk that is full, or can't be written: one line says so, and what was there before is kept."""

import errno
import logging
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import disk
from pipeline.data.store import Split
from pipeline.data.table import Entry
from pipeline.disk import amount, file_md5, write_atomically, write_json, write_table
from pipeline.errors import InputError
from pipeline.evaluation.report import Masks
from pipeline.training.checkpoint import save, save_model
from pipeline.training.loop import Writer
from pipeline.training.state import LogFile, State
from stages import run_main
from tests.project import ended, make_project, stage

Mount = Callable[..., Path]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Makes a small disk of a folder, or another one of what is one already: larger, read-only."""
    mounted: list[Path] = []

    def make(folder: Path, *options: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        again = ["remount"] if folder in mounted else []
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*again, *options]), "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no `mount`")
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        if folder not in mounted:
            mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small(mount: Mount, tmp_path: Path) -> Path:
    """A disk of a megabyte."""
    return mount(tmp_path / "small", "size=1m")


def saved(iteration: int, megabytes: float) -> Any:
    values = torch.full((int(megabytes * 250_000),), float(iteration))
    checkpoint = {"model": {"a": values}, "iteration": iteration, "best": None}
    means: dict[str, Any] = {"since": 0, "sums": {}}
    head = {"format": disk.FORMAT, "checkpoint": checkpoint}
    return head | {"history": [], "means": means, "hashes": {}}


def test_a_checkpoint_without_room_says_how_much_it_needs_and_leaves_the_old_ones(
    small: Path, monkeypatch: pytest.MonkeyPatch
):
    """Row 3: known before a byte is written; and said by the thread that writes."""
    monkeypatch.setenv("DVC_ROOT", str(small))
    state = State("f")
    with state.locked():
        state.save(saved(1, 0.25))
        state.save(saved(2, 0.25))
        before = {path.name: file_md5(path) for path in state.folder.glob("*.pt")}
        assert sorted(before) == ["state-before.pt", "state.pt"]
        monkeypatch.delattr(disk, "_fill")  # which writes
        with Writer() as writer:
            writer.start(lambda: state.save(saved(3, 0.75)))
            with pytest.raises(InputError) as caught:
                writer.wait()
    told = str(caught.value)
    assert told.startswith(f"{state.folder}/state.pt can't be written: the disk is full; ")
    assert "750.0 kB are needed and " in told
    left = int(re.search(r"and (\d+)\.\d kB are left", told)[1])
    assert 300 < left < 550
    assert told.endswith("make room, then run the same command again")
    assert {path.name: file_md5(path) for path in state.folder.glob("*.pt")} == before
    assert sorted(path.name for path in state.folder.iterdir()) == ["lock", *sorted(before)]
    assert State("f").load()["checkpoint"]["iteration"] == 2


WRITERS: dict[str, Callable[[Path], object]] = {
    "checkpoint.pt": lambda path: save({"a": torch.zeros(500_000)}, path),
    "model.safetensors": lambda path: save_model(
        {name: [] for name in ("format", "classes", "palette", "ignore_index", "exif")}
        | {"frequency": [], "params": {}, "model": {"a": torch.zeros(500_000)}},
        None,
        path,
    ),
    "scores.json": lambda path: write_json(path, {"a": "b" * 2_000_000}),
    "curves.tsv": lambda path: write_table(path, ["a"], [["b" * 2_000_000]]),
    "arrays.npz": lambda path: write_atomically(path, lambda file: np.savez(file, np.ones(10**6))),
}


@pytest.mark.parametrize(("name", "write"), WRITERS.items(), ids=WRITERS)
def test_a_disk_that_fills_up_meanwhile_is_no_fault_of_ours_and_nothing_stays(
    name: str, write: Callable[[Path], object], small: Path, monkeypatch: pytest.MonkeyPatch
):
    """Row 3: no RuntimeError of torch about `unexpected pos`."""
    monkeypatch.setattr(disk, "_require_room", lambda path, size: None)
    (small / name).write_text("old")
    with pytest.raises(InputError, match=rf"/{name} can't be written: the disk is full; .* left;"):
        write(small / name)
    assert [path.name for path in small.iterdir()] == [name]
    assert (small / name).read_text() == "old"


def test_a_mask_without_room_is_named(small: Path):
    entry = Entry("deep/foot", "foot", "a.bin", offset=0, height=1500, width=1500)
    masks = Masks(small, Split(small, [entry]), [[level] * 3 for level in range(256)])
    masks.clear()
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500), np.uint8)
    with pytest.raises(InputError, match=r"predictions/deep/foot\.png can't be written: the disk"):
        masks.write(0, noise)


def test_a_line_of_the_log_without_room_is_an_error_and_no_traceback_for_every_line(
    small: Path, capsys: pytest.CaptureFixture[str]
):
    handler = LogFile(small / "train.log", encoding="utf-8")
    logger = logging.Logger("full")
    logger.addHandler(handler)
    logger.info("begin")
    with pytest.raises(InputError, match=r"train\.log can't be written: the disk is full"):
        logger.info("a" * 2_000_000)
    handler.stream = None  # what it holds can't be flushed
    assert capsys.readouterr().err == ""


def limited(path: Path, told: Any) -> None:
    """Write a checkpoint where a file may have 100,000 bytes; `told` gets what goes wrong."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save({"a": torch.zeros(100_000)}, path)
    except InputError as error:
        told.put(str(error))
    except BaseException as error:
        told.put(repr(error))


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path):
    """Row 3, where no disk can be mounted."""
    path = tmp_path / "a.pt"
    path.write_text("old")
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    child = context.Process(target=limited, args=(path, told))
    child.start()
    child.join()
    assert told.get() == (
        f"{path} can't be written: a file may not be so large here (`ulimit -f`); raise that "
        "limit, then run the same command again"
    )
    assert [one.name for one in tmp_path.iterdir()] == ["a.pt"]
    assert path.read_text() == "old"


def test_a_write_that_fails_for_another_reason_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "deep" / "a.pt"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"half of the n")
        raise OSError("no disk any more")

    with pytest.raises(OSError, match="no disk any more"):
        write_atomically(path, fail)
    assert [(one.name, one.read_bytes()) for one in path.parent.iterdir()] == [("a.pt", b"old")]
    write_atomically(path, lambda file: file.write(b"new"))
    assert [(one.name, one.read_bytes()) for one in path.parent.iterdir()] == [("a.pt", b"new")]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "", "a/b"), "error: a/b can't be written: the disk is full; "),
        (OSError(errno.EDQUOT, "", "a", None, "b"), "error: b can't be written: the quota is us"),
        (OSError(errno.EROFS, "", "a"), "error: a can't be written: the file system is read-only;"),
        (OSError(errno.ENOSPC, ""), "error: a file here can't be written: the disk is full; "),
        (PermissionError(errno.EACCES, "", "a"), "error: a: permission is denied"),
    ],
)
def test_what_nobody_has_looked_after_is_said_in_a_line_by_the_stage(error: OSError, said: str):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert str(caught.value).startswith(said)
    with pytest.raises(OSError, match="other"):
        run_main(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "other")))


def test_sizes_are_said_as_people_read_them():
    sizes = (0, 999, 1000, 999_949, 999_950, 382_400_000, 2 * 10**12, 10**16)
    assert [amount(size) for size in sizes] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "382.4 MB",
        "2.0 TB",
        "10000.0 TB",
    ]


COUNTS = {"train": 6, "val": 2, "test": 2}
STATE_MB = 28  # of the network of SMALL, with its momentum


def failed(project: Path, name: str) -> str:
    """The last line of a stage that fails, with code 1 and without a traceback."""
    code, said = ended(project, name)
    assert code == 1, said
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.slow
def test_a_data_set_without_room_for_its_shards_is_said_in_a_line(mount: Mount, tmp_path: Path):
    """Row 3."""
    project = tmp_path / "project"
    data = mount(project / "data", "size=40m")
    make_project(project, COUNTS)
    mount(data, f"size={shutil.disk_usage(data).used + 40_000}")
    line = failed(project, "prepare")
    assert line.startswith("error: data/prepared can't be written: the disk is full; ")
    assert not (project / "data/prepared").exists()  # no half of it keeps the disk full
    mount(data, "size=40m")
    stage(project, "prepare")


@pytest.mark.slow
def test_a_training_on_a_full_disk_goes_on_when_there_is_room(mount: Mount, tmp_path: Path):
    """Row 3: with states, then outputs, then scores that find no room."""
    project = tmp_path / "project"
    changes = {"train.checkpoint.interval": 2, "train.validate": False}
    make_project(project, COUNTS, **changes)
    stage(project, "prepare")

    states = mount(project / ".dvc/tmp", f"size={int(2.5 * STATE_MB)}m")
    line = failed(project, "train")
    (folder,) = (states / "instep").iterdir()
    assert line.startswith(f"error: {folder}/state.pt can't be written: the disk is full; ")
    assert re.search(r"2\d\.\d MB are needed and 1\d\.\d MB are left; make room", line)
    kept = sorted(path.name for path in folder.glob("*.pt*"))
    assert kept == ["state-before.pt", "state.pt"]
    assert not list(folder.glob(".*"))
    mount(states, f"size={4 * STATE_MB}m")

    outputs = mount(project / "outputs", f"size={STATE_MB // 2}m")
    line = failed(project, "train")
    assert line.startswith("error: outputs/checkpoints/last.pt can't be written: the disk is full")
    assert [path.name for path in (outputs / "checkpoints").iterdir()] == []
    mount(outputs, f"size={2 * STATE_MB}m")
    said = stage(project, "train")
    assert "continuing at iteration 8" in said
    assert "continuing at iteration 4" in (outputs / "train.log").read_text()

    free = shutil.disk_usage(outputs).free
    with (outputs / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - 4096)
    line = failed(project, "evaluate")
    assert re.match(r"error: outputs/evaluation/.+ can't be written: the disk is full", line)


@pytest.mark.slow
def test_a_file_system_that_is_read_only_is_named(mount: Mount, tmp_path: Path):
    project = tmp_path / "project"
    mount(project / "data", "size=4m")
    make_project(project, COUNTS)
    for _ in range(2):
        mount(project / "data", "ro")
        line = failed(project, "prepare")
        assert line.startswith("error: data/prepared can't be written: the file system is read-o")
        mount(project / "data", "rw")
        (project / "data/prepared").mkdir(exist_ok=True)
