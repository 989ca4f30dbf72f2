"""The train stage, which leaves in bytes.RANK.json what tensors each process holds at its end."""

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from pipeline import distributed
from pipeline.training.loop import Training
from stages import train


def held(tensors: Iterable[Tensor]) -> int:
    """The memory that they lie in here, padding included."""
    local = [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
    storages = [one.untyped_storage() for one in local]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def run_weighed(training: Training) -> None:
    learner, most = training.learner, 0

    def weigh(*_: object) -> None:
        nonlocal most
        whole = [one for one in learner.network.parameters() if not isinstance(one, DTensor)]
        most = max(most, held(whole))

    hook = register_module_forward_pre_hook(weigh)
    run(training)
    hook.remove()
    states = learner.optimizer.state.values()
    counts = {
        "parameters": held(learner.network.parameters()),
        "optimizer": held(one for state in states for one in state.values()),
        "average": held(learner.average.module.parameters()),
        "statistics": held(learner.network.buffers()),
        "whole at once": most,
    }
    Path(f"bytes.{distributed.rank()}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    run, Training.run = Training.run, run_weighed
    train.main([])
