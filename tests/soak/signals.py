"""`python -m tests.soak.signals --signals 10`: SIGTERM and Ctrl-C at random moments.

So many in a training, in the upload of what it leaves and in an evaluation, on each of `--ranks`.
It ends with 1 where a stage ends late, by another exit code or with more than one line, where the
state is not that of the step that the line names, or where the result is another in the end.
"""

import random
import re
import signal
import sys
import time
from pathlib import Path

from tests.faults.stage import ENDED, state_of
from tests.soak.scene import (
    FOREIGN,
    Attempt,
    arguments,
    differences,
    finish,
    folder,
    make,
    signal_group,
    stage_of,
    table,
    weights,
)

PHASES = ("training", "upload", "evaluation")
LATE = 10.0  # seconds: schedulers wait 30 before they send SIGKILL
INTERRUPTED = 75
MORE = 6  # iterations that an attempt gets further, at most
LEFT = re.compile(r"^ended by \w+; the same command does what is left$", re.MULTILINE)
# What the screen shows with or without a signal, and what DVC says of a stage that has ended so.
USUAL = re.compile(
    r"iteration \d+  |continuing at|\d process|calibrated on val|(test|val): mean IoU"
)
OF_DVC = re.compile(
    r"ERROR: failed to reproduce|Running stage|> exec|Stage '|^$|Updating lock|Use `"
)
STAGES = {"training": "train", "upload": "train", "evaluation": "evaluate"}


def stage(name: str) -> list[str]:
    """The command of a stage without DVC."""
    return [sys.executable, "-m", f"stages.{name}"]


def wait(attempt: Attempt, phase: str, rng: random.Random) -> None:
    """Until the moment of the signal."""
    pause, goal = 0.0, rng.randint(1, MORE)
    match phase:
        case "training" | "evaluation" if rng.random() < 0.2:
            attempt.wait_until(lambda: stage_of(attempt.process)[0])
            pause = rng.uniform(0.3, 10)
        case "training":
            attempt.wait_until(lambda: len(attempt.iterations()) >= goal)
            pause = rng.uniform(0, 0.3)
        case "upload":
            attempt.wait_until(lambda: attempt.newer("outputs/checkpoints/last.pt"))
            if rng.random() < 0.8:
                attempt.wait_until(lambda: attempt.newer("outputs/run.json"))
            pause = rng.uniform(0, 0.3)
        case "evaluation":
            marks = ("predictions", "per_image.npz", "scores.json", "overlays")
            mark = f"outputs/evaluation/{rng.choice(marks)}"
            attempt.wait_until(lambda: attempt.newer(mark))
            pause = rng.uniform(0, 0.5)
    deadline = time.monotonic() + pause
    attempt.wait_until(lambda: time.monotonic() >= deadline)


def ended(project: Path, phase: str, number: signal.Signals, rng: random.Random, by_dvc: bool):
    """Start a stage, end it by a signal; a row of the table, and what is wrong."""
    command = ["dvc", "repro", STAGES[phase]] if by_dvc else stage(STAGES[phase])
    before = saved(project)
    for _ in range(5):  # it may end before the moment has come
        attempt = Attempt(project, *command)
        wait(attempt, phase, rng)
        shown = len(attempt.said())
        if attempt.process.poll() is None:
            break
    if number == signal.SIGINT:
        signal_group(attempt.process, number)
    else:
        attempt.process.send_signal(number)
    code, seconds, left = attempt.end()
    said = attempt.said()
    if by_dvc:  # which SIGTERM ends at once, and so the stage
        found = re.search(r"exited with (-?\d+)", said)
        code = int(found[1]) if found else code
    news = [line for line in said[shown:].splitlines() if not USUAL.match(line)]
    lines = [line for line in news if not (by_dvc and OF_DVC.match(line))]
    named, step = ENDED.search(said), saved(project)
    wrong = [line for line in said.splitlines() if FOREIGN.search(line)]
    if left:
        wrong.append(f"{left} processes lived on")
    if seconds > LATE:
        wrong.append(f"it took {seconds:.1f} s")
    all_done = code == 0 and not lines
    if not all_done:
        if code != (-number if by_dvc and number == signal.SIGTERM else INTERRUPTED):
            wrong.append(f"exit code {code}")
        if len(lines) != 1:
            wrong.append(f"{len(lines)} lines: {lines}")
        if named is None and not LEFT.search(said):
            wrong.append(f"not said how to go on: {lines}")
    if named and step != int(named[2]):
        wrong.append(f"the state is of {step}")
    if not named and phase == "training" and step < before:
        wrong.append(f"the state went from {before} back to {step}")
    where = "dvc" if by_dvc else "stage"
    left_over = "what is left" if LEFT.search(said) else "nothing"
    told = named[2] if named else ("all was done" if all_done else left_over)
    row = [phase, number.name, where, f"{seconds:.1f}", code, len(lines), told, step, left]
    return row, wrong


def saved(project: Path) -> int:
    """The iteration of the saved state."""
    if not [*(project / ".dvc/tmp/instep").glob("*/state.pt")]:
        return 0
    return int(state_of(project)["checkpoint"]["iteration"])


def main() -> None:
    """Signal as often as asked for, then let all end, and compare."""
    options = arguments(__doc__.partition(":")[0], "signals", 10)
    faults = 0
    with folder(options.keep) as place:
        for ranks in options.ranks:
            rng = random.Random(options.seed + ranks)
            faults += soak(place / f"{ranks}", ranks, options.number, rng)
    sys.exit(1 if faults else 0)


def soak(place: Path, ranks: int, signals: int, rng: random.Random) -> int:
    """So many signals in each phase, on so many ranks; the number of faults."""
    begun, iterations = time.monotonic(), 30 + signals * MORE
    whole, project = (make(place / name, ranks, iterations) for name in ("whole", "signalled"))
    for one in (whole, project):
        finish(one, "dvc", "repro", "prepare")
    for name in ("train", "evaluate"):
        finish(whole, *stage(name))
    rows: list[list[object]] = []
    faults: list[str] = []
    for phase in PHASES:
        for turn in range(signals):
            number = (signal.SIGTERM, signal.SIGINT)[turn % 2]
            by_dvc = phase == "training" and turn % 5 == 1
            row, wrong = ended(project, phase, number, rng, by_dvc)
            rows.append([len(rows) + 1, *row])
            print(*rows[-1], sep="  ", flush=True)
            faults += [f"signal {len(rows)}: {one}" for one in wrong]
        said = finish(project, *stage(STAGES[phase])) if phase != "training" else ""
        faults += [f"{phase}: {line}" for line in said.splitlines() if FOREIGN.search(line)]
    faults += differences(project, whole)
    names = ["signal", "at", "by", "to", "s to the end", "exit", "lines", "named", "state"]
    title = f"{signals} signals in each, {ranks} rank{'s' * (ranks > 1)}"
    table(title, [*names, "orphans"], rows)
    print(f"weights {weights(project)}, undisturbed {weights(whole)}")
    print(f"all {time.monotonic() - begun:.0f} s")
    print("\n".join(f"FAULT: {fault}" for fault in faults) or "no fault", flush=True)
    return len(faults)


if __name__ == "__main__":
    main()
