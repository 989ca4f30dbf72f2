"""`python -m stages.compare A B [C ...]`: whether one training is better than another.

A, B, ... are DVC experiments, git revisions, MLflow runs or `workspace`. Those whose parameters are
equal but for the seed are one group, and every other group is compared with that of the first name.
"""

import argparse
import string
from collections.abc import Iterator
from itertools import count, product
from pathlib import Path

from pipeline.data.store import INDEX, PREPARED, Store
from pipeline.disk import write_text
from pipeline.errors import InputError
from pipeline.evaluation.comparison import Comparison, Group, compare, gather
from pipeline.experiment import load_params
from pipeline.pages import score
from pipeline.pages.comparison import comparison_page
from pipeline.params import differing
from pipeline.results import find
from stages import run_main

LINES = 20  # classes on a terminal


def main() -> None:
    """Obey the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.compare",
        description="Say whether one training is better than another, beyond chance.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="a DVC experiment, a git revision, an MLflow run, or `workspace`",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), help="the page; %(default)s"
    )
    options = parser.parse_args()
    params = load_params()
    found = (find(name, params) for name in dict.fromkeys(options.names))
    groups = dict(zip(letters(), gather(found)))
    print_groups(groups)
    if len(groups) == 1:
        raise InputError(
            "there is nothing to compare: these results differ in the seed or the fold alone; name "
            "one whose parameters, data or code are others"
        )
    first, *others = groups
    comparisons = {letter: compare(groups[first], groups[letter]) for letter in others}
    for letter, comparison in comparisons.items():
        print_comparison(comparison, first, letter)
    store = Store(PREPARED) if (PREPARED / INDEX).is_file() else None
    page = comparison_page(groups, comparisons, store)
    write_text(options.out, page)
    print(f"\nas a page: {options.out}")


def letters() -> Iterator[str]:
    """A, B, ..., Z, AA, AB, ..."""
    for length in count(1):
        yield from map("".join, product(string.ascii_uppercase, repeat=length))


def print_groups(groups: dict[str, Group]) -> None:
    """What is compared, and in which parameters it differs."""
    names = differing([group.params for group in groups.values()])
    for letter, group in groups.items():
        told = [f"{name}: {group.params.get(name, '-')}" for name in names]
        trained = f"{group.trainings} training{'s' * (group.trainings > 1)}"
        print(f"{letter}  {', '.join([score(group.mean_iou), trained, *told])}  ({group.name})")


def print_comparison(comparison: Comparison, first: str, second: str) -> None:
    """The answer, and the classes that differ most."""
    print(f"\n{comparison.sentence(first, second)}\n")
    judged = [row for row in comparison.rows() if row.difference.half is not None]
    rows = sorted(judged, key=lambda row: -abs(row.difference.value))
    width = max((len(row.name) for row in rows[:LINES]), default=0)
    print(f"{'IoU':{width}}  {first:>7} {second:>7} {'apart':>8} {'±':>7}")
    for name, old, new, difference in rows[:LINES]:
        shown = "shown" if difference.shown else ""
        print(
            f"{name:{width}}  {score(old):>7} {score(new):>7} {score(difference.value):>8} "
            f"{score(difference.half):>7}  {shown}".rstrip()
        )
    if len(rows) > LINES:
        print(f"... and {len(rows) - LINES} classes that differ less")


if __name__ == "__main__":
    run_main(main)
