"""Stage 2: the prepared data set -> a trained model, on one process or, by torchrun, on more."""

import argparse
import logging
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline import distributed
from pipeline.data.loader import Samples
from pipeline.data.order import (
    NEAR,
    WINDOW,
    BlockOrder,
    ClassOrder,
    FullOrder,
    Order,
    rare_class_shares,
)
from pipeline.data.store import PREPARED, Store
from pipeline.data.transforms import fill_of
from pipeline.disk import FORMAT, MODEL, write_json
from pipeline.errors import InputError
from pipeline.evaluation.inference import Predictor
from pipeline.experiment import Params, load_params
from pipeline.interruption import finishing, remember_said
from pipeline.launchers.slurm import run_as_job
from pipeline.launchers.torchrun import hand_over
from pipeline.models import ModelParams, build_model
from pipeline.models.network import Labels, Network
from pipeline.models.weights import averaged
from pipeline.params import flatten, plain
from pipeline.precision import PRECISIONS, Normalization
from pipeline.prediction.calibration import fit_temperature
from pipeline.provenance import PARAMS, Identity, changed_params, dvc_tags, git_tags, run_name
from pipeline.tracking.tracker import Tracker, open_training_run, tracked
from pipeline.training.checkpoint import (
    Best,
    Checkpoint,
    Description,
    fill,
    load_checkpoint,
    load_weights,
    save_model,
)
from pipeline.training.loop import Intervals, Progress, Training
from pipeline.training.optimization import Learner, build_average, build_learner
from pipeline.training.params import TrainParams
from pipeline.training.state import (
    LogFile,
    Packed,
    Saved,
    State,
    Writer,
    result_params,
    start_files,
    train_fingerprint,
    training_code,
)
from stages import at_least_1, keep_freed_memory, run_main

log = logging.getLogger("instep")

