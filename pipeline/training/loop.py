"""The training loop: fetch, forward, loss, backward, step, schedule; then evaluate, save, log."""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline import distributed
from pipeline.data.loader import Batch, RankBatches, Samples, arriving, build_loader
from pipeline.data.store import Split, spread
from pipeline.data.table import Array
from pipeline.disk import FORMAT
from pipeline.errors import InputError, Interrupted, one_line
from pipeline.evaluation.inference import Predictor, evaluate, predictions
from pipeline.evaluation.metrics import HistoryEntry, summarize
from pipeline.interruption import Interruption, remember_said, unheard_by_children
from pipeline.monitor import FIRST
from pipeline.params import flatten
from pipeline.training.checkpoint import Best, Description, build_checkpoint, weights_md5
from pipeline.training.optimization import Learner, learning_rate
from pipeline.training.params import TrainParams
from pipeline.training.reports import Reports
from pipeline.training.speed import Stopwatch
from pipeline.training.state import Means, Saved, State, Writer

log = logging.getLogger("instep")

HASHED = {10**power for power in range(9)}  # iterations after which the weights' md5 is kept
SHOWN = 3  # images at each validation
Show = Callable[[int, str, list[Array]], None]  # iteration, name, and image, target, prediction


class Intervals(NamedTuple):
    """Iterations between two points of the curves, two validations, two saved states."""

    log: int
    validate: int
    save: int


class Step(NamedTuple):
    """What a step has found on this rank: its share of each term, fp64 () on the device.

    `finite`, boolean (): the loss is, and so is the gradient of all ranks.
    """

    terms: dict[str, Tensor]
    finite: Tensor


@dataclass
class Progress:
    """All that changes while a training runs, besides the learner's tensors.

    `history` holds the curves, {"iteration": i, "train/loss": ..., ...} in the order of the
    iterations; timings stand under `time/` and are no part of the result. `means` holds what the
    next point of the training curves is the mean of. `hashes` has the md5 of the weights after some
    of the iterations, by which another training is known to be the same. `left_out` counts steps
    whose loss or gradient was not finite. `unmeasured`: the validation that this iteration ends
    with was interrupted.
    """

    iteration: int = 0
    best: Best | None = None
    history: list[HistoryEntry] = field(default_factory=list)
    means: Means = field(default_factory=lambda: Means(steps=0, sums={}))
    hashes: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    unmeasured: bool = False


