"""The training loop: fetch, forward, loss, backward, step, schedule; then evaluate, save, log."""

import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import distributed
from pipeline.data.loader import RankBatches, Samples, build_loader, rare_class_shares
from pipeline.data.store import Store
from pipeline.data.transforms import DTYPES, autocast, fill_of, normalize
from pipeline.evaluation.inference import build_predictor, evaluate
from pipeline.evaluation.metrics import summarize
from pipeline.models.layers import Output
from pipeline.params import Params, TrainParams, flatten
from pipeline.training.checkpoint import build_checkpoint
from pipeline.training.losses import Criterion, labels_at
from pipeline.training.optimization import Learner, learning_rate
from pipeline.training.state import State, result_params

log = logging.getLogger("instep")


@dataclass
class Progress:
    """All that changes while a training runs, besides the learner's tensors.

    `history` holds the curves, {"iteration": i, "train/loss": ..., ...} in the order of the
    iterations; timings stand under `time/` and are no part of the result.
    """

    iteration: int = 0
    best: dict[str, Any] | None = None  # {"iteration": i, "mean_iou": score}
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    params: Params,
    store: Store,
    learner: Learner,
    progress: Progress,
    device: torch.device,
    state: State,
    track: Callable[[dict[str, Any]], None],
) -> None:
    """Train from progress.iteration to train.iterations; leave the last checkpoint in `state`.

    `track` takes each new entry of the history, and must not hold up the loop.
    """
    options = params.train
    world_size, main = distributed.world_size(), distributed.rank() == 0
    rare = options.rare_class_temperature
    samples = Samples(
        store.split("train"),
        params.augmentation,
        fill_of(params.model),
        store.ignore_index,
        options.seed,
        rare_class_shares(store.pixels, rare) if rare else None,
    )
    batches = RankBatches(options, progress.iteration, distributed.rank(), world_size)
    loader = build_loader(samples, batches, options.workers, device.type == "cuda")
    validation = store.split("val")
    predictor = build_predictor(
        learner.measured(),
        device,
        options.precision,
        params.model,
        params.augmentation.scale,
        params.evaluation,
    )
    meta = describe(params, store)
    criterion = Criterion(options.loss, store.frequency, store.ignore_index, device)
    parallel = distributed.parallelize(learner.model, device).train()

    bar = tqdm(
        total=options.iterations,
        initial=progress.iteration,
        desc="train",
        unit="it",
        disable=not (main and sys.stderr.isatty()),
    )
    began = waiting = time.perf_counter()
    waited, since = 0.0, progress.iteration
    for images, targets, keys in loader:
        waited += time.perf_counter() - waiting
        lr = learning_rate(options, progress.iteration)
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate(options, progress.iteration, group["lr_mult"])
        loss = train_step(parallel, learner, criterion, (images, targets, keys), params, device)
        progress.iteration += 1
        bar.update()

        last = progress.iteration == options.iterations
        entry: dict[str, Any] = {"iteration": progress.iteration}
        if last or progress.iteration % params.tracking.log_interval == 0:
            elapsed, steps = time.perf_counter() - began, progress.iteration - since
            entry |= {
                "train/loss": distributed.sum_over_ranks(loss).item(),
                "train/lr": lr,
                "time/images_per_second": steps * options.batch_size / elapsed,
                "time/data_wait_share": waited / elapsed,
                "time/memory_gib": memory_gib(device),
            }
            bar.set_postfix_str(_line(entry, ", "))
            began, waited, since = time.perf_counter(), 0.0, progress.iteration

        validate = options.validation and (
            last or progress.iteration % params.evaluation.interval == 0
        )
        improved = False
        if validate:
            pause = time.perf_counter()
            confusion, *_ = evaluate(predictor, validation, len(store.classes), store.ignore_index)
            parallel.train()
            scores = summarize(confusion, store.classes)
            entry |= {f"val/{name}": value for name, value in flatten(scores).items()}
            improved = progress.best is None or scores["mean_iou"] > progress.best["mean_iou"]
            if improved:
                progress.best = {
                    "iteration": progress.iteration,
                    "mean_iou": scores["mean_iou"],
                }
            began += time.perf_counter() - pause

        if len(entry) > 1 and main:
            progress.history.append(entry)
            track(entry)
            log.info("%s", _line(entry, "  "))
        if main and (last or validate or progress.iteration % options.checkpoint.interval == 0):
            checkpoint = build_checkpoint(
                learner.model,
                learner.optimizer,
                progress.iteration,
                meta | {"best": progress.best} | learner.states(),
            )
            if improved:
                state.save_best(checkpoint)
            state.save(checkpoint, progress.history)
        waiting = time.perf_counter()
    if main and options.iterations == 0:  # the weights as they were loaded
        state.save(build_checkpoint(learner.model, learner.optimizer, 0, meta | {"best": None}), [])
    bar.close()