ITERATIONS_AHEAD = 16  # at which a shard is asked for that an object store has


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the parameters, then train here or hand over to torchrun.

    `arguments` are those of the command line, which are taken from there by default.
    """
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m stages.train", description=__doc__)
    parser.add_argument(
        "--until",
        type=at_least_1,
        metavar="K",
        help="only train the first K iterations, and print the md5 of the weights after 1, 10, ... "
        "and K of them: nothing is tracked, and no output written",
    )
    until: int | None = parser.parse_args(given).until
    distributed.die_with_parent()
    keep_freed_memory()
    params = load_params()
    store = Store(PREPARED)
    if params.train.validation:
        store.require("val", "train.validate: true", "use train.validate: false, or give it some")
    store.require_measured(params.evaluation.split)  # before the training, not after it
    start_files(params.train)
    if job := params.launcher.job("train"):
        run_as_job("stages.train", given, job, moved=partial(saved_at, params, store))
        return
    distributed.check_devices(params.train.device, params.train.gpus)
    if not hand_over(
        "stages.train",
        params.train.gpus,
        given,
        meeting=params.launcher.meeting(),
        patience=params.train.timeout,
    ):
        with distributed.process_group(params.train.device, params.train.timeout) as device:
            run(params, store, device, until)


def run(params: Params, store: Store, device: torch.device, until: int | None) -> None:
    """Train from where this very training was left, or else from what the parameters name."""
    options, first = params.train, distributed.rank() == 0
    verification = store.verification(*(("train", "val") if first else ()), alive=distributed.alive)
    code = training_code(result_of(params), options)
    state = state_of(params, store, code)
    check_alike(state)
    order, ahead = order_of(options, store, params.launcher.machines)  # may refuse: before the run

    with state.locked() if first else nullcontext():
        if first:
            open_log(Path(options.work_dir), state)
            begin_extension(params, store, state, code)
        else:
            log.setLevel(logging.ERROR)  # the first process says it for all
        log.info("%s", distributed.described(device))
        for doubt in options.doubts:
            log.warning("%s", doubt)
        distributed.barrier()
        distributed.seed_everything(options.seed, options.deterministic)
        checkpoint, progress = starting_point(params, state)
        learner = build(params, store, checkpoint, device)
        del checkpoint  # which each process has read whole
        proper = first and until is None
        tracker = open_run(params, store, state, progress) if proper else Tracker()
        # Lines that are logged appear above the progress bar.
        above = logging_redirect_tqdm([log]) if sys.stderr.isatty() else nullcontext()
        with (
            finishing(partial(end_late, tracker)) as interruption,
            tracked(tracker),
            Writer() as writer,
            above,
        ):
            verification.finish()
            distributed.when_lost(partial(tracker.finish, "KILLED", "another process hung"))
            Training(
                learner,
                progress,
                samples=Samples(
                    store.split("train"),
                    augmentation=params.augmentation,
                    fill=fill_of(params.model.mean),
                    ignore_index=store.ignore_index,
                    seed=options.seed,
                    order=order,
                    ahead=ahead,
                ),
                validation=store.split("val"),
                predictor=predictor_of(params, learner),
                options=options,
                intervals=Intervals(
                    log=params.tracking.log_interval,
                    validate=params.evaluation.interval,
                    save=options.checkpoint.interval,
                ),
                state=state,
                writer=writer,
                description=describe(params, store),
                track=tracker.log,
                show=partial(tracker.log_picture, colours=store.colours),
                until=options.total if until is None else until,
                interruption=interruption,
            ).run()
            if first and until is not None:
                for iteration, md5 in progress.hashes.items():
                    print(f"weights after {iteration} iterations: {md5}")
            if proper:
                with interruption.immediate():
                    state.write_outputs(Path(options.work_dir))
                    write_model(params, store, learner)
                    record_outputs(
                        params,
                        state,
                        tracker,
                        code=code,
                        hashes=progress.hashes,
                        machine=distributed.machine(device) | {"parallel": options.parallel},
                    )
            if until is None and params.launcher.machines > 1:
                distributed.at("the outputs, which every machine gets")
                distributed.share_files(outputs_in(Path(options.work_dir)) if first else [])


def outputs_in(work_dir: Path) -> list[Path]:
    """The files that DVC takes over."""
    names = ("run.json", "train.log", "train.tsv", "val.tsv")
    return [*sorted((work_dir / "checkpoints").iterdir()), *(work_dir / name for name in names)]


def order_of(options: TrainParams, store: Store, machines: int) -> tuple[Order, int]:
    """The order of the samples, and how many numbers before its turn a shard is asked for.

    Raises:
        InputError: the order needs more shards at a time than this machine has room for.
    """
    split, size = store.split("train"), options.batch_size
    if options.shuffle == "blocks":
        sizes = split.entries.shard_sizes()
        near = NEAR * size // machines
        store.require_room("train", near, f"train.batch_size: {size}", " or lower train.batch_size")
        return BlockOrder(sizes, size, options.seed), 0 if store.is_local else WINDOW * size
    store.require_room("train", None, "train.shuffle: full", " or use train.shuffle: blocks")
    ahead = 0 if store.is_local else ITERATIONS_AHEAD * size
    if options.rare_class_temperature is None:
        return FullOrder(len(split), options.seed), ahead
    shares = rare_class_shares(store.pixels, options.rare_class_temperature)
    holders = [split.entries.holding(one) for one in range(len(shares))]
    return ClassOrder(holders, shares, options.seed), ahead


def end_late(tracker: Tracker, asked: signal.Signals) -> None:
    """A signal has come, and the step or what it waits for has not ended in time."""
    said = f"ended by {asked.name}, in the middle of what takes too long"
    log.warning("%s; the same command goes on from the last checkpoint", said)
    remember_said()
    tracker.finish("KILLED", said)


def saved_at(params: Params, store: Store) -> int | None:
    """When the state of this training was last saved, in nanoseconds."""
    return state_of(params, store, training_code(result_of(params), params.train)).saved_at


def result_of(params: Params) -> dict[str, Any]:
    """The parameters that change the result of the training, as checkpoints hold them."""
    return result_params(
        augmentation=params.augmentation,
        model=params.model,
        train=params.train,
        evaluation=params.evaluation,
    )


def state_of(params: Params, store: Store, code: str) -> State:
    """The state of the training that the parameters, the data and the code describe."""
    return State(train_fingerprint(result_of(params), store.md5, code))


def begin_extension(params: Params, store: Store, state: State, code: str) -> None:
    """Begin an extension where the training that it extends ended, if that is still there."""
    options = params.train
    if not options.extend or state.exists:
        return
    shorter = options.model_copy(update={"extend": 0})
    other = state_of(params.model_copy(update={"train": shorter}), store, code)
    if not state.start_from(other, describe(params, store)):
        log.info(
            "the training of %d iterations that train.extend goes on from is not the last one "
            "that was finished here: all %d iterations are trained",
            options.iterations,
            options.total,
        )


def starting_point(params: Params, state: State) -> tuple[Checkpoint | None, Progress]:
    """The checkpoint that the training goes on from, if there is one, and how far it was."""
    options = params.train
    if saved := newest(state):
        checkpoint = saved["checkpoint"]
        progress = Progress(
            checkpoint["iteration"],
            checkpoint["best"],
            history=saved["history"],
            means=saved["means"],
            hashes=saved["hashes"],
            left_out=saved["left_out"],
            unmeasured=saved["unmeasured"],
        )
    elif options.resume_from:
        path, *best = start_files(options)
        checkpoint = load_checkpoint(path)
        trained = checkpoint["params"].get("train", {}).get("optimizer")
        if trained != options.optimizer:
            raise InputError(
                f"train.resume_from: {path} was trained by {trained}, not {options.optimizer}; "
                "set train.optimizer to it, or take the weights alone by train.load_from"
            )
        if checkpoint["iteration"] >= options.total:
            raise InputError(
                f"train.resume_from: {path} has done {checkpoint['iteration']} iterations; "
                f"train.iterations + train.extend, {options.total}, must be more"
            )
        progress = Progress(checkpoint["iteration"])
        if best and options.validation:
            progress.best = adopt_best(best[0], checkpoint, state)
    else:
        return None, Progress()
    log.info("continuing at iteration %d", checkpoint["iteration"])
    return checkpoint, progress


def check_alike(state: State) -> None:
    """Refuse machines that would not train the same.

    Raises:
        InputError: the parameters, the data or the code of one of them differ from the first's.
    """
    told = distributed.gather_objects((socket.gethostname(), state.fingerprint))
    for number, (host, fingerprint) in enumerate(told):
        if fingerprint != told[0][1]:
            raise InputError(
                f"rank {number} on {host} would do another training than rank 0 on {told[0][0]}: "
                "params.yaml, data/prepared or the code differ; check out the same revision on "
                "both, and run `dvc repro prepare` there"
            )


def newest(state: State) -> Saved | None:
    """What the training goes on from, if there is something: the newest that any machine has.

    The first rank's machine has it from now on.
    """
    saved = state.load() if state.exists and not state.finished else None
    iterations = distributed.gather_objects(saved["checkpoint"]["iteration"] if saved else -1)
    last = max(iterations)
    if min(iterations) == last:
        return saved
    source = iterations.index(last)
    mine = state.packed(saved) if saved and distributed.rank() == source else None
    packed: Packed = distributed.broadcast_object(mine, source)
    if distributed.rank() == 0 and source != 0:
        state.adopt(packed)
    return packed.saved


def adopt_best(path: Path, checkpoint: Checkpoint, state: State) -> Best | None:
    """The best score so far, if the file beside the checkpoint holds the weights that had it."""
    best = load_checkpoint(path)
    if best["best"] is None or best["best"] != checkpoint["best"]:
        return None
    if distributed.rank() == 0:
        state.save_best(best)
    return best["best"]


def build(
    params: Params, store: Store, checkpoint: Checkpoint | None, device: torch.device
) -> Learner:
    """The network, from where it starts, in parallel with the other processes', and its learner."""
    options, section = params.train, params.model
    if checkpoint is not None or (options.load_from and options.load_strict):
        section = without_pretrained(section)  # it would be replaced at once
    precision = PRECISIONS[options.precision]
    network = build_network(params, section, store)
    if checkpoint is not None:  # by now the weights have its type: none of its digits is lost
        fill(network, checkpoint["model"], "the checkpoint to go on from")
    elif options.load_from:
        (path,) = start_files(options)
        load_weights(network, path, options.load_strict, store.classes)
    average = build_average(network, options.ema_decay)
    model = distributed.parallelize(
        network,
        device,
        sharded=options.parallel == "fsdp",
        copies=[] if average is None else [average.module],
    )
    normalize = Normalization(section.mean, section.std, precision=precision, device=device)
    learner = build_learner(model, network, average=average, normalize=normalize, params=options)
    if checkpoint is not None:
        learner.restore(checkpoint, distributed.placed)
    return learner


