"""The training loop: fetch, forward, loss, backward, step, schedule; then evaluate, save, log."""

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline import distributed
from pipeline.data.loader import RankBatches, Samples, build_loader
from pipeline.data.store import Array, Split, spread
from pipeline.disk import FORMAT
from pipeline.evaluation.inference import Predictor, evaluate, predictions
from pipeline.evaluation.metrics import summarize
from pipeline.params import flatten
from pipeline.training.checkpoint import Best, Description, build_checkpoint, weights_md5
from pipeline.training.optimization import Learner
from pipeline.training.params import TrainParams
from pipeline.training.speed import Stopwatch
from pipeline.training.state import HistoryEntry, Means, Saved, State, Writer

log = logging.getLogger("instep")

HASHED = {10**power for power in range(9)}  # iterations after which the weights' md5 is kept
SHOWN = 3  # images at each validation
Show = Callable[[int, str, list[Array]], None]  # iteration, name, and image, target, prediction
Batch = tuple[Tensor, Tensor, Tensor]  # images, targets, keys: see train_step


class Intervals(NamedTuple):
    """Iterations between two points of the curves, two validations, two saved states."""

    log: int
    validate: int
    save: int


@dataclass
class Progress:
    """All that changes while a training runs, besides the learner's tensors.

    `history` holds the curves, {"iteration": i, "train/loss": ..., ...} in the order of the
    iterations; timings stand under `time/` and are no part of the result. `means` holds what the
    next point of the training curves is the mean of. `hashes` has the md5 of the weights after some
    of the iterations, by which another training is known to be the same.
    """

    iteration: int = 0
    best: Best | None = None
    history: list[HistoryEntry] = field(default_factory=list)
    means: Means = field(default_factory=lambda: Means(since=0, sums={}))
    hashes: dict[str, str] = field(default_factory=dict)


def train(
    learner: Learner,
    progress: Progress,
    *,
    samples: Samples,
    validation: Split,
    predictor: Predictor,
    options: TrainParams,
    intervals: Intervals,
    state: State,
    writer: Writer,
    description: Description,
    track: Callable[[HistoryEntry], None],
    show: Show,
    until: int,
) -> None:
    """Train from progress.iteration to `until`; at the end, leave the last checkpoint in `state`.

    `predictor` measures the learner's network on the split `validation`; `writer` writes the
    checkpoints, and `description` is what they say of themselves. `track` takes each new entry of
    the history and `show`, at each validation, some images with their targets and predictions;
    neither must hold up the loop.
    """
    device, main = learner.device, distributed.rank() == 0
    batches = RankBatches(
        (options.batch_size, options.accumulation),
        (progress.iteration, min(until, options.total)),
        distributed.rank(),
        distributed.world_size(),
    )
    loader = build_loader(samples, batches, options.workers, device.type == "cuda")
    ends = (options.iterations, options.total)
    recent: dict[str, Tensor] = {}
    watch = Stopwatch(device, options.batch_size)
    quiet = not (main and sys.stderr.isatty())
    bar = tqdm(total=options.total, initial=progress.iteration, desc="train", disable=quiet)
    learner.model.train()
    for batch in loader:
        watch.fetched()
        learner.network.advance(progress.iteration / options.horizon(progress.iteration))
        lr = learner.set_learning_rate(options, progress.iteration)
        for name, term in train_step(learner, batch, options.accumulation).items():
            recent[name] = recent.get(name, 0) + term
        progress.iteration += 1
        bar.update()

        ended = progress.iteration in ends
        logged = ended or progress.iteration % intervals.log == 0
        validated = options.validation and (ended or progress.iteration % intervals.validate == 0)
        saved = ended or validated or progress.iteration % intervals.save == 0
        entry: HistoryEntry = {"iteration": progress.iteration}
        if logged or saved:
            collect_terms(progress.means, recent)
        if logged:
            entry |= mean_terms(progress) | {"train/lr": lr} | watch.read()
            bar.set_postfix_str(summary_line(entry, ", "))
        improved = False
        if validated:
            watch.pause()
            scores = validate(predictor, validation, description)
            if main:
                show_some(predictor, validation, progress.iteration, show)
            learner.model.train()
            watch.go_on()
            entry |= scores
            improved = progress.best is None or scores["val/mean_iou"] > progress.best["mean_iou"]
            if improved:
                progress.best = Best(iteration=progress.iteration, mean_iou=scores["val/mean_iou"])
            assert progress.best is not None
            entry |= {f"val/best_{name}": value for name, value in progress.best.items()}
        if (logged or validated) and main:
            progress.history.append(entry)
            track(entry)
            log.info("%s", summary_line(entry, "  "))
        if main and (progress.iteration in HASHED or progress.iteration == until or ended):
            progress.hashes[str(progress.iteration)] = weights_md5(learner.network)
        if saved and main:
            save_progress(learner, progress, state, description, writer=writer, improved=improved)
        watch.waiting()
    if main and options.total == 0:  # the weights as they were loaded
        save_progress(learner, progress, state, description, writer=writer, improved=False)
    writer.wait()
    bar.close()


