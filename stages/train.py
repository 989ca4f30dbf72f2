"""Stage 2: the prepared data set -> a trained model, on one process or, by torchrun, on more."""

import json
import logging
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from pipeline import distributed
from pipeline.data.store import PREPARED, Store
from pipeline.data.transforms import DTYPES
from pipeline.models import build_model
from pipeline.params import ModelParams, Params, flatten, load_params, plain
from pipeline.tracking import Tracker, dvc_tags, git_tags, open_training_run, tracked
from pipeline.training.checkpoint import fill, load_checkpoint, load_weights
from pipeline.training.loop import Progress, train
from pipeline.training.optimization import Learner, build_learner
from pipeline.training.state import State, start_file, train_fingerprint

log = logging.getLogger("instep")


def main() -> None:
    """Check the parameters, then train here or hand over to torchrun."""
    params = load_params()
    store = Store(PREPARED)
    if params.train.validation:
        store.require("val", "train.validate: true", "use train.validate: false, or give it some")
    store.require_measured(params.evaluation.split)  # before the training, not after it
    for given in (params.train.load_from, params.train.resume_from):
        if given:
            start_file(given, params)
    distributed.check_devices(params.train.device, params.train.gpus)
    if not distributed.hand_over("stages.train", params.train.device, params.train.gpus):
        with distributed.process_group(params.train.device) as device:
            run(params, device)


def run(params: Params, device: torch.device) -> None:
    """Train from where this very training was left, or else from what the parameters name."""
    options, first = params.train, distributed.rank() == 0
    store = Store(PREPARED)
    state = State(train_fingerprint(params, store.md5))

    with state.locked() if first else nullcontext():
        distributed.barrier()
        if first:
            open_log(Path(options.work_dir), state)
        else:
            log.setLevel(logging.ERROR)  # the first process says it for all
        distributed.seed_everything(options.seed, options.deterministic)
        model = build_model(first_weights(params, state.exists), len(store.classes))
        model.to(device, DTYPES[options.precision]).to(memory_format=torch.channels_last)
        learner = build_learner(model, options, device)
        progress = resume(params, store, state, learner)
        tracker = open_run(params, store, state, progress) if first else Tracker()
        with tracked(tracker):
            train(params, store, learner, progress, device, state, tracker.log)
            if first:
                write_outputs(Path(options.work_dir), state, tracker)


def first_weights(params: Params, saved: bool) -> ModelParams:
    """The `model` section, without pretrained weights that a checkpoint would replace at once."""
    options, section = params.train, params.model
    if saved or options.resume_from or (options.load_from and options.load_strict):
        backbone = section.backbone.model_copy(update={"pretrained": None})
        return section.model_copy(update={"backbone": backbone})
    return section


def resume(params: Params, store: Store, state: State, learner: Learner) -> Progress:
    """Fill the learner from where the training starts."""
    options, model, saved = params.train, learner.model, state.load()
    if saved is not None:
        checkpoint, history = saved
        fill(model, checkpoint["model"], "the saved state")
    elif options.resume_from:
        path = start_file(options.resume_from, params)
        checkpoint, history = load_checkpoint(path), []
        fill(model, checkpoint["model"], str(path))
        trained = checkpoint["params"]["train"]["optimizer"]
        if trained != options.optimizer:
            raise ValueError(
                f"train.resume_from: {path} was trained by {trained}, not {options.optimizer}; "
                "set train.optimizer to it, or take the weights alone by train.load_from"
            )
        if checkpoint["iteration"] >= options.iterations:
            raise ValueError(
                f"train.resume_from: {path} has done {checkpoint['iteration']} iterations; "
                f"train.iterations {options.iterations} must be more"
            )
    else:
        if options.load_from:
            path = start_file(options.load_from, params)
            load_weights(model, path, options.load_strict, store.classes)
        return Progress()
    learner.restore(checkpoint)
    log.info("continuing at iteration %d", checkpoint["iteration"])
    best = checkpoint["best"] if saved else None  # resume_from: the best lies in another run
    return Progress(checkpoint["iteration"], best, history)


def open_log(work_dir: Path, state: State) -> None:
    """Log to the screen and to work_dir/train.log, which goes on where a kill ended it."""
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "train.log"
    if state.log.is_file():
        shutil.copyfile(state.log, path)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    for copy in (path, state.log):
        log.addHandler(logging.FileHandler(copy, encoding="utf-8"))
        log.handlers[-1].setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
    log.setLevel(logging.INFO)


def open_run(params: Params, store: Store, state: State, progress: Progress) -> Tracker:
    """The MLflow run of this training: told once, and continued after a kill."""
    world_size = distributed.world_size()
    tags = {
        "fingerprint": state.fingerprint,
        "data.md5": store.md5,
        "world_size": str(world_size),
        "mlflow.note.content": f"{params.model.name} on {store.name}, {world_size} process(es)",
        **git_tags(),
        **dvc_tags(),
    }
    name = tags.get("dvc.exp_name", f"{params.model.name}-{state.fingerprint[:8]}")
    sections = plain(params)
    parameters = {part: sections[part] for part in ("data", "augmentation", "model", "train")}
    dataset = (store.name, store.md5, str(PREPARED))
    if progress.iteration == params.train.iterations:
        del tags["world_size"]  # of the processes that trained it, which these are not
    tracker = open_training_run(
        params.tracking, state.run_id, state.remember_run, name, flatten(parameters), tags, dataset
    )
    for entry in progress.history:
        tracker.log(entry)
    return tracker


def write_outputs(work_dir: Path, state: State, tracker: Tracker) -> None:
    """Hand DVC the checkpoints, the curves and the run's identity; MLflow gets the same files."""
    state.write_outputs(work_dir)
    run_id = tracker.run_id or state.run_id  # which an attempt may have opened before this one
    identity = {"run_id": run_id, "fingerprint": state.fingerprint}
    (work_dir / "run.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    tracker.log_artifacts(sorted((work_dir / "checkpoints").iterdir()), "checkpoints")
    tracker.log_artifacts([work_dir / "train.log"], "")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
