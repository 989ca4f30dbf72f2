"""Where a run comes from: run.json, git, DVC, and the parameters that were changed.

None of it is part of a result: it tells where one can be had again.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypedDict, cast

from pipeline.disk import check_format
from pipeline.errors import InputError
from pipeline.params import flatten, main_checkout
from pipeline.yaml12 import parse_yaml

DVC_TAGS = {"dvc.exp_name": "DVC_EXP_NAME", "dvc.baseline_rev": "DVC_EXP_BASELINE_REV"}
PARAMS = "params.yaml"
NAMED = 3  # changed parameters in a run's name
# Sections whose parameters do not change a training's result, and parameters of others.
SILENT = ("evaluation.", "tracking.", "launcher.", "gate")
MACHINE = {"train.gpus", "train.parallel", "train.device", "train.workers", "train.timeout"}
MACHINE |= {"train.work_dir"}


class Identity(TypedDict):
    """The content of run.json: which training made the files beside it.

    `run_id` is that of its MLflow run, null where MLflow has not told it yet, and `run_key` our own
    name of the run, null where it was tracked nowhere. `code` is a digest of the code and of the
    files of weights that it started from. `weights` has the md5 of the weights after 1, 10, 100,
    ... iterations and at the end, `machine` what they were computed on.
    """

    format: int
    run_id: str | None
    run_key: str | None
    fingerprint: str
    code: str
    weights: dict[str, str]
    machine: dict[str, Any]


KINDS: dict[str, type | tuple[type, ...]] = {
    "run_id": (str, NoneType),
    "run_key": (str, NoneType),
    "fingerprint": str,
    "code": str,
    "weights": dict,
    "machine": dict,
}
FINGERPRINT = re.compile(r"[0-9a-f]{32}")  # also the name of a folder


def read_identity(path: Path) -> Identity:
    """The content of a run.json.

    Raises:
        InputError: it is missing, broken or of another version of this tool.
    """
    remedy = "run `dvc repro -f train`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing, which a training ends with; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is broken ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is broken: it holds no object; {remedy}")
    check_format(content, path, remedy)
    wrong = [name for name, kind in KINDS.items() if not isinstance(content.get(name, ...), kind)]
    if not wrong and not FINGERPRINT.fullmatch(content["fingerprint"]):
        wrong = ["fingerprint"]
    if wrong:
        raise InputError(f"{path} is broken: no proper {', '.join(wrong)}; {remedy}")
    return cast("Identity", content)


def git_tags() -> dict[str, str]:
    """The commit a stage runs on, and whether tracked files differ from it.

    params.yaml and what DVC writes do not count: they are tracked by the run itself.
    """
    status = _git(["status", "--porcelain", "--untracked-files=no"])
    revision = _git(["rev-parse", "HEAD"])
    if status is None or revision is None:
        return {}
    own = {PARAMS, "dvc.lock", "metrics.json"}
    changed = {line[3:] for line in status.splitlines()} - own
    revision = revision.strip()
    return {
        "git.rev": revision,
        "git.dirty": str(bool(changed)).lower(),
        "mlflow.source.git.commit": revision,
    }


def dvc_tags() -> dict[str, str]:
    """Which DVC experiment a stage runs for; empty in a plain `dvc repro`."""
    return {tag: os.environ[name] for tag, name in DVC_TAGS.items() if os.environ.get(name)}


def changed_params(sections: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a training that are others than in the commit it runs on, by name."""
    committed = _git(["show", f"HEAD:./{PARAMS}"])
    if committed is None:
        return {}
    try:
        document = parse_yaml(committed, PARAMS)
    except InputError:
        return {}
    before = flatten(document) if isinstance(document, dict) else {}
    return {
        name: value
        for name, value in flatten(sections).items()
        if name in before
        and before[name] != value
        and name not in MACHINE
        and not name.startswith(SILENT)
    }


def run_name(head: str, changed: Mapping[str, Any], last: str) -> str:
    """What a run is called: its network, what was changed for it, and a name that no other has."""
    told = [f"{name.rpartition('.')[2]} {_short(value)}" for name, value in changed.items()]
    return f"{', '.join([head, *first_of(told, NAMED)])} ({last})"


def first_of(told: Sequence[str], count: int) -> list[str]:
    """So many texts, and how many more there are."""
    return [*told[:count], *([f"{len(told) - count} more"] if len(told) > count else [])]


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:23]}…"


def rebuild_commands(tags: Mapping[str, str]) -> list[str]:
    """The commands that give a run's result again, in a clone, by the run's own params.yaml."""
    name = tags.get("dvc.exp_name")
    if name and tags.get("git.dirty") == "true":  # the experiment's commit has the code, too
        return [
            f"dvc exp apply {name}",
            "dvc pull --allow-missing  # where there is a remote",
            "dvc repro",
        ]
    revision = tags.get("git.rev", "COMMIT")
    return [
        f"git checkout {revision}",
        f"# {PARAMS} as this run's artifact of that name has it",
        "dvc pull --allow-missing  # where there is a remote",
        "dvc repro",
    ]


def revision_of(name: str) -> str:
    """The commit of a DVC experiment or of any git revision of the main checkout.

    Raises:
        InputError: nothing is called so.
    """
    there = ("-C", str(main_checkout()))
    listed = _git([*there, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps"]) or ""
    for line in listed.splitlines():
        commit, _, reference = line.partition(" ")
        if reference.rpartition("/")[2] == name:
            return commit
    commit = _git([*there, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]) or ""
    if not commit:
        raise InputError(f"{name} is no experiment and no revision; `dvc exp list` names the first")
    return commit.strip()


def _git(arguments: list[str]) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout
