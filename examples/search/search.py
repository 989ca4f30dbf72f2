"""A search for parameters: Optuna's TPE sampler proposes them, `dvc exp run` trains. See README.md.

What is known of a trial is read from DVC's experiments alone, so that the same command goes on with
a search that was ended.
"""

import argparse
import json
import subprocess
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

# What is searched: keys of params.yaml that stand there, each with its values.
SPACE: dict[str, BaseDistribution] = {
    "train.lr": FloatDistribution(3e-4, 3e-2, log=True),
    "train.weight_decay": FloatDistribution(1e-3, 1e-1, log=True),
    "train.ema_decay": CategoricalDistribution([None, 0.99]),
    "augmentation.photometric": CategoricalDistribution([False, True]),
}


def main() -> None:
    """Obey the command line."""
    parser = argparse.ArgumentParser(description="Search with Optuna for what val scores best.")
    parser.add_argument("--trials", type=int, default=20, help="in all; %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="at once; %(default)s")
    parser.add_argument("--name", default="search", help="tracking.experiment; %(default)s")
    options = parser.parse_args()
    dvc("exp", "run", "--run-all")  # what a search that was ended has left in the queue
    done = finished(options.name)
    while len(done) < options.trials:
        queue(done, count=min(options.jobs, options.trials - len(done)), name=options.name)
        dvc("exp", "run", "--run-all", "--jobs", str(options.jobs))
        before, done = done, finished(options.name)
        if len(done) == len(before):
            raise SystemExit("no trial was finished: see `dvc queue status` and `dvc queue logs`")
    name, best = max(done.items(), key=lambda trial: trial[1].value)
    print(f"{name}: mean IoU {best.value:.4f} on val, of {len(done)} trials, by {best.params}")
    print(f"measured on test by: dvc exp apply {name}; dvc exp run -S evaluation.split=test")


def queue(done: dict[str, optuna.trial.FrozenTrial], *, count: int, name: str) -> None:
    """Tell a sampler of all that is finished, and queue so many of its proposals."""
    sampler = optuna.samplers.TPESampler(seed=len(done), n_startup_trials=5, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    study.add_trials(list(done.values()))
    for _ in range(count):
        proposed = study.ask(SPACE).params | {
            "evaluation.split": "val",
            "tracking.experiment": name,
        }
        values = [f"{key}={json.dumps(value)}" for key, value in proposed.items()]
        dvc("exp", "run", "--queue", *(word for value in values for word in ("-S", value)))


def finished(name: str) -> dict[str, optuna.trial.FrozenTrial]:
    """The trials of this commit, by the names of their experiments."""
    trials = {}
    for commit in json.loads(dvc("exp", "show", "--json")):
        for experiment in commit["experiments"] or []:
            data = experiment["revs"][0]["data"] or {}
            params = content(data, "params", "params.yaml")
            score = content(data, "metrics", "metrics.json").get("mean_iou")
            ours = value_of(params, "tracking.experiment") == name
            if ours and score is not None and value_of(params, "evaluation.split") == "val":
                trials[experiment["name"]] = optuna.trial.create_trial(
                    params={key: value_of(params, key) for key in SPACE},
                    distributions=SPACE,
                    value=score,
                )
    return trials


def content(data: dict[str, Any], kind: str, path: str) -> dict[str, Any]:
    """What DVC has read from a file, nothing where the experiment has not run yet."""
    return (data.get(kind) or {}).get(path, {}).get("data") or {}


def value_of(params: dict[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        params = params[part]
    return params


def dvc(*arguments: str) -> str:
    """What a command of DVC prints; it ends the search if it fails."""
    done = subprocess.run(["dvc", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"dvc {' '.join(arguments)} has failed:\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
