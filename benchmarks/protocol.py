"""How a case is measured: two living processes that take turns, and the table of what they said.

Nothing but the standard library: the driver must stay small, since a child's peak memory begins at
what its parent had, and the peer's environment has none of our libraries.
"""

import importlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SIDES = ("ours", "theirs")

Metrics = dict[str, float]  # by unit
# One round: what it measured, and a result of which the row can say whether both sides' are equal.
Round = Callable[[], tuple[Metrics, Any]]


@dataclass(frozen=True)
class Case:
    """One case of a row, in one process a side.

    `threads` is what each side may use. `rounds` is for cases that take long, or whose result is
    the same each time; None takes the driver's. `warm` says that a round before the first is thrown
    away.
    """

    name: str
    threads: int = 1
    rounds: int | None = None
    warm: bool = True
    sides: tuple[str, ...] = SIDES


@dataclass
class Outcome:
    """What a case gave: of each side and unit the figures of all rounds, in the order of rounds."""

    row: str
    case: Case
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    equal: str = ""
    failure: str = ""


class Side:
    """A process that holds one side of a case ready, and measures a round when it is told to."""

    def __init__(self, python: Path, row: str, side: str, case: Case) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "OMP_"))}
        threads = str(case.threads)
        limits = {f"{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.side", row, side, case.name, threads],
            cwd=REPOSITORY,
            env=own | limits,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.name = side
        self.versions: dict[str, str] = self._answer()

    def round(self) -> tuple[Metrics, Any]:
        """Have it measure one round, and wait."""
        assert self._process.stdin is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        metrics, result = self._answer()
        return metrics, result

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-12:]
            raise RuntimeError("\n".join([f"{self.name} ended:", *last]))
        return json.loads(line)

    def close(self) -> None:
        """End it; what it waits for on its input is over."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def measure(row: str, case: Case, pythons: dict[str, Path], rounds: int) -> Outcome:
    """All rounds of one case. Who begins a round changes from one to the next."""
    outcome = Outcome(row, case)
    module = importlib.import_module(f"benchmarks.{row}")
    sides: list[Side] = []
    try:
        for name in case.sides:  # ours first: it prepares the data that both read
            sides.append(Side(pythons[name], row, name, case))
            outcome.versions[name] = sides[-1].versions
        for side in sides if case.warm else ():
            side.round()
        results: dict[str, Any] = {}
        for number in range(case.rounds or rounds):
            for side in sides[:: -1 if number % 2 else 1]:
                metrics, result = side.round()
                results.setdefault(side.name, result)
                for unit, value in metrics.items():
                    outcome.figures.setdefault(unit, {}).setdefault(side.name, []).append(value)
        if len(results) == 2 and None not in results.values():
            compare = getattr(module, "equal", lambda ours, theirs: ours == theirs)
            said = compare(results["ours"], results["theirs"])
            outcome.equal = said if isinstance(said, str) else "yes" if said else "NO"
    except RuntimeError as error:
        outcome.failure = str(error)
    finally:
        for side in sides:
            side.close()
    return outcome


def is_speed(unit: str) -> bool:
    """Whether more is better, as of images/s. Of seconds and of memory less is."""
    return unit.endswith("/s")


def ratios(unit: str, ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """How many times better ours is: the ratio of the medians, the lowest and the highest pair's.

    Better is faster, or smaller.
    """

    def ratio(own: float, other: float) -> float:
        return own / other if is_speed(unit) else other / own

    pairs = [ratio(*pair) for pair in zip(ours, theirs, strict=True)]
    return ratio(median(ours), median(theirs)), min(pairs), max(pairs)


HEADER = """| row | case | threads | unit | ours | theirs | ratio | lowest to highest | equal |
|---|---|---|---|---|---|---|---|---|"""


def lines(outcome: Outcome) -> Iterator[str]:
    """The lines of the table: one a unit."""
    case = outcome.case
    first = f"| {outcome.row} | {case.name} | {case.threads} "
    if outcome.failure:
        yield first + f"| failed: {outcome.failure.splitlines()[-1]} | | | | | |"
        return
    for unit, sides in outcome.figures.items():
        cells = [f"{median(sides[side]):.4g}" if side in sides else "" for side in SIDES]
        if len(sides) == 2:
            middle, low, high = ratios(unit, sides["ours"], sides["theirs"])
            cells += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}", outcome.equal]
        else:
            (figures,) = sides.values()
            cells += ["", f"{min(figures):.4g} to {max(figures):.4g}", ""]
        yield first + f"| {unit} | " + " | ".join(cells) + " |"
