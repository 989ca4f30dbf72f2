"""A run's result again: the commands, and a proof by its first iterations in a temporary clone."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.data.store import PREPARED, Store
from pipeline.errors import InputError
from pipeline.params import main_checkout
from pipeline.provenance import PARAMS, revision_of
from pipeline.results import WORKSPACE
from pipeline.tracking.store import TrackedRun, TrackingParams, artifact_of
from pipeline.yaml12 import parse_yaml

# What a stage would take for its own from whoever runs this command.
OTHERS = ("DVC_", "GIT_", "MLFLOW_", "TORCHELASTIC_")


def commands(run: TrackedRun, tracking: TrackingParams) -> list[str]:
    """The commands that give a run's result again, from nothing.

    Raises:
        InputError: the run is not tracked to a commit, or MLflow does not hold its parameters.
    """
    revision, doubt = _revision(run)
    params = _artifact(run, tracking, PARAMS)
    folder, checkout = f"instep-{run.run_id[:8]}", main_checkout()
    cache = shlex.quote(str(checkout / ".dvc" / "cache"))
    return [
        *([f"# {doubt}"] if doubt else []),
        f"git clone --shared {shlex.quote(str(checkout))} {folder}",
        f"cd {folder}",
        f"git checkout --detach {revision}",
        f"dvc config --local cache.dir {cache}",
        f"cat > {PARAMS} << 'END'",
        params.decode().rstrip("\n"),
        "END",
        "dvc checkout --allow-missing",
        "dvc repro",
    ]


def verify(run: TrackedRun, tracking: TrackingParams, *, until: int, code: str | None) -> str:
    """Train a run's first iterations in a temporary clone; say that the weights are the same.

    `code` is a revision, or `workspace` for the files that lie here; None: the run's own.

    Raises:
        InputError: data or weights are others, which it names, or it can't be known.
    """
    identity = json.loads(_artifact(run, tracking, "run.json"))
    params = _artifact(run, tracking, PARAMS)
    revision, doubt = _revision(run)
    if code not in (None, WORKSPACE):
        revision, doubt = revision_of(str(code)), ""
    with tempfile.TemporaryDirectory(prefix="instep-verify-") as folder:
        clone = Path(folder) / "clone"
        _clone(clone, revision, from_workspace=code == WORKSPACE)
        (clone / PARAMS).write_bytes(params)
        _bring_weights(clone, parse_yaml(params.decode(), PARAMS))
        _run(clone, ["dvc", "checkout", "--allow-missing", "--quiet"])
        _run(clone, ["dvc", "repro", "--quiet", "prepare"])
        data = Store(clone / PREPARED).md5
        if data != run.tags.get("data.md5"):
            raise InputError(
                f"the data set is another: its md5 is {data}, and the run's was "
                f"{run.tags.get('data.md5')}"
            )
        training = [sys.executable, "-m", "stages.train", "--until", str(until)]
        said = _run(clone, training)
    found = dict(re.findall(r"^weights after (\d+) iterations: (\w+)$", said, re.MULTILINE))
    held = identity["weights"]
    both = sorted(found.keys() & held.keys(), key=int)
    if not both:
        raise InputError(
            f"the run keeps the weights' md5 after {', '.join(held)} iterations; --until must "
            "reach one of them"
        )
    different = [iteration for iteration in both if found[iteration] != held[iteration]]
    if different:
        first = different[0]
        trained = ", ".join(f"{name} {value}" for name, value in identity["machine"].items())
        raise InputError(
            f"DIFFERENT: after {first} iterations the weights' md5 is {found[first]}, and the "
            f"run's was {held[first]}. The run was computed on: {trained}; on another processor, "
            "number of threads or version of torch the last digits differ"
            + (f" ({doubt})" if doubt else "")
        )
    return (
        f"THE SAME: after {' and '.join(both)} iterations the weights are those of run "
        f"{run.run_id}, bit for bit"
    )


def _artifact(run: TrackedRun, tracking: TrackingParams, name: str) -> bytes:
    content = artifact_of(tracking, run.run_id, Path(name))
    if content is None:
        raise InputError(f"run {run.run_id} holds no {name}: its training did not end")
    return content


def _revision(run: TrackedRun) -> tuple[str, str]:
    """The commit that has a run's code, and why it may not be quite so."""
    revision, name = run.tags.get("git.rev"), run.tags.get("dvc.exp_name")
    if revision is None:
        raise InputError(f"run {run.run_id} is not tracked to a commit: it ran without git")
    if run.tags.get("git.dirty") != "true":
        return revision, ""
    if name:  # whose commit has the changes, too
        try:
            return revision_of(name), ""
        except InputError:
            pass
    return revision, "the code had changes that were not committed"


def _clone(folder: Path, revision: str, *, from_workspace: bool) -> None:
    checkout = main_checkout()
    cloning = ["git", "clone", "--quiet", "--shared", "--no-checkout", ".", str(folder)]
    _run(checkout, cloning)
    _run(folder, ["git", "checkout", "--quiet", "--detach", revision])
    if from_workspace:
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = _run(checkout, listing)
        for name in filter(None, listed.split("\0")):
            source, target = checkout / name, folder / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
            else:
                target.unlink(missing_ok=True)
    _run(folder, ["dvc", "config", "--local", "cache.dir", str(checkout / ".dvc" / "cache")])


def _bring_weights(clone: Path, params: Any) -> None:
    """The files of weights that the training starts from, which git does not hold."""
    train, backbone = params["train"], params["model"]["backbone"]
    for name in (train.get("load_from"), train.get("resume_from"), backbone.get("pretrained")):
        source = main_checkout() / (name or "")
        target = clone / (name or "")
        if name and source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)


def _run(folder: Path, command: list[str]) -> str:
    """What a command prints.

    Raises:
        InputError: it failed; the text is the end of what it said.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-10:]
        raise InputError(f"{shlex.join(command)} failed: " + "\n".join(said))
    return done.stdout