def build_network(params: Params, section: ModelParams, store: Store) -> Network:
    """The network of the section `model`, on the CPU, of the type that it trains in."""
    labels = Labels(len(store.classes), store.ignore_index, store.frequency)
    network = build_model(section, labels).to(PRECISIONS[params.train.precision].weights)
    return network.to(memory_format=torch.channels_last)


def without_pretrained(section: ModelParams) -> ModelParams:
    """The section `model` with a backbone that looks for no weights."""
    backbone = section.backbone.model_copy(update={"pretrained": None})
    return section.model_copy(update={"backbone": backbone})


def describe(params: Params, store: Store) -> Description:
    """What the checkpoints say of themselves."""
    return Description(
        classes=store.classes,
        palette=store.palette,
        ignore_index=store.ignore_index,
        exif=store.exif,
        frequency=store.frequency,
        params=result_of(params),
    )


def open_log(work_dir: Path, state: State) -> None:
    """Log to the screen and to work_dir/train.log, which goes on where a kill ended it."""
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "train.log"
    if state.log.is_file():
        shutil.copyfile(state.log, path)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    for copy in (path, state.log):
        log.addHandler(LogFile(copy, encoding="utf-8"))
        log.handlers[-1].setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
    log.setLevel(logging.INFO)


def open_run(params: Params, store: Store, state: State, progress: Progress) -> Tracker:
    """The MLflow run of this training: told once, and continued after a kill."""
    world_size = distributed.world_size()
    tags = {
        "fingerprint": state.fingerprint,
        "data.md5": store.md5,
        "world_size": str(world_size),
        "mlflow.note.content": f"{params.model.head.name} on {params.model.backbone.name}, trained "
        f"on {len(store.split('train'))} images of {store.name}; not evaluated yet",
        **git_tags(),
        **dvc_tags(),
    }
    sections = plain(params)
    own = tags.get("dvc.exp_name", state.fingerprint[:8])
    name = run_name(params.model.head.name, changed_params(sections), own)
    parameters = {part: sections[part] for part in ("data", "augmentation", "model", "train")}
    if progress.iteration == params.train.total:
        del tags["world_size"]  # of the processes that trained it, which these are not
    tracker = open_training_run(
        params.tracking,
        state.run_key,
        state.remember_run,
        name=name,
        parameters=flatten(parameters),
        tags=tags,
        dataset=(store.name, store.md5, str(PREPARED)),
    )
    for entry in progress.history:
        tracker.log(entry)
    return tracker


