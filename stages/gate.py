"""Stage 5: fail where the result is worse than a baseline's, beyond what other images explain."""

from pathlib import Path
from typing import Any

from pipeline.disk import write_text
from pipeline.errors import InputError
from pipeline.evaluation.comparison import compare, gather, worse
from pipeline.params import Part, WorkDir, read_section
from stages import run_main


class _Given(Part):
    """What this stage needs of params.yaml where no gate is set."""

    gate: Any
    train: WorkDir


def main() -> None:
    """Say in evaluation/gate.txt why the result passes, so that DVC knows that it does."""
    given = read_section(_Given)
    said = "no gate is set, so every result passes" if given.gate is None else judge()
    print(said)
    path = Path(given.train.work_dir) / "evaluation" / "gate.txt"
    write_text(path, said + "\n")


def judge() -> str:
    """The answer of the comparison with the baseline.

    Raises:
        InputError: the result does not pass, or can't be compared.
    """
    from pipeline.experiment import load_params  # here, as importing torch takes seconds
    from pipeline.results import WORKSPACE, find

    params = load_params()
    gate = params.gate
    assert gate is not None
    if gate.baseline == WORKSPACE:
        raise InputError("gate.baseline: workspace is the result itself; name a revision")
    baseline, here = (gather([find(name, params)])[0] for name in (gate.baseline, WORKSPACE))
    comparison = compare(baseline, here)
    said = comparison.sentence(gate.baseline, "the workspace")
    if lost := worse(comparison, gate):
        raise InputError(
            f"gate: worse than {gate.baseline} by more than {gate.tolerance:g}, beyond what other "
            "images explain:\n" + "\n".join(f"  {line}" for line in lost) + f"\n{said}\n"
            "metrics.json is that of this result; to let it pass, raise gate.tolerance or set "
            "gate: null"
        )
    return said


if __name__ == "__main__":
    run_main(main)