@dataclass
class Training:
    """A training under way, from progress.iteration to `until`.

    `predictor` measures the learner's network on the split `validation`; `writer` writes the
    checkpoints, and `description` is what they say of themselves. `track` takes each new entry of
    the history and `show`, at each validation, some images with their targets and predictions;
    neither must hold up the loop. `interruption` says when to end before its time.
    """

    learner: Learner
    progress: Progress
    samples: Samples
    validation: Split
    predictor: Predictor
    options: TrainParams
    intervals: Intervals
    state: State
    writer: Writer
    description: Description
    track: Callable[[HistoryEntry], None]
    show: Show
    until: int
    interruption: Interruption

    def __post_init__(self) -> None:
        self._first = distributed.rank() == 0
        self._reports = Reports()
        self._asked = False  # to end, as all ranks know
        self._watch = Stopwatch(self.learner.device, self.options.batch_size)
        self._begin = self.progress.iteration
        total, quiet = self.options.total, not (self._first and sys.stderr.isatty())
        self._bar = tqdm(total=total, initial=self._begin, desc="train", disable=quiet)

    def run(self) -> None:
        """Train, and leave the last checkpoint in `state`.

        Raises:
            InputError: the loss or the gradient was not finite, the device has too little memory
                for a step, or a process that loads batches has ended.
            Interrupted: a signal has come; the state is that after the last iteration.
        """
        options, progress, until = self.options, self.progress, self.until
        self.learner.model.train()
        if progress.unmeasured:
            self.learner.set_learning_rate(options, progress.iteration - 1)  # as it was then
            self._conclude()
        if stopped_early(progress.history, options):  # by an attempt that was ended just then
            until = progress.iteration
        batches = RankBatches(
            (options.batch_size, options.accumulation),
            (progress.iteration, min(until, options.total)),
            distributed.rank(),
            distributed.world_size(),
        )
        try:
            self._train(batches)
        except RuntimeError as error:  # torch raises it from a handler of signals: anywhere
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise InputError(
                f"a process that loads batches has ended ({one_line(error)}): where the system has "
                "ended it, memory or /dev/shm was too small; set train.workers to less"
            ) from None
        if options.total == 0:  # the weights as they were loaded
            self._save(improved=False)
        self.writer.wait()
        self._bar.close()

    def _train(self, batches: RankBatches) -> None:
        pinned = self.learner.device.type == "cuda"
        loader = build_loader(self.samples, batches, self.options.workers, pinned)
        with unheard_by_children():  # who loads goes on, so that a step may be finished
            loaded = arriving(iter(loader))
        for batch in loaded:
            self._watch.fetched()
            self._iterate(batch)
            if self._conclude():
                break
            self._watch.waiting()
            distributed.at(f"loading the batch of iteration {self.progress.iteration + 1}")

    def _iterate(self, batch: Batch) -> None:
        """One step, and what all ranks have to say of the steps so far."""
        learner, options, progress = self.learner, self.options, self.progress
        cold = FIRST if progress.iteration == self._begin else 0.0
        distributed.at(f"iteration {progress.iteration + 1}", cold)
        learner.network.advance(progress.iteration / options.horizon(progress.iteration))
        learner.set_learning_rate(options, progress.iteration)
        try:
            step = train_step(learner, batch, options.accumulation, options.leave_out_nonfinite > 0)
        except torch.OutOfMemoryError as error:
            raise InputError(out_of_memory(error, options)) from None
        progress.iteration += 1
        self._bar.update()
        self._reports.send(progress.iteration, *step, asked=self.interruption.noted())
        self._hear(wait=False)

    def _hear(self, wait: bool) -> None:
        """Take in the reports of past steps: of all, or of those whose results need no waiting."""
        for report in self._reports.read(wait):
            self._asked |= report.asked
            means = self.progress.means
            if report.finite:
                means["steps"] += 1
                for name, term in report.terms.items():
                    means["sums"][name] = means["sums"].get(name, 0.0) + term
            else:
                self._refuse(report.iteration)

    def _refuse(self, iteration: int, finite_weights: bool = True) -> None:
        """A step with a loss or gradient that is not finite: left out, or the end of the training.

        It is always the end where the weights after it are not finite.
        """
        options, progress = self.options, self.progress
        first = (iteration - 1) * options.batch_size
        images = (self.samples.order[first + place] for place in range(options.batch_size))
        names = [self.samples.split.entries[image].name for image in images]
        found = "the loss or its gradient is" if finite_weights else "the weights are"
        said = f"iteration {iteration}: {found} not finite, on {names}"
        progress.left_out += 1
        if finite_weights and progress.left_out <= options.leave_out_nonfinite:
            log.warning("%s; the step is left out", said)
            return
        self.writer.wait()
        if not self._first:
            sys.exit(1)  # the first process says it
        log.error("%s", said)
        raise InputError(
            f"{said}; no weights after it are kept. Look at these images, lower train.lr, set "
            "train.clip_grad_norm, or let some such steps be left out: train.leave_out_nonfinite"
        )

    def _conclude(self) -> bool:
        """What follows a step: a point of the curves, a validation, a saved state.

        Says whether the training has ended before its last iteration.
        """
        progress, every = self.progress, self.intervals
        last = progress.iteration in (self.options.iterations, self.options.total)
        logs = last or progress.iteration % every.log == 0
        validates = self.options.validation and (last or progress.iteration % every.validate == 0)
        saves = last or validates or progress.iteration % every.save == 0
        if logs or saves or self._asked:
            self._hear(wait=True)
        if (saves or self._asked) and not is_finite(self.learner):
            self._refuse(progress.iteration, finite_weights=False)
        entry: HistoryEntry = {"iteration": progress.iteration}
        scores = self._validate() if validates else {}
        if scores is None:
            self._save(improved=False)
            self._interrupt()
        stops = validates and stopped_early([*progress.history, entry | scores], self.options)
        if logs or stops:
            rate = learning_rate(self.options, progress.iteration - 1)
            entry |= mean_terms(progress) | {"train/lr": rate} | self._watch.read()
            self._bar.set_postfix_str(summary_line(entry, ", "))
        entry |= scores
        if len(entry) > 1:
            progress.history.append(entry)  # on all ranks, which all stop early by it
            if self._first:
                self.track(entry)
                log.info("%s", summary_line(entry, "  "))
        ends = last or stops or progress.iteration == self.until
        if progress.iteration in HASHED or ends:
            progress.hashes[str(progress.iteration)] = weights_md5(self.learner.network)
        if saves or self._asked:
            best = progress.best
            self._save(improved=best is not None and best["iteration"] == progress.iteration)
        if stops:
            log.info("no validation has been better for long enough: train.early_stop")
        elif self._asked and not last:
            self._interrupt()
        return stops

    def _validate(self) -> HistoryEntry | None:
        """The scores on val, and the best of them; None where a signal has come.

        What is missing then is caught up with by the next attempt.
        """
        progress = self.progress
        distributed.at(f"the validation after iteration {progress.iteration}")
        self._watch.pause()
        scores = None
        with distributed.gathered(self.predictor.network):
            if not self._asked:
                scores = validate(
                    self.predictor, self.validation, self.description, self.interruption.noted
                )
            if self._first and scores is not None:
                show_some(self.predictor, self.validation, progress.iteration, self.show)
        progress.unmeasured = scores is None
        if scores is None:
            return None
        self.learner.model.train()
        self._watch.go_on()
        mean = scores["val/mean_iou"]
        if progress.best is None or mean > progress.best["mean_iou"]:
            progress.best = Best(iteration=progress.iteration, mean_iou=mean)
        return scores | {f"val/best_{name}": value for name, value in progress.best.items()}

    def _save(self, improved: bool) -> None:
        save_progress(
            self.learner,
            self.progress,
            self.state,
            self.description,
            writer=self.writer,
            improved=improved,
        )

    def _interrupt(self) -> NoReturn:
        """End: the state after this very iteration is being saved."""
        self.writer.wait()
        self._bar.close()
        asked = self.interruption.asked
        ended = Interrupted(
            f"ended by {asked.name if asked else 'a signal to another process'} after iteration "
            f"{self.progress.iteration}, whose state is saved; the same command goes on there"
        )
        ended.told = True
        log.warning("%s", ended)
        remember_said()
        raise ended


