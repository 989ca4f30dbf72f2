"""`python -m stages.runs`: the experiments that MLflow knows, and whether one can be had again.

Also `--sync`: what earlier runs could not tell it.
"""

import argparse
import os
from collections.abc import Sequence

from pipeline.errors import InputError
from pipeline.experiment import load_params
from pipeline.pages import score
from pipeline.params import differing
from pipeline.provenance import first_of
from pipeline.reproduction import commands, verify
from pipeline.results import ambiguous, runs_called
from pipeline.tracking.delivery import deliver, told_of, waiting_spools
from pipeline.tracking.store import INTERVAL_TAG, Patience, TrackedRun, find_runs, reason
from stages import at_least_1, run_main

NAMED = 4  # differing parameters in a line
SECTIONS = ("test", "val_final")  # where the score of an evaluation stands


def main() -> None:
    """Obey the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.runs",
        description="List the runs in MLflow, the best first, with what they differ in.",
    )
    parser.add_argument(
        "--reproduce", metavar="RUN", help="print the commands that give a run's result again"
    )
    parser.add_argument(
        "--verify",
        metavar="RUN",
        help="train the first iterations of a run in a temporary clone, and compare the weights",
    )
    parser.add_argument(
        "--until",
        type=at_least_1,
        default=10,
        metavar="K",
        help="iterations to verify; %(default)s",
    )
    parser.add_argument(
        "--code",
        metavar="REV",
        help="verify with the code of another revision, or of `workspace`: is it still the same?",
    )
    parser.add_argument(
        "--sync",
        action="store_true",
        help="send what MLflow could not be told while its server was away; to the store that it "
        "was meant for, or to that of MLFLOW_TRACKING_URI, where this is set",
    )
    options = parser.parse_args()
    if options.sync:
        sync(os.environ.get("MLFLOW_TRACKING_URI"))
        return
    params = load_params()
    runs = find_runs(params.tracking)
    if options.reproduce:
        print("\n".join(commands(one_of(runs, options.reproduce), params.tracking)))
    elif options.verify:
        run = one_of(runs, options.verify)
        print(verify(run, params.tracking, until=options.until, code=options.code))
    else:
        print_table(runs)


def sync(uri: str | None) -> None:
    """Send what waits, and say of each run what was sent; one that fails stops no other.

    Raises:
        InputError: something still waits.
    """
    Patience.begin()
    spools = waiting_spools()
    failed = 0
    for spool in spools:
        told = told_of(spool)
        try:
            if deliver(spool, uri):
                print(f"sent {told} of run {spool.key}")
            else:
                print(f"run {spool.key}: another process is sending {told}")
        except Exception as error:
            failed += 1
            print(f"run {spool.key}: {told} still wait in {spool.folder}: {reason(error)}")
    if failed:
        raise InputError(
            "what is above could not be sent; try again. A password is kept nowhere: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD again, or MLFLOW_TRACKING_URI, "
            "which may also name another store"
        )
    if not spools:
        print("nothing waits: MLflow has all that was logged")


def one_of(runs: Sequence[TrackedRun], name: str) -> TrackedRun:
    """The run of an id, the beginning of one, a name, or a DVC experiment's name.

    Raises:
        InputError: there is none, or more than one.
    """
    found = runs_called(name, runs)
    if len(found) > 1:
        raise ambiguous(name, [run.run_id for run in found])
    if not found:
        raise InputError(f"no run is called {name}; `python -m stages.runs` lists them")
    return found[0]


def print_table(runs: Sequence[TrackedRun]) -> None:
    """A line a run: score, interval, id, experiment, status, and parameters that differ."""
    names = differing([run.params for run in runs])
    lines = [("mean IoU", "95%", "run", "experiment", "status", "differs in")]
    for run in sorted(runs, key=lambda run: -(score_of(run) or 0)):
        told = [f"{name}: {run.params.get(name, '-')}" for name in names]
        lines.append(
            (
                score(score_of(run)),
                run.tags.get(INTERVAL_TAG, "-"),
                run.run_id[:8],
                run.tags.get("dvc.exp_name", "-"),
                run.status,
                ", ".join(first_of(told, NAMED)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip())


def score_of(run: TrackedRun) -> float | None:
    """Mean IoU of a run's evaluation, if there is one."""
    found = (run.metrics.get(f"{section}/mean_iou") for section in SECTIONS)
    return next((mean for mean in found if mean is not None), None)


if __name__ == "__main__":
    run_main(main)
