"""Stage 4: fail where the result is worse than a baseline's, beyond what other images explain."""

from pathlib import Path

from pipeline.evaluation.comparison import Result, compare, gather, worse
from pipeline.yaml12 import read_yaml
from stages import run_main

HERE = "the workspace"


def main() -> None:
    """Compare what evaluate has left with the baseline, if params.yaml names one."""
    if read_yaml(Path("params.yaml")).get("gate") is None:
        print("gate: null, so every result passes")
        return
    from pipeline.experiment import load_params  # here, as importing torch takes seconds
    from pipeline.results import WORKSPACE, find

    params = load_params()
    gate = params.gate
    assert gate is not None
    if gate.baseline == WORKSPACE:
        raise ValueError("gate.baseline: workspace is the result itself; name a revision")
    found = {gate.baseline: find(gate.baseline, params), HERE: find(WORKSPACE, params)}
    groups = [gather([Result(name, one.per_image)])[0] for name, one in found.items()]
    comparison = compare(*groups)
    print(comparison.sentence(*found))
    if lost := worse(comparison, gate):
        raise ValueError(
            f"gate: worse than {gate.baseline} by more than {gate.tolerance:g}, beyond what other "
            "images explain:\n" + "\n".join(f"  {line}" for line in lost) + "\n"
            "metrics.json is that of this result; to let it pass, raise gate.tolerance or set "
            "gate: null"
        )


if __name__ == "__main__":
    run_main(main)
