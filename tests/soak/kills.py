"""`python -m tests.soak.kills --kills 30`: SIGKILL at random moments, and `dvc repro` again.

So many kills are shared out among the numbers of `--ranks`. It ends with 1 where the result, its
run in MLflow or the files that are left differ from those of a project that nobody has disturbed.
"""

import random
import sys
import time
from pathlib import Path

import psutil

from tests.soak.scene import (
    CONTINUED,
    FOREIGN,
    Attempt,
    arguments,
    at_work,
    differences,
    finish,
    folder,
    make,
    stage_of,
    table,
    weights,
)

VICTIMS = ("dvc", "the stage", "a rank", "all")
# Shares of the kills, in the order in which they come.
PHASES = {"start": 2, "training": 5, "checkpoint": 3, "upload": 2, "evaluation": 3}
MORE = 6  # iterations that an attempt gets further, at most
REPRO = ("dvc", "repro")
# With DVC's commit of the evaluation it would not run again.
EVALUATE = ("dvc", "repro", "--force", "--single-item", "evaluate")


def plan(kills: int, rng: random.Random) -> list[str]:
    """What each kill is to hit: in the training and its states by chance, then what follows."""
    total = sum(PHASES.values())
    counts = {phase: max(1, kills * share // total) for phase, share in PHASES.items()}
    counts["training"] += max(0, kills - sum(counts.values()))
    first = [one for one in ("start", "training", "checkpoint") for _ in range(counts[one])]
    rng.shuffle(first)
    return [*first, *["upload"] * counts["upload"], *["evaluation"] * counts["evaluation"]][:kills]


def wait(attempt: Attempt, phase: str, rng: random.Random) -> None:
    """Until the moment of the kill."""
    pause, goal = 0.0, rng.randint(1, MORE)
    match phase:
        case "start":
            attempt.wait_until(lambda: stage_of(attempt.process)[0])
            pause = rng.uniform(0, 12)
        case "training":
            attempt.wait_until(lambda: len(attempt.iterations()) >= goal)
            pause = rng.uniform(0, 0.1)
        case "checkpoint":
            attempt.wait_until(lambda: len(attempt.iterations()) >= goal)
            attempt.wait_until(attempt.writes_state)
            pause = rng.choice([0, 0, 0.01, 0.03])
        case "upload" if rng.random() < 0.5:
            attempt.wait_until(lambda: attempt.newer("outputs/run.json", "metrics.json"))
            pause = rng.uniform(0, 0.5)
        case "upload":
            attempt.wait_until(lambda: attempt.newer(*artifacts(attempt.project)))
        case "evaluation":
            attempt.wait_until(lambda: "'evaluate'" in attempt.said())
            masks = ("outputs/evaluation/predictions",)
            scored = ("outputs/evaluation/per_image.npz", "outputs/evaluation/scores.json")
            match rng.randrange(4):
                case 0:
                    pause = rng.uniform(0, 5)
                case 1:
                    attempt.wait_until(lambda: attempt.newer(*masks))
                case 2:
                    attempt.wait_until(lambda: attempt.newer(*scored))
                case 3:
                    attempt.wait_until(lambda: attempt.newer("metrics.json"))
                    pause = rng.uniform(0, 0.5)
    deadline = time.monotonic() + pause
    attempt.wait_until(lambda: time.monotonic() >= deadline)


def artifacts(project: Path) -> list[str]:
    """The files that MLflow has of a training's end."""
    return [
        path.relative_to(project).as_posix()
        for path in (project / "mlartifacts").glob("*/artifacts/checkpoints/*")
    ]


def kill(attempt: Attempt, victim: str, rng: random.Random) -> str:
    """Kill it, or what there is in its place; says what and where that was."""
    stage, ranks = stage_of(attempt.process)
    where = stage.cmdline()[-1].removeprefix("stages.") if stage else "dvc"
    match victim:
        case "the stage" if stage:
            hit = [stage]
        case "a rank" if ranks:
            hit = [rng.choice(ranks)]
        case "all":
            hit = at_work(attempt.project)
        case _:
            victim, hit = "dvc", [psutil.Process(attempt.process.pid)]
    for one in hit:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    done = attempt.iterations()
    return f"{victim}, {where}" + (f" {done[-1]}" if done and where == "train" else "")


def main() -> None:
    """Kill as often as asked for, then let it end, and compare."""
    options = arguments(__doc__.partition(":")[0], "kills", 30)
    faults = 0
    with folder(options.keep) as place:
        for number, ranks in enumerate(options.ranks):
            kills = len(range(number, options.number, len(options.ranks)))
            faults += soak(place / f"{ranks}", ranks, kills, random.Random(options.seed + ranks))
    sys.exit(1 if faults else 0)


def soak(place: Path, ranks: int, kills: int, rng: random.Random) -> int:
    """So many kills of a training on so many ranks; the number of faults."""
    begun, iterations = time.monotonic(), 30 + kills * MORE
    whole, project = (make(place / name, ranks, iterations) for name in ("whole", "killed"))
    finish(whole, *REPRO)
    rows: list[list[object]] = []
    faults: list[str] = []
    resumed, restarts, slowest = 0, 0, 0.0
    for number, phase in enumerate(plan(kills, rng), start=1):
        attempt = before_a_kill(project, phase, rng)
        hit = kill(attempt, rng.choice(VICTIMS), rng)
        _, seconds, left = attempt.end()
        continued = [int(found) for found in CONTINUED.findall(attempt.said())]
        rows.append([number, phase, hit, f"{seconds:.1f}", left, *(continued or ["-"])])
        print(*rows[-1], sep="  ", flush=True)
        slowest = max(slowest, seconds)
        if left:
            faults.append(f"kill {number}: {left} processes lived on")
        faults += [f"kill {number}: {line}" for line in foreign(attempt.said())]
        if continued:
            restarts += continued[0] < resumed
            resumed = continued[0]
    said = finish(project, *REPRO)
    faults += [f"the last attempt: {line}" for line in foreign(said)]
    if restarts:
        faults.append(f"{restarts} attempts went back behind the one before")
    faults += differences(project, whole)
    names = ["kill", "at", "killed", "s to the end", "orphans", "continued at"]
    table(f"{kills} kills, {ranks} rank{'s' * (ranks > 1)}", names, rows)
    print(f"weights {weights(project)}, undisturbed {weights(whole)}")
    print(f"longest end {slowest:.1f} s, all {time.monotonic() - begun:.0f} s")
    print("\n".join(f"FAULT: {fault}" for fault in faults) or "no fault", flush=True)
    return len(faults)


def before_a_kill(project: Path, phase: str, rng: random.Random) -> Attempt:
    """An attempt at the moment of its kill; another, where one ends before that."""
    while True:
        lock = project / "dvc.lock"
        evaluated = lock.is_file() and "evaluate:" in lock.read_text()
        again = phase in ("upload", "evaluation") and evaluated
        attempt = Attempt(project, *(EVALUATE if again else REPRO))
        wait(attempt, phase, rng)
        if attempt.process.poll() is None:
            return attempt


def foreign(text: str) -> list[str]:
    """The lines that no screen may show."""
    return [line for line in text.splitlines() if FOREIGN.search(line)]


if __name__ == "__main__":
    main()