def train_step(learner: Learner, batch: Batch, accumulation: int) -> dict[str, Tensor]:
    """One optimizer step on this rank's share of the batch; returns its share of each loss term.

    The batch is images (n,h,w,3) uint8, targets (n,h,w) uint8, keys (n,) int64: the microbatches,
    `accumulation` of them, one after another. The terms are fp64 scalars on the device.
    """
    network, device = learner.network, learner.device
    images, targets, keys = (part.to(device, non_blocking=True) for part in batch)
    divisors = distributed.sum_over_ranks(network.count(targets))
    divisors += divisors == 0  # nothing to learn from: a loss of 0 / 1
    terms: dict[str, Tensor] = {}
    parts = zip(*(part.chunk(accumulation) for part in (images, targets, keys)))
    for number, (image, target, key) in enumerate(parts, start=1):
        last = number == accumulation
        with nullcontext() if last else distributed.accumulating(learner.model):
            inputs = learner.normalize(image)
            with learner.precision.autocast(device):
                outputs = learner.model(inputs, key)
            losses = network.losses(outputs, target, key, divisors)
            torch.autograd.backward(learner.scaler.scale(torch.stack([*losses.values()]).sum()))
        for name, loss in losses.items():
            terms[name] = terms.get(name, 0) + loss.detach()
    learner.step()
    return terms


def collect_terms(means: Means, recent: dict[str, Tensor]) -> None:
    """Move the sums of recent steps, of all ranks, into `means`.

    Before every saved state, too: so that the order of the additions, and with it the last bit of a
    mean, does not tell whether a training was interrupted there.
    """
    totals = distributed.sum_over_ranks(torch.stack([*recent.values()])).tolist()
    for name, total in zip(recent, totals, strict=True):
        means["sums"][name] = means["sums"].get(name, 0.0) + total
    recent.clear()


def mean_terms(progress: Progress) -> HistoryEntry:
    """The mean of each term of the loss since the last point, and of their sum; starts anew."""
    steps = progress.iteration - progress.means["since"]
    terms = {name: total / steps for name, total in progress.means["sums"].items()}
    progress.means = Means(since=progress.iteration, sums={})
    named = {f"train/loss/{name}": value for name, value in terms.items()}
    return {"train/loss": sum(terms.values())} | named


def validate(predictor: Predictor, split: Split, labels: Description) -> HistoryEntry:
    """The scores on a split, for the history."""
    classes, ignore_index = labels["classes"], labels["ignore_index"]
    confusion = evaluate(predictor, split, len(classes), ignore_index)
    scores = flatten(summarize(confusion, classes))
    return {f"val/{name}": value for name, value in scores.items()}


def show_some(predictor: Predictor, split: Split, iteration: int, show: Show) -> None:
    """Show the same images of a split at every validation of every training."""
    indices = spread(len(split), SHOWN).tolist()
    for index, target, prediction in predictions(predictor, split, indices):
        image, _ = split[index]
        show(iteration, split.entries[index].name, [image, target, prediction])


def save_progress(
    learner: Learner,
    progress: Progress,
    state: State,
    description: Description,
    *,
    writer: Writer,
    improved: bool,
) -> None:
    """Save what a killed training goes on from, and the best checkpoint where this is it.

    A copy is made at once, of which there is one at a time, and written while the training goes on.
    """
    writer.wait()
    checkpoint = build_checkpoint(learner.states(), progress.iteration, progress.best, description)
    history, means = [*progress.history], deepcopy(progress.means)
    saved = Saved(
        format=FORMAT,
        checkpoint=checkpoint,
        history=history,
        means=means,
        hashes={**progress.hashes},
    )

    def write() -> None:
        if improved:
            state.save_best(checkpoint)
        state.save(saved)

    writer.start(write)


def summary_line(entry: HistoryEntry, separator: str) -> str:
    """The entry for a reader: without the terms of the loss and the scores of single classes."""
    texts = []
    for name, value in entry.items():
        short = name.partition("/")[2] or name
        if value is not None and "." not in short and "/" not in short:
            texts.append(f"{short} {value}" if isinstance(value, int) else f"{short} {value:.5g}")
    return separator.join(texts)
