"""The files of examples/cluster: keys that their systems know, commands that Instep takes."""

import json
import os
import re
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import apply_overrides
from kubeflow_trainer_api import models

from pipeline.experiment import Params, load_params
from pipeline.interruption import PATIENCE
from pipeline.launchers import Meeting
from pipeline.yaml12 import read_yaml
from tests.project import REPOSITORY

FOLDER = REPOSITORY / "examples" / "cluster"
CLAIM, RUNTIME, JOB = yaml.safe_load_all((FOLDER / "trainjob.yaml").read_text(encoding="utf-8"))
TASK = yaml.safe_load((FOLDER / "skypilot.yaml").read_text(encoding="utf-8"))
KINDS = {
    "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}
SCHEMAS = json.loads((REPOSITORY / "tests/skypilot/schemas.json").read_text(encoding="utf-8"))
PODS = {
    job["name"]: job["template"]["spec"]["template"]["spec"]
    for job in RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
}
STAGES = read_yaml(REPOSITORY / "dvc.yaml")["stages"]

# In the place of a program: writes down what it was called with.
STAND_IN = """#!/bin/sh
printf '%s\\037' "${0##*/}" "$@" >> "$SAID" && echo >> "$SAID"
"""
PROGRAMS = ("apt-get", "dvc", "getent", "git", "make", "python")


def known(document: dict[str, Any]) -> bool:
    """Whether Trainer has every key of a document; values of a wrong type are refused."""
    read = KINDS[document["kind"]].from_dict(document)
    return bool(read.to_dict() == document)  # the models drop what they don't know


def check_task(task: dict[str, Any]) -> None:
    """Each part by SkyPilot's schema for it."""
    jsonschema.validate(task, SCHEMAS["task"])
    jsonschema.validate(task["resources"], SCHEMAS["resources"])
    for mount in task["file_mounts"].values():
        jsonschema.validate(mount, SCHEMAS["storage"])


def container(name: str) -> dict[str, Any]:
    (found,) = PODS[name]["containers"]
    return found


def script(name: str) -> str:
    """What a pod of this job runs."""
    assert container(name)["command"] == ["bash", "-ec"]
    (text,) = container(name)["args"]
    return text


def called(text: str, folder: Path, **variables: str) -> list[list[str]]:
    """What a script calls in a folder, with programs that only write that down."""
    programs = folder / "programs"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        (programs / name).write_text(STAND_IN, encoding="utf-8")
        (programs / name).chmod(0o755)
    for clone in (folder, folder / "instep"):
        (clone / ".venv/bin").mkdir(parents=True)
        (clone / ".venv/bin/activate").touch()
    said = folder / "said"
    own = {"PATH": f"{programs}:{os.environ['PATH']}", "SAID": str(said)}
    subprocess.run(["bash", "-euc", text], cwd=folder, env=own | variables, check=True, timeout=10)
    return [line.split("\037")[:-1] for line in said.read_text(encoding="utf-8").splitlines()]


def experiment(call: list[str], path: Path) -> tuple[Params, list[str]]:
    """The parameters that `dvc exp run` leaves of those at `path`, and its targets."""
    assert call[:3] == ["dvc", "exp", "run"]
    changes, targets, rest = [], [], iter(call[3:])
    for word in rest:
        if word == "-S":
            changes.append(next(rest))
        else:
            targets.append(word)
    ((file, overrides),) = to_path_overrides(changes).items()
    assert file == "params.yaml"
    apply_overrides(path, overrides)
    return load_params(path), targets


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of params.yaml."""
    return Path(shutil.copy(REPOSITORY / "params.yaml", tmp_path))


def test_trainer_knows_every_key_of_the_file():
    for document in (CLAIM, RUNTIME, JOB):
        assert known(document)


def test_a_key_or_a_value_that_trainer_does_not_take_is_found():
    misspelt = deepcopy(RUNTIME)
    (_, node, _) = misspelt["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    pod["terminationGracePeriod"] = pod.pop("terminationGracePeriodSeconds")
    assert not known(misspelt)
    with pytest.raises(ValueError, match="numNodes"):
        known(RUNTIME | {"spec": RUNTIME["spec"] | {"mlPolicy": {"numNodes": "two"}}})


def test_skypilot_takes_the_task():
    check_task(TASK)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": 2}, "'nodes' was unexpected"),
        ({"num_nodes": "2"}, "is not of type 'integer'"),
        ({"resources": {"job_recovery": {"restarts": 3}}}, "'restarts' was unexpected"),
        ({"file_mounts": {"/state": {"mode": "CACHED"}}}, "is not one of"),
    ],
)
def test_what_skypilot_does_not_take_is_found(changes: dict[str, Any], said: str):
    with pytest.raises(jsonschema.ValidationError, match=said):
        check_task(TASK | changes)


def test_the_parts_of_the_kubernetes_file_fit_together():
    assert JOB["spec"]["runtimeRef"]["kind"] == RUNTIME["kind"]
    assert JOB["spec"]["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]
    assert list(PODS) == ["prepare", "node", "evaluate"]
    for name, pod in PODS.items():
        assert container(name)["name"] == name
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["name"]: mount["mountPath"] for mount in container(name)["volumeMounts"]}
        assert volumes.keys() == mounted.keys()
        claim = volumes["volume"]["persistentVolumeClaim"]["claimName"]
        assert claim == CLAIM["metadata"]["name"]
        assert container(name)["workingDir"].startswith(mounted["volume"])
        assert pod["restartPolicy"] == "OnFailure"
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    jobs = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
    for job, before in zip(jobs[1:], jobs):
        assert job["dependsOn"] == [{"name": before["name"], "status": "Complete"}]


def test_a_pod_that_is_ended_has_the_time_to_save_the_state():
    assert PODS["node"]["terminationGracePeriodSeconds"] >= PATIENCE + 60
    assert script("node").splitlines()[-1] == "exec python -m stages.train"  # SIGTERM reaches it


def test_kubernetes_prepares_trains_and_evaluates(path: Path, tmp_path: Path):
    given = {one["name"]: one["value"] for one in container("prepare")["env"]}
    calls = called(script("prepare"), tmp_path / "prepare", **given)
    assert ["git", "fetch", "-q", given["REPOSITORY"], given["REVISION"]] in calls
    params, targets = experiment(calls[-1], path)
    assert targets == ["prepare"]
    host = f"{JOB['metadata']['name']}-node-0-0.{JOB['metadata']['name']}"
    nodes = RUNTIME["spec"]["mlPolicy"]["numNodes"]
    assert params.launcher.meeting() == Meeting(nodes, host, 29500)
    for name in ("node", "evaluate"):
        assert container(name)["resources"]["limits"]["nvidia.com/gpu"] == str(params.train.gpus)

    calls = called(script("node"), tmp_path / "node")
    assert calls[-2:] == [["getent", "hosts", host], ["python", "-m", "stages.train"]]

    calls = called(script("evaluate"), tmp_path / "evaluate")
    params, targets = experiment(calls[-1], path)  # of the same params.yaml
    assert (params.launcher.name, targets) == ("local", [])
    assert experiment(calls[-1], path)  # and once more, where its pod was ended


@pytest.mark.parametrize(("rank", "expected"), [("0", []), ("1", ["train"])])
def test_machines_of_skypilot_meet_at_the_first(
    rank: str, expected: list[str], path: Path, tmp_path: Path
):
    (gpus,) = re.findall(r":(\d+)$", TASK["resources"]["accelerators"])
    calls = called(TASK["setup"], tmp_path / "setup")
    assert calls[-1] == ["make", "PYTHON=/usr/local/bin/python3", "install"]
    calls = called(
        TASK["run"],
        tmp_path / "run",
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
        SKYPILOT_NODE_RANK=rank,
        SKYPILOT_NUM_NODES=str(TASK["num_nodes"]),
        SKYPILOT_NUM_GPUS_PER_NODE=gpus,
    )
    params, targets = experiment(calls[-1], path)
    assert targets == expected
    assert STAGES.keys() >= set(targets)
    assert params.launcher.meeting() == Meeting(TASK["num_nodes"], "10.0.0.1", 29500)
    assert params.train.gpus == int(gpus)
    state = (tmp_path / "run/.dvc/tmp/instep").readlink()
    assert TASK["file_mounts"].keys() == {str(state)}