def train_step(learner: Learner, batch: Batch, accumulation: int, leave_out: bool = False) -> Step:
    """One optimizer step on this rank's share of the batch; returns what it has found.

    The batch is images (n,h,w,3) uint8, targets (n,h,w) uint8, keys (n,) int64: the microbatches,
    `accumulation` of them, one after another. With `leave_out` nothing changes where the loss or
    the gradient is not finite on any rank; the device is then waited for at every step.
    """
    network, device = learner.network, learner.device
    statistics = [one.clone() for one in network.buffers()] if leave_out else []
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
        distributed.alive()
    finite = distributed.whole(learner.clip())
    finite = finite & torch.stack([*terms.values()]).sum().isfinite()
    if leave_out and distributed.sum_over_ranks((~finite).double()).item():
        for own, before in zip(network.buffers(), statistics, strict=True):
            own.copy_(before)
        learner.leave_out()
    else:
        learner.step()
    return Step(terms, finite)


def is_finite(learner: Learner) -> bool:
    """Whether all that a checkpoint holds of what learns is finite; waits for the device."""
    return distributed.all_finite(learner.tensors(), learner.device)


def mean_terms(progress: Progress) -> HistoryEntry:
    """The mean of each term of the loss since the last point, and of their sum; starts anew."""
    steps, sums = progress.means["steps"], progress.means["sums"]
    progress.means = Means(steps=0, sums={})
    if steps == 0:  # all were left out
        return {}
    terms = {name: total / steps for name, total in sums.items()}
    named = {f"train/loss/{name}": value for name, value in terms.items()}
    return {"train/loss": sum(terms.values())} | named


def stopped_early(history: Sequence[HistoryEntry], options: TrainParams) -> bool:
    """Whether the last `patience` validations have not been better than one before them.

    Better is more than `min_gain` above it.
    """
    if options.early_stop is None:
        return False
    highest, waited = -math.inf, 0
    for entry in history:
        mean = entry.get("val/mean_iou")
        if mean is None:
            continue
        waited += 1
        if mean > highest + options.early_stop.min_gain:
            highest, waited = mean, 0
    return waited >= options.early_stop.patience


def out_of_memory(error: torch.OutOfMemoryError, options: TrainParams) -> str:
    """What may fit where a step does not."""
    share = options.microbatch // distributed.world_size()
    parts = [part for part in range(2, share + 1) if share % part == 0]
    said = f"the device's memory does not hold a step: {str(error).partition('. ')[0]}"
    if parts:
        said += f"; set train.accumulation: {options.accumulation * parts[0]}"
    said += "; or model.backbone.with_cp: true, train.precision: bf16, a smaller crop_size"
    return said if options.parallel == "fsdp" else f"{said}, several GPUs by train.parallel: fsdp"


def validate(
    predictor: Predictor, split: Split, labels: Description, asked: Callable[[], bool]
) -> HistoryEntry | None:
    """The scores on a split, for the history; None where any rank was asked to end."""
    classes, ignore_index = labels["classes"], labels["ignore_index"]
    confusion = evaluate(
        predictor, split, num_classes=len(classes), ignore_index=ignore_index, asked=asked
    )
    if confusion is None:
        return None
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

    All ranks copy what they hold at once; there is one copy at a time. While the training goes on
    it is sent to the first rank and written there.
    """
    writer.wait()
    put_together = distributed.to_first_rank(learner.states())
    now = replace(
        progress,
        history=[*progress.history],
        means=deepcopy(progress.means),
        hashes={**progress.hashes},
    )

    def write() -> None:
        if (states := put_together()) is None:
            return
        checkpoint = build_checkpoint(states, now.iteration, now.best, description)
        if improved:
            state.save_best(checkpoint)
        state.save(
            Saved(
                format=FORMAT,
                checkpoint=checkpoint,
                history=now.history,
                means=now.means,
                hashes=now.hashes,
                left_out=now.left_out,
                unmeasured=now.unmeasured,
            )
        )

    writer.start(write)


def summary_line(entry: HistoryEntry, separator: str) -> str:
    """The entry for a reader: without the terms of the loss and the scores of single classes."""
    texts = []
    for name, value in entry.items():
        short = name.partition("/")[2] or name
        if value is not None and "." not in short and "/" not in short:
            texts.append(f"{short} {value}" if isinstance(value, int) else f"{short} {value:.5g}")
    return separator.join(texts)
