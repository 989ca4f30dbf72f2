"""`python -m benchmarks.run [ROW ...]`: measure the rows and print the table.

All rows together also write RESULTS.md.
"""

import argparse
import importlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.protocol import HEADER, REPOSITORY, Outcome, lines, measure

ROWS = ("loader", "step", "training", "confusion", "evaluation", "law", "alone")


def main() -> None:
    """Obey the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; none: all")
    parser.add_argument("--peer", type=Path, required=True, help="MMSegmentation's environment")
    parser.add_argument("--rounds", type=int, default=5, help="of each side and case")
    parser.add_argument("--case", default="", help="only the cases whose name holds this")
    options = parser.parse_args()
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    pythons = {
        "ours": Path(sys.executable),
        "theirs": (options.peer / "bin" / "python").absolute(),
    }
    outcomes = []
    print(HEADER, flush=True)
    for row in options.rows or ROWS:
        for case in importlib.import_module(f"benchmarks.{row}").CASES:
            if options.case in case.name:
                outcomes.append(measure(row, case, pythons, options.rounds))
                print(*lines(outcomes[-1]), sep="\n", flush=True)
    if not outcomes:
        parser.error(f"no case of these rows has {options.case!r} in its name")
    failures = [outcome for outcome in outcomes if outcome.failure]
    for outcome in failures:
        print(f"\n{outcome.row}, {outcome.case.name}: {outcome.failure}", file=sys.stderr)
    if not options.rows and not options.case:
        path = REPOSITORY / "benchmarks" / "RESULTS.md"
        path.write_text(report(outcomes, options.rounds), encoding="utf-8")
    sys.exit(1 if failures else 0)


def report(outcomes: list[Outcome], rounds: int) -> str:
    """The table with what is needed to judge it."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    versions: dict[str, dict[str, str]] = {}
    for outcome in outcomes:
        versions |= outcome.versions
    said = [
        f"- {side}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for side, found in versions.items()
    ]
    return "\n".join(
        [
            "# Results",
            "",
            "By `make bench`; README.md says how it is measured and what a ratio means.",
            "",
            f"- {datetime.now(UTC):%Y-%m-%d}, commit {commit}, medians of {rounds} rounds",
            f"- {processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
            *said,
            "",
            HEADER,
            *(line for outcome in outcomes for line in lines(outcome)),
            "",
        ]
    )


def processor() -> str:
    """The processor's name as Linux knows it, with the extensions that bf16 hangs on."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor()
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in pairs}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in known.get("flags", "").split() if flag in wanted]
    return f"{known.get('model name', platform.processor())} ({' '.join(flags)})"


if __name__ == "__main__":
    main()