def train_step(
    model: nn.Module,
    learner: Learner,
    criterion: Criterion,
    batch: tuple[Tensor, Tensor, Tensor],
    params: Params,
    device: torch.device,
) -> Tensor:
    """One optimizer step on this rank's share of the batch; returns its share of the loss.

    `model` is the learner's, in parallel. The batch is images (n,3,h,w) uint8, targets (n,h,w)
    uint8, keys (n,) int64: the microbatches, one after another. The loss is the sum of the
    criterion of each of the model's outputs, by their weights.
    """
    options = params.train
    images, targets, keys = (part.to(device, non_blocking=True) for part in batch)
    divisors = distributed.sum_over_ranks(criterion.count(targets))
    divisors += divisors == 0  # no valid pixel: a loss of 0 / 1
    loss = torch.zeros((), dtype=torch.float64, device=device)
    parts = zip(*(part.chunk(options.accumulation) for part in (images, targets, keys)))
    for number, (image, target, key) in enumerate(parts, start=1):
        last = number == options.accumulation
        with nullcontext() if last else distributed.accumulating(model):
            inputs = normalize(
                image, params.model.mean, params.model.std, DTYPES[options.precision]
            )
            with autocast(device, options.precision):
                outputs = model(inputs, key)
            losses = [_loss(criterion, output, target, divisors, options) for output in outputs]
            part = torch.stack(losses).sum()
            torch.autograd.backward(learner.scaler.scale(part))
        loss += part.detach()
    learner.scaler.unscale_(learner.optimizer)
    if options.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad_norm)
    learner.scaler.step(learner.optimizer)  # not where fp16 has overflowed
    learner.scaler.update()
    learner.optimizer.zero_grad()
    if learner.average is not None:
        learner.average.update_parameters(learner.model)
    return loss


def _loss(
    criterion: Criterion, output: Output, target: Tensor, divisors: Tensor, options: TrainParams
) -> Tensor:
    """An output's part in the loss of the global batch, by its weight."""
    if output.points is None:
        return output.weight * criterion(output.logits, target, divisors)
    labels = labels_at(target, output.points)
    points = options.batch_size * labels.shape[1]  # as many in every image, labelled or not
    counts = divisors.new_tensor([points, points, options.batch_size])
    return output.weight * criterion(output.logits, labels, counts)


def describe(params: Params, store: Store) -> dict[str, Any]:
    """What a checkpoint says of itself: enough to use its weights without this repository."""
    return {
        "classes": store.classes,
        "palette": store.palette,
        "ignore_index": store.ignore_index,
        "params": result_params(params),
    }


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _line(entry: dict[str, Any], separator: str) -> str:
    """The entry for a reader: without the scores of single classes."""
    known = {name: value for name, value in entry.items() if "." not in name and value is not None}
    texts = {n: str(v) if isinstance(v, int) else f"{v:.5g}" for n, v in known.items()}
    return separator.join(f"{name.split('/')[-1]} {text}" for name, text in texts.items())