def write_model(params: Params, store: Store, learner: Learner) -> None:
    """Write what predictions need as one file: the weights that are measured, their description.

    They are calibrated by val, where the training was validated on it.
    """
    folder = Path(params.train.work_dir) / "checkpoints"
    best, last = folder / "best.pt", folder / "last.pt"
    checkpoint = load_checkpoint(best if best.is_file() else last)
    temperature = None
    if params.train.validation:
        # The network that has trained may be sharded, and the other processes are done.
        network = build_network(params, without_pretrained(params.model), store)
        fill(network, averaged(dict(checkpoint)), "the best checkpoint")
        predictor = replace(predictor_of(params, learner), network=network.to(learner.device))
        found = fit_temperature(predictor, store.split("val"), store.ignore_index)
        if found:
            temperature, before, after = found
            log.info(
                "calibrated on val by the temperature %g: the mean negative log-likelihood of a "
                "label goes from %.4f to %.4f",
                temperature,
                before,
                after,
            )
    save_model(checkpoint, temperature, folder / MODEL)


def predictor_of(params: Params, learner: Learner) -> Predictor:
    """What measures the network that is trained, as `evaluation` has it, in one view."""
    return Predictor(
        learner.measured(),
        learner.normalize,
        precision=learner.precision,
        scale=params.augmentation.scale,
        window=params.evaluation.window,
        batch_size=params.evaluation.batch_size,
    )


def record_outputs(
    params: Params,
    state: State,
    tracker: Tracker,
    *,
    code: str,
    hashes: dict[str, str],
    machine: dict[str, Any],
) -> None:
    """Write the run's identity; MLflow gets it with the log, params.yaml and mostly the model."""
    work_dir = Path(params.train.work_dir)
    identity = Identity(
        format=FORMAT,
        run_id=tracker.run_id,
        run_key=tracker.key or state.run_key,  # an attempt may have opened it before this one
        fingerprint=state.fingerprint,
        code=code,
        weights=hashes,
        machine=machine,
    )
    write_json(work_dir / "run.json", identity)
    if params.tracking.log_model:
        tracker.log_artifacts([work_dir / "checkpoints" / MODEL], "checkpoints")
    tracker.log_artifacts([work_dir / "train.log", work_dir / "run.json", Path(PARAMS)], "")


if __name__ == "__main__":
    run_main(main)
