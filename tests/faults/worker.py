"""The train stage with a fault in it, of which `python -m tests.faults.worker FAULT` names one."""

import atexit
import os
import signal
import sys
import time

import torch

from pipeline import interruption
from pipeline.training import loop
from pipeline.training.loop import Step
from stages import run_main, train

STEP = loop.train_step
AT = int(os.environ.get("FAULT_AT", "3"))  # the step with the fault, counted from 1 in this process
RANK = os.environ.get("FAULT_RANK", "0")
steps = 0


def faulty(fault):
    """`train_step` with a fault in one step of one rank."""

    def step(learner, batch, *options) -> Step:
        global steps
        steps += 1
        if steps != AT or os.environ.get("RANK", "0") != RANK:
            return STEP(learner, batch, *options)
        mend = fault(learner)
        found = STEP(learner, batch, *options)
        mend()
        return found

    return step


def hang(learner) -> None:
    """As a kernel that never ends."""
    print("hangs", flush=True)
    time.sleep(600)


def poison(learner):
    """A weight of the first layer is infinite in this one step."""
    weight = next(learner.network.parameters())
    before = weight.detach().clone()

    def mend() -> None:
        with torch.no_grad():
            weight.copy_(before)

    with torch.no_grad():
        weight[0, 0, 0, 0] = float("inf")
    return mend


def fill_the_device(learner) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


def interrupted(validate):
    """`validate`, which a signal comes into."""

    def validation(predictor, split, labels, asked):
        os.kill(os.getpid(), signal.SIGTERM)
        while not asked():
            time.sleep(0.01)
        return validate(predictor, split, labels, asked)

    return validation


def slow_end() -> None:
    """After all is done and signals are ignored."""
    print("ends", flush=True)
    time.sleep(4)


if __name__ == "__main__":
    fault = sys.argv[1]
    interruption.PATIENCE = float(os.environ.get("FAULT_PATIENCE", "20"))
    if fault == "slow_end":
        atexit.register(slow_end)
    elif fault == "interrupted_validation":
        loop.validate = interrupted(loop.validate)
    else:
        faults = {"hang": hang, "poison": poison, "oom": fill_the_device}
        loop.train_step = faulty(faults[fault])
    hand_over = train.hand_over
    train.hand_over = lambda _, processes, given, **others: hand_over(
        "tests.faults.worker", processes, [fault], **others
    )
    run_main(lambda: train.main([]))
