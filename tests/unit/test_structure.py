"""The layers, read from the imports; and dvc.yaml, held against what the stages really use."""

import ast
from pathlib import Path

import pytest

from pipeline.params import flatten
from pipeline.yaml12 import read_yaml
from tests.unit.sections import REPOSITORY

FILES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("pipeline", "stages")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
}
STAGES = read_yaml(REPOSITORY / "dvc.yaml")["stages"]
STAGES |= read_yaml(REPOSITORY / "export/dvc.yaml")["stages"]  # with wdir: .., the same paths
# What people run, and no stage: in stages/ for `python -m stages.recipe`.
COMMANDS = {"compare", "labels", "predict", "recipe", "runs", "server"}
# They change no result: they import, tell of it, time it, refuse parameters before it, or end it.
REPORTING = {"pipeline", "pipeline.training.speed", "pipeline.experiment", "stages"}
REPORTING |= {"pipeline.errors", "pipeline.interruption", "pipeline.monitor"}
REPORTING |= {"pipeline.provenance", "pipeline.registry"}
REPORTING |= {module for module in FILES if module.startswith("pipeline.launchers")}
REPORTING |= {module for module in FILES if module.startswith("pipeline.tracking.")}
SERVED = "pipeline.serving"  # a file that MLflow takes along: nothing of ours imports it, nor it us
LOWER = (
    "params",
    "errors",
    "interruption",
    "monitor",
    "yaml12",
    "disk",
    "precision",
    "distributed",
    "evaluation.metrics",
)
# Their values change no result; the first is where DVC finds the outputs.
NEUTRAL = {"train.work_dir", "train.workers", "train.timeout", "train.checkpoint.interval"}


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {module: imports(path) for module, path in FILES.items()}


def uses(module: str, *prefixes: str) -> set[str]:
    return {
        name
        for name in IMPORTS[module]
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
    }


def reached(module: str, without: frozenset[str] = frozenset()) -> set[str]:
    """Our files that a module needs, its own included, as dvc.yaml writes them."""
    found, waiting = set(), {module}
    while waiting:
        one = waiting.pop()
        found.add(one)
        waiting |= (IMPORTS[one] & FILES.keys()) - found - without
    return {FILES[one].relative_to(REPOSITORY).as_posix() for one in found}


def test_the_graph_of_imports_is_read():
    assert len(FILES) > 15
    assert "pipeline.params" in uses("pipeline.data.splits", "pipeline")


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in FILES
        if name.startswith(("pipeline.data.", "pipeline.models"))
        or name in {f"pipeline.{lower}" for lower in LOWER}
    ],
)
def test_the_lower_layers_know_nothing_of_the_upper_ones(module: str):
    upper = ("pipeline.training", "pipeline.tracking", "stages", "dvc", "mlflow")
    assert uses(module, *upper) == set()


def test_two_modules_talk_to_torch_distributed():
    talking = {m for m in FILES if uses(m, "torch.distributed", "torch.nn.parallel")}
    assert talking == {"pipeline.distributed", "pipeline.launchers.torchrun"}


def test_few_modules_talk_to_mlflow():
    talking = {"pipeline.tracking.store", "pipeline.tracking.delivery", "pipeline.tracking.load"}
    talking |= {"pipeline.registry", SERVED}
    assert {m for m in FILES if uses(m, "mlflow")} == talking


def test_what_mlflow_serves_needs_neither_this_repository_nor_torch():
    assert uses(SERVED, "pipeline", "stages", "torch", "timm") == set()
    assert {m for m in FILES if uses(m, SERVED)} == set()


def test_no_part_of_the_pipeline_imports_a_stage():
    assert {m for m in FILES if m.startswith("pipeline") and uses(m, "stages")} == set()


def test_only_one_module_reads_what_dvc_keeps():
    assert {m for m in FILES if uses(m, "dvc")} == {"pipeline.results"}


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in FILES
        if name.startswith(("pipeline.data.", "pipeline.models"))
        or name in ("pipeline.precision", "pipeline.training.optimization")
    ],
)
def test_data_models_and_losses_do_not_know_how_many_processes_there_are(module: str):
    assert uses(module, "pipeline.distributed") == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_code_it_reaches(stage: str):
    deps = [Path(dep) for dep in STAGES[stage]["deps"]]
    folders = [file for dep in deps for file in (REPOSITORY / dep).glob("*.py")]
    declared = [file.relative_to(REPOSITORY).as_posix() for file in folders]
    declared += [dep.as_posix() for dep in deps if dep.suffix == ".py"]
    assert sorted(declared) == sorted(reached(f"stages.{stage}", frozenset(REPORTING)))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_run_as_the_module_of_its_name(stage: str):
    assert STAGES[stage]["cmd"] == f"exec python -m stages.{stage}"
    assert f"stages/{stage}.py" in STAGES[stage]["deps"]


def test_a_call_with_more_than_four_arguments_names_them():
    own = {
        node.name
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    assert {"augment", "open_training_run", "Segmenter"} <= own
    nameless = [
        f"{path.name}:{node.lineno}"
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and len(node.args) > 4
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in own
    ]
    assert nameless == []


def test_every_module_is_reached_by_a_stage_or_a_command():
    doors = ["pipeline", SERVED, *(f"stages.{name}" for name in [*STAGES, *COMMANDS])]
    used = set().union(*(reached(door) for door in doors))
    assert used == {path.relative_to(REPOSITORY).as_posix() for path in FILES.values()}


def test_prepare_depends_on_no_code_of_the_training():
    files = [Path(dep) for dep in STAGES["prepare"]["deps"]]
    assert not [file for file in files if set(file.parts) & {"training", "models", "evaluation"}]


def test_every_parameter_is_a_dependency_or_known_to_change_no_result():
    declared = {name for stage in STAGES.values() for name in stage["params"]}
    names = set(flatten(read_yaml(REPOSITORY / "params.yaml")))
    sections = {
        ".".join(parts[:length])
        for parts in (name.split(".") for name in names)
        for length in range(1, len(parts) + 1)
    }
    assert declared <= sections, "dvc.yaml names a parameter that params.yaml lacks"
    covered = {name for name in names if any(f"{name}.".startswith(f"{one}.") for one in declared)}
    neutral = NEUTRAL | {name for name in names if name.startswith(("tracking.", "launcher."))}
    assert names - covered == neutral
    assert "${train.work_dir}" in (REPOSITORY / "dvc.yaml").read_text(encoding="utf-8")
